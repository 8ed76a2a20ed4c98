"""The suite, `pytest bench/`: TERACON at the TTL shape, L=100, f=256, 8 blocks, tasks of 20,000 / 2,000 / 8 labels.

All sides of a case are measured when the first of them is asked for (`bench.harness`); a test then hands one side's times to
pytest-benchmark, which groups and prints them.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.conftest import Session
from bench.network import ON_CPU, on_cpu
from bench.shapes import TTL


class ReplayClock:
    """The clock that pytest-benchmark reads: between two readings passes the time of a turn."""

    def __init__(self) -> None:
        self.now, self.running = 0.0, False
        self.durations: list[float] = []

    def __call__(self) -> float:
        self.now += self.durations.pop(0) if self.running else 0.0
        self.running = not self.running
        return self.now


CLOCK = ReplayClock()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("side", ON_CPU)
@pytest.mark.parametrize("case", [case.name for case in on_cpu(TTL)])
@pytest.mark.benchmark(timer=CLOCK)
def bench(case: str, side: str, benchmark: Any, bench_session: Session) -> None:
    measured = bench_session.case(case)
    if side not in measured.sides:
        pytest.skip("evaluation is fp32")
    found = measured.sides[side]
    assert not found.failed, found.problem
    if found.problem is not None:
        pytest.skip(found.problem)
    benchmark.group, benchmark.name = measured.title, side
    CLOCK.durations, CLOCK.running = list(found.seconds), False
    benchmark.pedantic(int, rounds=len(found.seconds))
