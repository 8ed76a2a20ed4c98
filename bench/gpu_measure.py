"""How `bench/gpu.py` measures: rates of the device, sides in turns, peak memory, and whether launches or kernels limit.

A time is that of a block of calls queued one after the other, as a training loop queues its steps, by the wall clock between two
waits for the device, divided by their number. Blocks of all sides of a case take turns, and the median counts.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler_util import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from bench.cases import NotMeasured, Run
from bench.gpu_cases import OURS, GpuCase
from bench.heads import Call, HeadCase
from bench.heads import in_turns as heads_in_turns
from bench.measure import Side
from bench.operations import Operations
from bench.traffic import Traffic

# A block of calls lasts about so long; they are at most so many.
BLOCK_SECONDS, MOST_CALLS = 0.05, 100
# Kernels that are listed by name.
LISTED = 12


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether PyTorch's float32 products of matrices and convolutions may round their operands to TF32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


class Meter:
    """Clock and memory of a device. A block of calls lasts about `block` seconds."""

    def __init__(
        self, device: torch.device, clock: Callable[[], float] = time.perf_counter, block: float = BLOCK_SECONDS
    ) -> None:
        self.device, self.clock, self.block = device, clock, block
        self.is_gpu = device.type == "cuda"  # ROCm too

    def wait(self) -> None:
        """For everything queued so far."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object], calls: int = 1) -> float:
        """Of one call of a block of so many."""
        self.wait()
        start = self.clock()
        for _ in range(calls):
            run()
        self.wait()
        return (self.clock() - start) / calls

    def calls(self, run: Callable[[], object]) -> int:
        """How many calls make a block; calls `run` a few times to know."""
        once = min(self.seconds(run) for _ in range(2))
        return max(1, min(MOST_CALLS, int(self.block / max(once, 1e-9))))

    def held(self) -> int:
        """Bytes of tensors on the device; 0 on the CPU, where they are not counted."""
        return torch.cuda.memory_allocated(self.device) if self.is_gpu else 0

    def working(self, run: Callable[[], object]) -> float | None:
        """Bytes that a call takes at its peak above what is held before it; None on the CPU."""
        if not self.is_gpu:
            run()
            return None
        self.wait()
        before = self.held()
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.wait()
        return float(torch.cuda.max_memory_allocated(self.device) - before)

    def forget(self) -> None:
        """Give unused memory of the device back."""
        if self.is_gpu:
            gc.collect()
            torch.cuda.empty_cache()

    def replayed(self, run: Run) -> Callable[[], object]:
        """The call without what the host does for it: a graph of its launches.

        Raises:
            NotMeasured: it cannot be captured.
        """
        if not self.is_gpu:
            raise NotMeasured("no graphs of launches on the CPU")
        try:
            stream = torch.cuda.Stream(self.device)
            with torch.cuda.stream(stream):
                run()
            self.wait()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
        except RuntimeError as error:
            raise NotMeasured(f"cannot be captured as a graph: {first_line(error)}") from error
        return graph.replay


def first_line(error: BaseException) -> str:
    """Kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no more is said'])[0]}"


@dataclass
class Rates:
    """What the device does at most, measured.

    Attributes:
        bf16, tf32, fp32: operations a second of `torch.mm` of two `size` x `size` matrices.
        copy: bytes a second, read and written, of a clone of `copied` bytes.
    """

    bf16: float
    tf32: float
    fp32: float
    copy: float
    size: int
    copied: int

    def floor(self, operations: float, moved: float) -> float:
        """Seconds that so many operations (in bf16) or bytes take at least."""
        return max(operations / self.bf16, moved / self.copy)


def rates(meter: Meter, size: int = 8192, copied: int = 2**30, rounds: int = 7) -> Rates:
    """Measure them: `torch.mm` of two size x size matrices of normal numbers, and a clone of so many bytes."""

    def rate(amount: float, run: Callable[[], object]) -> float:
        run()
        calls = meter.calls(run)
        return amount / max(statistics.median(meter.seconds(run, calls) for _ in range(rounds)), 1e-12)

    def products(dtype: torch.dtype, allowed: bool) -> float:
        a, b = (torch.randn(size, size, device=meter.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        with tf32(allowed):
            return rate(2.0 * size**3, lambda: torch.mm(a, b, out=out))

    source = torch.zeros(copied // 4, device=meter.device)
    copy = rate(2.0 * source.nbytes, source.clone)
    del source
    found = Rates(
        products(torch.bfloat16, True), products(torch.float32, True), products(torch.float32, False), copy, size, copied
    )
    meter.forget()
    return found


@dataclass
class Found(Side):
    """Measurements of one side of a case: `peak_mib` with parameters, gradients and optimiser state, `calls` in each block;
    `failed`: it has a problem that is neither of memory nor of what a machine lacks."""

    calls: int = 0
    note: str = ""
    failed: bool = False


@dataclass
class Result:
    """Measurements of one case.

    Attributes:
        replayed: seconds of a call of `OURS` as a graph, without the host's part, where asked for; or why not.
    """

    name: str
    title: str
    users: int
    operations: Operations
    traffic: Traffic
    sides: dict[str, Found] = field(default_factory=dict)
    replayed: float | str | None = None

    @property
    def best_eager(self) -> str | None:
        """The fastest of the sides that are the reference."""
        measured = [name for name in self.sides if name.startswith(("eager", "compile")) and self.sides[name].seconds]
        return min(measured, key=lambda name: self.sides[name].median, default=None)

    def times_eager(self, side: str) -> float | None:
        """How many times faster a side is than the best of the reference's."""
        best, found = self.best_eager, self.sides.get(side)
        return self.sides[best].median / found.median if best is not None and found is not None and found.seconds else None


def measure(
    case: GpuCase, meter: Meter, rounds: int, budget: float, together: bool = True, compiled: bool = False, replay: bool = False
) -> Result:
    """Measure all sides of a case.

    Each side's first call, not timed and without TF32, must give the first side's answer. Then blocks of the sides take turns,
    with TF32 allowed, for so many rounds or until `budget` seconds are over; at least two.

    Args:
        together: hold all sides at once and let them take turns; else each is measured alone, where memory is short.
        replay: also measure `OURS` as a graph of its launches.

    Raises:
        DifferentAnswers: a side's answer is not the first side's.
    """
    result = Result(case.name, case.title, case.users, case.operations(), case.traffic())
    names, answers = case.sides(compiled), dict[str, Tensor]()
    for group in [names] if together else [(name,) for name in names]:
        runs = dict[str, Run]()
        for name in group:
            result.sides[name] = Found()
            run = begun(case, name, result.sides[name], answers, meter)
            if run is not None:
                runs[name] = run
        del run
        in_turns(runs, result, meter, rounds, budget / (1 if together else len(names)))
        if replay and OURS in runs:
            result.replayed = replayed(runs[OURS], meter, result.sides[OURS].calls)
        del runs
    case.check(answers)
    if compiled:
        torch.compiler.reset()
    meter.forget()
    return result


def begun(case: GpuCase, name: str, found: Found, answers: dict[str, Tensor], meter: Meter) -> Run | None:
    """A side's call, its answer and memory known; None if it cannot be had, and then why. The other sides must run."""
    meter.forget()
    before = meter.held()
    try:
        with tf32(False):
            run = case.side(name)
            answers[name] = case.told(name, run())
        kept = meter.held() - before
        with tf32(True):
            working = meter.working(run)
            found.calls = meter.calls(run)
    except Exception as error:
        found.problem = first_line(error)
        # The compiler may need what a machine lacks.
        found.failed = not (isinstance(error, (NotMeasured, torch.OutOfMemoryError)) or name.startswith("compile"))
        if found.failed:
            traceback.print_exc()
    if found.problem is not None:
        answers.pop(name, None)
        return None
    found.peak_mib = None if working is None else (kept + working) / 2**20
    found.note = case.notes.get(name, "")
    return run


def in_turns(runs: dict[str, Run], result: Result, meter: Meter, rounds: int, budget: float) -> None:
    """Blocks of the sides in turns, each round beginning with another one."""
    order, begun = list(runs), meter.clock()
    with tf32(True):
        for number in range(rounds):
            if number >= 2 and meter.clock() - begun > budget:
                break
            for name in order[number % len(order) :] + order[: number % len(order)] if order else []:
                found = result.sides[name]
                try:
                    found.seconds.append(meter.seconds(runs[name], found.calls))
                except torch.OutOfMemoryError as error:
                    found.problem = first_line(error)
                    found.seconds.clear()
                    order.remove(name)


def replayed(run: Run, meter: Meter, calls: int, rounds: int = 5) -> float | str:
    """Seconds of a call as a graph, or why there are none."""
    try:
        graph = meter.replayed(run)
    except NotMeasured as reason:
        return str(reason)
    return statistics.median(meter.seconds(graph, calls) for _ in range(rounds))


@dataclass
class Kernels:
    """Where the time of a step goes.

    Attributes:
        step: seconds of a step among others that are queued.
        busy: seconds that its kernels take, summed.
        launches: kernels of a step.
        longest: name, seconds and launches of those that take most.
    """

    step: float
    busy: float
    launches: float
    longest: list[tuple[str, float, float]]

    @property
    def share(self) -> float:
        """Of the step, in which the device is busy: near 1 kernels limit, well below it the host, which does not queue fast
        enough."""
        return self.busy / self.step


def kernels(case: GpuCase, side: str, meter: Meter, steps: int = 5) -> Kernels:
    """Profile a side. On the CPU what counts as a kernel is an operation's own time."""
    run = case.side(side)
    with tf32(True):
        run()
        step = statistics.median(meter.seconds(run, meter.calls(run)) for _ in range(3))
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if meter.is_gpu else [])]) as profiler:
            for _ in range(steps):
                run()
            meter.wait()
    taken = dict[str, list[float]]()
    for event in profiler.events() or []:
        seconds = kernel_seconds(event, meter.is_gpu)
        if seconds is not None:
            taken.setdefault(event.name, []).append(seconds / steps)
    longest = sorted(taken, key=lambda name: -sum(taken[name]))[:LISTED]
    return Kernels(
        step, sum(map(sum, taken.values())), sum(map(len, taken.values())) / steps,
        [(name, sum(taken[name]), len(taken[name]) / steps) for name in longest],
    )  # fmt: skip


def kernel_seconds(event: Any, is_gpu: bool) -> float | None:
    """Of a profiler's event, if it is a kernel; regions that a program names also appear on the device's timeline."""
    if getattr(event, "is_user_annotation", False) or (event.device_type == DeviceType.CUDA) != is_gpu:
        return None
    return float(event.time_range.elapsed_us() if is_gpu else event.self_cpu_time_total) / 1e6


def measure_head(case: HeadCase, meter: Meter, backend: str, rounds: int) -> Result:
    """Measure all sides of a case of heads (`bench.heads`); answers and gradients are compared without TF32.

    Raises:
        DifferentAnswers: a side's are not the first side's.
    """
    case.backend = backend
    case.to(meter.device)
    blocks = dict[int, int]()

    def clock(call: Call) -> tuple[Tensor, float]:
        answer = torch.empty(0)

        def run() -> None:
            nonlocal answer
            call.forget()
            answer = call.run()

        with tf32(True):
            if id(call) not in blocks:
                run()
                blocks[id(call)] = meter.calls(run)
            return answer, meter.seconds(run, blocks[id(call)])

    with tf32(False):
        found = heads_in_turns(case, rounds, clock)
    result = Result(type(case).__name__, case.title, 0, Operations(0, 0), Traffic())
    for name, side in found.items():
        result.sides[name] = Found(side.seconds, side.problem, note=f"{side.rows:,} rows")
        if not side.seconds:
            continue
        result.operations = Operations(1e9 * side.gflop, 1e9 * side.gflop)
        call = case.call(name)
        working = meter.working(call.run)
        if working is not None:
            gradients = sum(leaf.grad.nbytes for leaf in call.leaves.values() if leaf.grad is not None)
            result.sides[name].peak_mib = max(0.0, working - gradients) / 2**20
        call.forget()
        del call
    meter.forget()
    return result
