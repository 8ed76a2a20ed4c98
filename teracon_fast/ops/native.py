"""The optional compiled extension: loads it into torch at first use, and says why when it cannot."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import torch

from teracon_fast.errors import TeraconError

LIBRARY = Path(__file__).resolve().parents[1] / "_C.so"


class NativeError(TeraconError):
    """The compiled extension is needed and is not there."""


def library() -> Path:
    """The compiled extension's file: the package's own, or the one that TERACON_NATIVE_LIBRARY names."""
    return Path(os.environ.get("TERACON_NATIVE_LIBRARY") or LIBRARY).resolve()


@lru_cache(maxsize=1)
def missing_reason() -> str | None:
    """None when the compiled extension is loaded (the first call loads it), else why it is not."""
    if os.environ.get("TERACON_NATIVE", "1") == "0":
        return "switched off by TERACON_NATIVE=0"
    path = library()
    if not path.exists():
        if os.environ.get("TERACON_NATIVE_LIBRARY"):
            return f"TERACON_NATIVE_LIBRARY: got {path}, expected a file"
        return (
            "this installation was made without it (no C++ compiler or no torch of at least 2.11 was found); "
            "reinstall with TERACON_BUILD_EXT=1 and --no-build-isolation to see why"
        )
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path.name} does not load into torch {torch.__version__}: {error}"
    return None


def available() -> bool:
    """Whether the compiled extension is loaded."""
    return missing_reason() is None


def _require() -> None:
    reason = missing_reason()
    if reason is not None:
        raise NativeError(f"the compiled extension is not available: {reason}")


def fma_peak(threads: int) -> float:
    """Highest fp32 rate of this machine in GFLOP/s (a multiply-add counts as two), on `threads` threads at once.

    Measured, in about 0.3 s: independent multiply-add chains that never leave the registers. No kernel can be faster.

    Raises:
        TeraconError: `threads` is not 1 to 4096. NativeError: there is no compiled extension.
    """
    if not 1 <= threads <= 4096:
        raise TeraconError(f"fma_peak: got {threads} threads, expected 1 to 4096")
    _require()
    return float(torch.ops.teracon_fast.fma_peak(threads))


def fma_instructions() -> str:
    """The instructions that `fma_peak` uses on this machine: "avx512f", "avx2+fma" or "generic". Raises NativeError."""
    _require()
    return str(torch.ops.teracon_fast.fma_instructions())


def cpu_isa() -> str:
    """The instruction set of the CPU kernels ("avx512_bf16", "avx512", "avx2" or "generic"), or what TERACON_CPU_ISA names.

    Raises:
        NativeError: there is no compiled extension. RuntimeError: TERACON_CPU_ISA names one that this machine lacks.
    """
    _require()
    return str(torch.ops.teracon_fast.cpu_isa())
