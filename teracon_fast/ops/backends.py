"""The registry of backends: which implementations each operation has, and which of them runs an input.

An implementation of an operation is the module `teracon_fast.ops.<operation>.<backend>`, loaded at its first use, so that
importing the package needs neither Triton nor a compiler. `backend="auto"` picks the fastest available one once and says so at
debug level. An explicitly requested backend is used or refused, never silently replaced.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import shutil
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch

from teracon_fast.errors import TeraconError
from teracon_fast.ops import native

_LOG = logging.getLogger(__name__)
_CPU = torch.device("cpu")

# Backends of each operation in order of preference. Reference code is the specification, not a backend. The Triton kernels are
# last: they are verified by Triton's interpreter and by compilation, and have not run on a GPU yet.
OPERATIONS: dict[str, tuple[str, ...]] = {
    "masked_conv": ("cpu", "torch", "triton"),
    "linear_cross_entropy": ("cpu", "torch", "triton"),
    "retention_mse": ("cpu", "torch", "triton"),
    "linear_rank": ("cpu", "torch", "triton"),
    "pack": ("cpu", "torch", "triton"),
    "task_masks": ("torch", "triton"),  # on the CPU too little work for kernels of its own
    "adam": ("cpu", "torch", "triton"),  # implemented in `teracon_fast.optim.adam`
}


class BackendError(TeraconError):
    """An explicitly requested backend does not exist or cannot run this input."""


def _why_not_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return f"it runs torch.float32 and torch.bfloat16 on cpu, not {dtype} on {device}"
    return native.missing_reason()


def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    # The interpreter runs the kernels on the CPU, for tests.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and device.type == "cpu"
    if (device.type != "cuda" and not interpreted) or dtype not in (torch.float32, torch.bfloat16):
        return f"it runs torch.float32 and torch.bfloat16 on cuda, not {dtype} on {device}"
    return None


# Of each backend: None if it runs inputs of a device and dtype on this machine, else the reason.
BACKENDS: dict[str, Callable[[torch.device, torch.dtype], str | None]] = {
    "cpu": _why_not_cpu,
    "torch": lambda device, dtype: None,
    "triton": _why_not_triton,
}


@lru_cache(maxsize=256)
def resolve(
    backend: str, operation: str = "masked_conv", device: torch.device = _CPU, dtype: torch.dtype = torch.float32
) -> str:
    """Name of the implementation that serves a request.

    Args:
        backend: "auto" or the name of an implementation.
        operation: name of the operation.
        device, dtype: of the operation's main input.

    Raises:
        BackendError: when `backend` is not an implementation of `operation`, or cannot run this input here.
    """
    names = OPERATIONS[operation]
    if backend == "auto":
        choice = next(name for name in names if BACKENDS[name](device, dtype) is None)
        _LOG.debug("backend auto: %s of %s on %s runs on %s", operation, dtype, device, choice)
        return choice
    if backend not in names:
        raise BackendError(f"backend {backend!r} cannot run {operation}, expected 'auto' or one of {list(names)}")
    reason = BACKENDS[backend](device, dtype)
    if reason is not None:
        raise BackendError(f"backend {backend!r} cannot run {operation} here: {reason}")
    return backend


@lru_cache
def load(operation: str, name: str) -> Any:
    """The module that implements an operation."""
    return import_module(f"teracon_fast.ops.{operation}.{name}")


def implementation(operation: str, backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """The module that serves a request. Arguments and errors as `resolve`."""
    return load(operation, resolve(backend, operation, device, dtype))


def of_model(backend: str, operation: str) -> str:
    """What a model that was given `backend` asks of one of its operations: the same, or "torch" where other operations have an
    implementation of that name but this one has none. Calls of the operation itself get what they ask for, or an error."""
    elsewhere = any(backend in names for names in OPERATIONS.values())
    return "torch" if elsewhere and backend not in OPERATIONS[operation] else backend


def check_name(backend: str, operation: str = "masked_conv") -> None:
    """Refuse a backend that can run no input of an operation here, before there is one.

    Raises:
        BackendError: when `backend` is not an implementation of `operation`, or what it needs is not installed.
    """
    resolve(backend, operation, torch.device("cuda") if backend == "triton" else _CPU)


def env_report() -> dict[str, Any]:
    """What this machine and installation offer: versions, threads, devices, compilers.

    "backends" has those of each operation that some device here can run, "auto" what it takes on the CPU.
    """
    from teracon_fast import __version__

    triton = importlib.util.find_spec("triton") is not None
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    places = [_CPU, *([torch.device("cuda")] if devices else [])]
    return {
        "teracon_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "devices": devices,
        "triton": triton,
        "compiler": shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++"),
        "cpu_isa": native.cpu_isa() if native.available() else None,
        "backends": {
            operation: [name for name in names if any(BACKENDS[name](place, torch.float32) is None for place in places)]
            for operation, names in OPERATIONS.items()
        },
        "auto": {operation: resolve("auto", operation) for operation in OPERATIONS},
    }
