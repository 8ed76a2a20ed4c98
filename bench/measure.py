"""How a case is measured: sides in turns within one process, medians, and peak memory each in a process of its own."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.cases import CASES, SIDES, TINY, TTL, Case, NotMeasured, Run, Shape
from bench.operations import Operations
from teracon_fast.ops import native
from teracon_fast.train.memory import forget_highest_resident, highest_resident_mib

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Side:
    """Measurements of one side: seconds of every call, or why there are none; peak memory in MiB where it was taken."""

    seconds: list[float] = field(default_factory=list)
    problem: str | None = None
    peak_mib: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Measured:
    """Measurements of one case. `peak_gflops`: fp32 FMA peak of the machine on the same threads, None if it cannot be had."""

    name: str
    title: str
    users: int
    operations: Operations
    sides: dict[str, Side]
    peak_gflops: float | None

    def ratio(self, side: str, to: str = "eager") -> float | None:
        """How many times faster a side is than the eager one."""
        both = (self.sides.get(side), self.sides.get(to))
        if both[0] is None or both[1] is None or not (both[0].seconds and both[1].seconds):
            return None
        return both[1].median / both[0].median


class DifferentAnswers(AssertionError):
    """Two sides do not compute the same thing, so their times cannot be compared."""


def fma_peak() -> float | None:
    """The machine's fp32 FMA peak on the threads that torch uses, GFLOP/s."""
    return native.fma_peak(torch.get_num_threads()) if native.available() else None


def measure(case: Case, rounds: int, memory: bool = True) -> Measured:
    """Measure all sides of a case.

    The first call of each side, not timed, must give the same answer as the eager one's. Then each round calls every side
    once, starting with another one each time, so that a slow moment of the machine meets all of them.

    Raises:
        DifferentAnswers: a side's answer is not the eager side's.
    """
    sides, runs, answers = {name: Side() for name in SIDES}, dict[str, Run](), dict[str, torch.Tensor]()
    for name in SIDES:
        try:
            runs[name] = case.side(name)
            answers[name] = runs[name]()
        except NotMeasured as reason:
            sides[name].problem = str(reason)
        except Exception as error:
            # Inductor needs a C++ compiler, which a machine may lack; the other sides must run.
            if name != "compile":
                raise
            runs.pop(name, None)
            sides[name].problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    check(case, answers)
    peak = fma_peak()
    for number in range(rounds):
        order = list(runs)
        for name in order[number % len(order) :] + order[: number % len(order)]:
            gc.collect()
            start = time.perf_counter()
            runs[name]()
            sides[name].seconds.append(time.perf_counter() - start)
    if peak is not None:
        peak = max(peak, fma_peak() or 0.0)
    operations = case.operations()
    del runs
    gc.collect()
    torch.compiler.reset()
    if memory:
        # Compilation itself takes more memory than what it makes, so that side is left out.
        for name in ("eager", "torch", "ours", "ours-bf16"):
            if sides[name].seconds:
                sides[name].peak_mib = peak_memory(case, name)
    return Measured(case.name, case.title, case.users, operations, sides, peak)


def check(case: Case, answers: Mapping[str, torch.Tensor]) -> None:
    """Compare every answer with the eager side's.

    Raises:
        DifferentAnswers: they differ by more than rounding.
    """
    for name, answer in answers.items():
        expected = answers["eager"]
        rtol, atol = (0.05, 0.02) if name.endswith("bf16") else (1e-3, 1e-5)
        if not torch.allclose(answer.double(), expected.double(), rtol=rtol, atol=atol):
            raise DifferentAnswers(f"{case.title}: {name} computes {answer}, eager computes {expected}")


def peak_memory(case: Case, side: str) -> float:
    """Peak memory of a side in MiB: weights, optimiser state and activations, above a process that has imported everything.

    A process of its own builds the side and calls it twice.
    """
    command = [sys.executable, "-m", "bench.measure", case.name, side, "--evaluated", str(case.shape.evaluated)]
    command += ["--tiny"] if case.shape.length == TINY.length else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return float(json.loads(done.stdout.splitlines()[-1])["peak_mib"])


def _report_peak_memory(name: str, side: str, shape: Shape) -> None:
    forget_highest_resident()  # what importing took for a moment
    before = highest_resident_mib()
    run = CASES[name](shape).side(side)
    run()
    run()
    print(json.dumps({"peak_mib": highest_resident_mib() - before}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the peak memory of one side of one case.")
    parser.add_argument("case", choices=CASES)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--evaluated", type=int, default=TTL.evaluated)
    given = parser.parse_args()
    _report_peak_memory(given.case, given.side, (TINY if given.tiny else TTL).evaluating(given.evaluated))
