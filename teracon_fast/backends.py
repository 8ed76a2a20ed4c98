"""Which implementation of an operation runs: `torch` (plain PyTorch operations), and compiled ones where they exist.

`backend="auto"` picks the fastest available one once and says so at debug level. An explicitly requested backend is used
or refused, never silently replaced.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import shutil
from functools import lru_cache
from typing import Any

import torch

from teracon_fast.errors import TeraconError

_LOG = logging.getLogger(__name__)

# Implementations in order of preference, per operation. Reference code is the specification, not a backend.
_AVAILABLE: dict[str, tuple[str, ...]] = {"masked_conv": ("torch",)}


class BackendError(TeraconError):
    """An explicitly requested backend does not exist or cannot run this input."""


def resolve(backend: str, operation: str = "masked_conv") -> str:
    """Name of the implementation that serves a request.

    Args:
        backend: "auto" or the name of an implementation.
        operation: name of the operation.

    Raises:
        BackendError: when `backend` is not an implementation of `operation`.
    """
    available = _AVAILABLE[operation]
    if backend == "auto":
        return _automatic(operation)
    if backend not in available:
        raise BackendError(f"backend {backend!r} cannot run {operation}, expected 'auto' or one of {list(available)}")
    return backend


@lru_cache(maxsize=None)
def _automatic(operation: str) -> str:
    choice = _AVAILABLE[operation][0]
    _LOG.debug("backend auto: %s runs on %s", operation, choice)
    return choice


def env_report() -> dict[str, Any]:
    """What this machine and installation offer: versions, threads, devices, compilers, backends of each operation."""
    from teracon_fast import __version__

    triton = importlib.util.find_spec("triton") is not None
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
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
        "backends": {operation: list(names) for operation, names in _AVAILABLE.items()},
        "auto": {operation: resolve("auto", operation=operation) for operation in _AVAILABLE},
    }
