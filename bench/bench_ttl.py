"""The TTL shape: L=100, f=256, 8 blocks, tasks of 20,000 / 2,000 / 8 labels, the authors' sequence lengths.

All sides of a case are measured in turns when the first of them is asked for (`bench.measure`); a test then hands one
side's times to pytest-benchmark, which groups and prints them.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.cases import CASES, SIDES
from bench.conftest import Session


class ReplayClock:
    """The clock that pytest-benchmark reads: between the two readings of a round passes what that call had taken."""

    def __init__(self) -> None:
        self.now = 0.0
        self.durations: list[float] = []
        self.running = False

    def __call__(self) -> float:
        if self.running:
            self.now += self.durations.pop(0)
        self.running = not self.running
        return self.now


CLOCK = ReplayClock()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.benchmark(timer=CLOCK)
def bench(case: str, side: str, benchmark: Any, bench_session: Session) -> None:
    measured = bench_session.case(case)
    times = measured.sides[side]
    if times.problem is not None:
        pytest.skip(times.problem)
    benchmark.group = measured.title
    benchmark.name = side
    benchmark.extra_info["times_eager"] = measured.ratio(side)
    benchmark.extra_info["users_per_second"] = measured.users / times.median
    CLOCK.durations, CLOCK.running = list(times.seconds), False
    benchmark.pedantic(int, rounds=len(times.seconds))
