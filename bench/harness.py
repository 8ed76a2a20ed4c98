"""How everything here is measured: one loop for all cases.

A *case* is a computation, and its *sides* are the ways to do it that are compared. Sides take turns, each round starting with
another one, so that a slow moment of the machine hits all of them. A turn begins with calls of the same side that are not timed,
at least two, until a call is no longer clearly faster than the one before it: whoever ran last has taken the memory and the
caches, and the side with the largest working set would otherwise pay for fresh pages in the timed calls. A turn's time is the
median of its timed calls, a side's time the median of its turns, and a ratio the median of the ratios of each round.

With `apart`, each side runs in a process of its own, which also gives its peak memory; the turns are the same. All processes
inherit one environment, so the allocator has the same settings for every side.

A side's answer is compared with that of the first side before anything is timed. Sides whose name contains "bf16" run in bf16.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import statistics
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.device import NotMeasured, Peak, first_line, kernel_seconds, tf32, wait
from teracon_fast.ops import native

CPU = torch.device("cpu")
ROUNDS = 3
BUDGET = 60.0  # seconds for the turns of one case; there is at least one round
LEAST_UNTIMED, MOST_UNTIMED = 2, 5  # calls at the beginning of a turn
STEADY = 0.95  # a call that takes at least this share of the one before it is no longer warming up
LONG = 5.0  # seconds; longer calls are timed once a turn
TURN_SECONDS, BLOCK_SECONDS = 1.0, 0.05  # of the timed calls of a turn, on the CPU and on a GPU
MOST_CALLS, MOST_QUEUED = 10, 100  # the same, as numbers of calls
COMPARED = 1 << 20  # numbers of a tensor that are compared; of a larger one a sample
PYTORCH = ("eager", "compile", "fused")  # what the names of PyTorch's own sides begin with

Answer = Mapping[str, Tensor]


class DifferentAnswers(AssertionError):
    """A side does not compute what the first side computes, so their times cannot be compared."""


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of a call, a multiply-add counting as two: `useful` ones, which the result needs, and those of a
    `dense` network, which computes every position. A backward pass costs twice its forward pass."""

    useful: float = 0.0
    dense: float = 0.0

    def __add__(self, other: Operations) -> Operations:
        return Operations(self.useful + other.useful, self.dense + other.dense)

    def __mul__(self, times: int) -> Operations:
        return Operations(times * self.useful, times * self.dense)


@dataclass(frozen=True)
class Call:
    """A side, ready to run.

    Attributes:
        run: what is timed. Returns tensors by name, which are compared between sides.
        before: called before each call, not timed on the CPU.
        kernels_only: time the GPU's work without the host's, by CUDA events, with a cold L2 cache.
    """

    run: Callable[[], Answer]
    before: Callable[[], object] = lambda: None
    kernels_only: bool = False


class Case(ABC):
    """What is measured. Holds sizes only, so that it can be sent to another process; `side` makes the tensors.

    Attributes:
        name: of the case. title: what a call does, in words.
        sides: names; answers are compared with those of the first.
        device: where the sides run. users: served by one call.
        limits: largest relative error of each tensor of an answer, in fp32 and bf16; "" is for all others.
        inputs_held: whether memory of a call is what it takes above parameters and inputs.
    """

    name: str
    sides: tuple[str, ...]
    device: torch.device = CPU
    users: int = 0
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {"": (1e-3, 5e-2)}
    inputs_held: ClassVar[bool] = False

    @property
    @abstractmethod
    def title(self) -> str: ...

    @abstractmethod
    def side(self, name: str) -> Call:
        """A side with parameters and inputs of its own, equal to every other side's.

        Raises:
            NotMeasured: it cannot run here.
        """

    def operations(self, side: str) -> Operations:
        """Operations of one call."""
        return Operations()

    def moved_bytes(self, side: str) -> float:
        """Bytes that a call has to move at least, each once; 0 where they are not counted."""
        return 0.0

    def tiny(self) -> Case:
        """A small case with the same sides: what its calls load and start is not counted as memory of this one's."""
        return self


@dataclass
class Side:
    """Measurements of one side: the time of each turn, or why there is none.

    Attributes:
        peak_mib: highest memory of a call, without its answer; above what the process held before parameters and inputs were
            made, or after (`Case.inputs_held`). None where it is not known.
        errors: relative difference of each tensor of the answer from the first side's.
        failed: there is a problem which is neither memory nor something that a machine may lack.
    """

    operations: Operations = Operations()
    moved_bytes: float = 0.0
    seconds: list[float] = field(default_factory=list)
    peak_mib: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    problem: str | None = None
    failed: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Measured:
    """Measurements of one case. `peaks`: the machine's operations a second by precision, and bytes a second as "copy"."""

    name: str
    title: str
    users: int
    sides: dict[str, Side]
    peaks: Mapping[str, float]

    def times(self, side: str, to: str | None) -> float | None:
        """How many times faster a side is than another one."""
        if to is None or to not in self.sides or not (self.sides[to].seconds and self.sides[side].seconds):
            return None
        pairs = zip(self.sides[to].seconds, self.sides[side].seconds, strict=False)
        return statistics.median(other / own for other, own in pairs)

    def best_of_pytorch(self, side: str) -> str | None:
        """The fastest of PyTorch's sides with the precision of a side."""
        named = (name for name in self.sides if name.startswith(PYTORCH) and precision(name) == precision(side))
        return min((name for name in named if self.sides[name].seconds), key=lambda name: self.sides[name].median, default=None)

    def rows(self) -> list[dict[str, Any]]:
        """A flat row for each side, as records keep and tables show them."""
        return [{"case": self.name, "title": self.title, "side": name, **self._row(name)} for name in self.sides]

    def _row(self, name: str) -> dict[str, Any]:
        side, best = self.sides[name], None if name.startswith(PYTORCH) else self.best_of_pytorch(name)
        if not side.seconds:
            return {"problem": side.problem or "not measured", "peak_mib": side.peak_mib}
        peak = self.peaks.get(precision(name), self.peaks.get("fp32"))
        useful, copy = side.operations.useful, self.peaks.get("copy")
        floor = max(useful / peak, side.moved_bytes / copy) if peak and copy and side.moved_bytes else None
        return {
            "median_seconds": side.median,
            "times_eager": self.times(name, "eager"),
            "times_best": self.times(name, best),
            "best": best,
            "users_per_second": self.users / side.median or None,
            "useful_gflop": useful / 1e9,
            "dense_gflop": side.operations.dense / 1e9,
            "useful_gflops": useful / side.median / 1e9 or None,
            "share_of_peak": useful / side.median / peak if peak and useful else None,
            "gigabytes_per_second": side.moved_bytes / side.median / 1e9 if floor else None,
            "times_floor": side.median / floor if floor else None,
            "peak_mib": side.peak_mib,
            "largest_error": max(side.errors.values(), default=None),
            "errors": side.errors,
            "seconds": side.seconds,
        }


def precision(side: str) -> str:
    return "bf16" if "bf16" in side else "fp32"


def fma_peak() -> dict[str, float]:
    """The machine's measured fp32 FMA peak on the threads that torch uses, operations a second, as `Measured.peaks`."""
    return {"fp32": 1e9 * native.fma_peak(torch.get_num_threads())} if native.available() else {}


def measure(
    case: Case, rounds: int = ROUNDS, budget: float = BUDGET, apart: bool = False, one_by_one: bool = False,
    peaks: Mapping[str, float] | None = None,
) -> Measured:  # fmt: skip
    """Measure all sides of a case.

    Args:
        rounds: turns of each side; fewer where they would take longer than `budget` seconds, but at least one.
        apart: each side in a process of its own.
        one_by_one: all turns of a side before the next side is made: it takes less memory and time.
        peaks: see `Measured`; None: the FMA peak, measured now.
    """
    gc.collect()
    gc.freeze()  # what is there now stays; looking through it before every turn would take time
    sides = {name: Side(case.operations(name), case.moved_bytes(name)) for name in case.sides}
    expected: tuple[str, Answer] | None = None
    for group in [[name] for name in sides] if one_by_one else [list(sides)]:
        with ExitStack() as stack:
            runners = dict[str, Local]()
            for name in group:
                with _noting(sides[name], name):
                    runner = Apart(case, name) if apart else Local(case, name, case.device.type == "cuda")
                    stack.callback(runner.close)
                    runner.start()
                    sides[name].peak_mib = runner.peak_mib
                    expected = expected or (name, runner.answer)
                    sides[name].errors = compare(case, name, runner.answer, *expected)
                    runners[name] = runner
            in_turns(runners, sides, rounds, budget)
    return Measured(case.name, case.title, case.users, sides, fma_peak() if peaks is None else peaks)


def in_turns(runners: Mapping[str, Local], sides: Mapping[str, Side], rounds: int, budget: float) -> None:
    """Let the sides take turns. The first turn of a side that is alone follows its first calls, so it needs no others."""
    cost = sum((LEAST_UNTIMED + _timed_calls(side.seconds, side.on_gpu)) * side.seconds for side in runners.values())
    for number in range(max(1, min(rounds, int(budget / max(cost, 1e-9))))):
        order = [name for name in runners if sides[name].problem is None]
        for name in order[number % len(order) :] + order[: number % len(order)] if order else []:
            with _noting(sides[name], name):
                sides[name].seconds.append(runners[name].turn(warm=number > 0 or len(runners) > 1))


@contextlib.contextmanager
def _noting(side: Side, name: str) -> Iterator[None]:
    """A side that cannot be measured says why, and the others are measured."""
    try:
        yield
    except Exception as error:
        side.problem = str(error) if isinstance(error, NotMeasured | DifferentAnswers) else first_line(error)
        # The compiler may need what a machine lacks.
        side.failed = not (isinstance(error, NotMeasured | MemoryError | torch.OutOfMemoryError) or name.startswith("compile"))
        side.seconds.clear()
        if side.failed and not isinstance(error, DifferentAnswers):
            traceback.print_exc()


def compare(case: Case, name: str, answer: Answer, reference: str, expected: Answer) -> dict[str, float]:
    """Relative difference of each tensor of an answer from the expected one, where their shapes agree.

    Raises:
        DifferentAnswers: one is above the case's limit.
    """
    errors, wrong = dict[str, float](), []
    low = "bf16" in (precision(name), precision(reference))
    for key, value in answer.items():
        if value.shape != expected[key].shape:
            continue
        norm = float(torch.linalg.vector_norm(expected[key]))
        errors[key] = float(torch.linalg.vector_norm(value - expected[key])) / (norm or 1.0)
        limit = case.limits.get(key, case.limits[""])[low]
        if not errors[key] <= limit:
            wrong.append(f"{key} is off by {errors[key]:.3g}, expected at most {limit:g}")
    if wrong:
        raise DifferentAnswers(f"{name} differs from {reference}: {'; '.join(wrong)}")
    return errors


class Local:
    """A side in this process. `memory`: measure its peak memory, which on the CPU needs a process without other sides.

    Attributes:
        answer, seconds: of its second call. peak_mib: see `Side`.
    """

    def __init__(self, case: Case, name: str, memory: bool) -> None:
        self.case, self.name, self.device, self.on_gpu = case, name, case.device, case.device.type == "cuda"
        self.memory = memory and not name.startswith("compile")  # compiling takes more than what it makes
        self.call: Call | None = None
        self.peak_mib: float | None = None

    def start(self) -> None:
        """Make the side and call it twice."""
        with tf32(self.device, False):
            if self.memory and not self.on_gpu:
                tiny = self.case.tiny().side(self.name)
                tiny.before()
                tiny.run()
            peak = Peak(self.device)
            self.call = self.case.side(self.name)
            peak = Peak(self.device) if self.case.inputs_held else peak
            self._run()
            self.seconds, answer = self._run()
        highest = peak.mib()
        if self.memory and highest is not None:
            self.peak_mib = max(0.0, highest - sum(tensor.nbytes for tensor in answer.values()) / 2**20)
        self.answer = {name: _sampled(tensor) for name, tensor in answer.items()}

    def turn(self, warm: bool) -> float:
        """Seconds of a call: the median of a turn's timed calls; on a GPU, which queues calls, their mean. `warm`: begin with
        untimed calls."""
        assert self.call is not None
        gc.collect()
        with tf32(self.device, True):
            calls = _timed_calls(self._warm() if warm else self.seconds, self.on_gpu)
            if self.call.kernels_only:
                return kernel_seconds(self.call.run, self.device, calls)
            return self._run(calls)[0] if self.on_gpu else statistics.median(self._run()[0] for _ in range(calls))

    def _warm(self) -> float:
        last = self._run()[0]
        for _ in range(MOST_UNTIMED - 1):
            before, last = last, self._run()[0]
            if last >= STEADY * before:
                break
        return last

    def _run(self, calls: int = 1) -> tuple[float, Answer]:
        """Mean seconds of some calls one after the other, and the last answer."""
        assert self.call is not None
        self.call.before()
        wait(self.device)
        begin = perf_counter()
        answer = self.call.run()
        for _ in range(calls - 1):
            self.call.before()
            answer = self.call.run()
        wait(self.device)
        return (perf_counter() - begin) / calls, answer

    def close(self) -> None:
        """Give the memory back."""
        self.call = None
        gc.collect()
        if self.name.startswith("compile"):
            torch.compiler.reset()
        if self.on_gpu:
            torch.cuda.empty_cache()


class Apart(Local):
    """A side in a process of its own."""

    def __init__(self, case: Case, name: str) -> None:
        super().__init__(case, name, memory=True)
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(["bench.network", "bench.heads", "torch._dynamo"])  # imported once for all
        self.pool = ProcessPoolExecutor(1, context)

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return self.pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise MemoryError(f"the process of {self.name} was ended: out of memory?") from error

    def start(self) -> None:
        answer, self.seconds, self.peak_mib = self._ask(_start, self.case, self.name, torch.get_num_threads())
        self.answer = {name: torch.from_numpy(numbers) for name, numbers in answer.items()}

    def turn(self, warm: bool) -> float:
        return float(self._ask(_turn, warm))

    def close(self) -> None:
        self.pool.shutdown()


_HERE: list[Local] = []  # in the process of an `Apart`


def _start(case: Case, name: str, threads: int) -> tuple[dict[str, Any], float, float | None]:
    torch.set_num_threads(threads)
    gc.freeze()  # as in `measure`
    side = Local(case, name, memory=True)
    _HERE.append(side)
    side.start()
    return {name: tensor.numpy() for name, tensor in side.answer.items()}, side.seconds, side.peak_mib


def _turn(warm: bool) -> float:
    return _HERE[0].turn(warm)


def _timed_calls(seconds: float, on_gpu: bool) -> int:
    """Timed calls of a turn, from the time of one."""
    most, turn = (MOST_QUEUED, BLOCK_SECONDS) if on_gpu else (MOST_CALLS, TURN_SECONDS)
    return max(1 if on_gpu or seconds > LONG else 2, min(most, int(turn / max(seconds, 1e-9))))


def _sampled(tensor: Tensor) -> Tensor:
    """A copy on the CPU in float32; of a large tensor every n-th number, n odd so that no column is left out."""
    tensor = tensor.detach()
    few = tensor if tensor.numel() <= COMPARED else tensor.flatten()[:: tensor.numel() // COMPARED | 1]
    return few.to("cpu", torch.float32, copy=True)
