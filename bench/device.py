"""What a device tells: peak memory, the time of its kernels, and how fast it is at most."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import torch

Result = TypeVar("Result")

FLUSHED_BYTES = 256 << 20  # more than any L2 cache holds


class NotMeasured(Exception):
    """A side that cannot run here; says why."""


class Peak:
    """Highest memory since this was made: resident memory of this process, or what is allocated on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)  # memory that was freed must not serve what is measured
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
        self.before = self._highest()

    def _highest(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        with contextlib.suppress(OSError):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
        return math.nan

    def mib(self) -> float | None:
        """Above what was held then; None where the system does not tell."""
        above = self._highest() - self.before
        return None if math.isnan(above) else above


@contextlib.contextmanager
def tf32(device: torch.device, allowed: bool) -> Iterator[None]:
    """Whether PyTorch's float32 products on a GPU may round their operands to TF32."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def wait(device: torch.device) -> None:
    """For everything queued so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kernel_seconds(run: Callable[[], object], device: torch.device, calls: int = 10) -> float:
    """Median seconds of a call: on a GPU between two events, each time with a cold L2 cache; on the CPU by the clock."""
    taken = []
    for _ in range(calls):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device).zero_()
            begin.record()
            run()
            end.record()
            wait(device)
            taken.append(begin.elapsed_time(end) / 1e3)
        else:
            start = perf_counter()
            run()
            taken.append(perf_counter() - start)
    return statistics.median(taken)


def first_line(error: BaseException) -> str:
    """Kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def replayed(run: Callable[[], Result], device: torch.device) -> Callable[[], Result]:
    """The kernels of a call as a CUDA graph, without the host's work; each replay writes the same result.

    Raises:
        NotMeasured: it cannot be captured.
    """
    if device.type != "cuda":
        raise NotMeasured("no CUDA graphs on the CPU")
    try:
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            run()
        wait(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()
    except RuntimeError as error:
        raise NotMeasured(f"cannot be captured as a CUDA graph: {first_line(error)}") from error

    def replay() -> Result:
        graph.replay()
        return result

    return replay


def rates(device: torch.device, size: int = 8192, copied: int = 2**30) -> dict[str, float]:
    """Operations a second of `torch.mm` of two size x size matrices, and bytes a second, read and written, of a clone.

    Returns:
        "fp32" with TF32 allowed, "bf16", "fp32 without TF32" and "copy": see `harness.Measured.peaks`.
    """

    def products(dtype: torch.dtype, allowed: bool) -> float:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        with tf32(device, allowed):
            return 2.0 * size**3 / kernel_seconds(lambda: torch.mm(a, b), device)

    source = torch.zeros(copied // 4, device=device)
    found = {"copy": 2.0 * source.nbytes / kernel_seconds(source.clone, device)}
    for name, dtype, allowed in (
        ("fp32", torch.float32, True), ("fp32 without TF32", torch.float32, False), ("bf16", torch.bfloat16, True),
    ):  # fmt: skip
        found[name] = products(dtype, allowed)
    return found
