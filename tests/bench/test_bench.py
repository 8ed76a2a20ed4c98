"""The bench suite works, counts operations rightly, and refuses to compare things that differ."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bench.bench_ttl import ReplayClock
from bench.cases import CASES, SIDES, TINY, TTL, ContinualStep, Forward
from bench.operations import Operations

from bench import measure, report
from teracon_fast.ops import native
from teracon_fast.packing import Streams

ROOT = Path(__file__).resolve().parent.parent


def test_whole_suite_on_tiny_shapes(tmp_path: Path) -> None:
    """All sides of all cases agree, are timed, tabulated, and kept with machine, versions and date."""
    command = [sys.executable, "-m", "pytest", "bench", "--quick", "--rounds", "1", "-p", "no:cacheprovider"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--results", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(CASES) * len(SIDES) - 2} passed, 2 skipped" in done.stdout  # evaluation is fp32
    run = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert set(run["cases"]) == set(CASES)
    for name, case in run["cases"].items():
        for side in SIDES:
            measured = case["sides"][side]
            if name == "evaluate" and side.endswith("bf16"):
                assert measured["problem"] == "evaluation is fp32"
                continue
            assert measured["median_seconds"] > 0 and len(measured["seconds"]) == 1
            assert measured["users_per_second"] == pytest.approx(case["users"] / measured["median_seconds"])
            assert measured["useful_gflops"] == pytest.approx(case["useful_gflop"] / measured["median_seconds"])
        assert case["sides"]["eager"]["times_eager"] == 1
        assert (case["fma_peak_gflops"] is not None) == native.available()
    assert {"cpu", "cores", "threads", "system"} <= set(run["machine"])
    assert run["versions"]["torch"] == torch.__version__ and run["date"].startswith("20")
    closing = done.stdout[done.stdout.index("ours beside the eager reference") :]
    for column in report.COLUMNS:
        assert column in closing


def reachable_outputs(lengths: np.ndarray, length: int) -> int:
    """Convolution outputs that the last positions depend on, by marking them one by one; pad states once for all users."""
    needed: set[tuple[int, int, int]] = set()  # (convolution, user or -1 for a pad state, position)
    for user, real in enumerate(lengths):
        layer = {length - 1}
        for depth, dilation in reversed(list(enumerate(d * k for d in TINY.dilations for k in (1, 2)))):
            # The residual connection reads its block's input at the same position, so the set only grows.
            needed |= {(depth, user if position >= length - real else -1, position) for position in layer}
            layer |= {position - tap * dilation for position in layer for tap in range(TINY.kernel_size)}
            layer = {position for position in layer if position >= 0}
    return len(needed)


def test_useful_operations_are_those_that_marking_every_needed_output_finds() -> None:
    network, lengths = TINY.network, TINY.lengths(TINY.batch)
    packed = network.pack(lengths, TINY.length, [Streams(np.arange(TINY.batch))])
    counted = network.encoder(packed, TINY.batch * TINY.length)
    per_output = 2 * TINY.kernel_size * TINY.channels**2
    # The packer keeps a user's own copy of a pad state where no chain holds it: never fewer than needed, and hardly more.
    exact = reachable_outputs(lengths, TINY.length)
    assert exact <= counted.useful / per_output <= 1.02 * exact
    assert counted.dense == per_output * TINY.batch * TINY.length * 2 * len(TINY.dilations)


def test_training_costs_three_passes_of_the_student_and_one_of_the_teacher() -> None:
    case = ContinualStep(TINY)
    head = 2 * TINY.channels
    positions = TINY.batch * TINY.length + case.past_users * (2 * TINY.length - 1)
    per_position = 2 * TINY.kernel_size * TINY.channels**2 * 2 * len(TINY.dilations)
    past_heads = case.past_users * (TINY.labels[0] + TINY.labels[1]) * head
    student = positions * per_position + past_heads + TINY.batch * TINY.labels[2] * head
    teacher = case.past_users * (2 * TINY.length - 1) * per_position + past_heads
    assert case.operations().dense == 3 * student + teacher


def test_the_ttl_shape_is_the_published_one() -> None:
    assert (TTL.length, TTL.channels, len(TTL.dilations), TTL.labels, TTL.batch, TTL.first_batch) == (
        *(100, 256, 8, (20_000, 2_000, 8), 256, 32),
    )  # fmt: skip
    lengths = (TTL.items(20) != 0).sum(1).tolist()
    assert lengths == [46, 12, 100, 43, 100, 27, 100, 100, 37, 62, 26, 90, 30, 21, 45, 13, 13, 49, 20, 14]
    # What the project's design counts for these lengths and this cone.
    operations = Forward(TTL).operations()
    assert 2.9 < operations.dense / operations.useful < 3.4


class Wrong(Forward):
    """A case whose fast side computes something else."""

    def side(self, side: str) -> measure.Run:
        run = super().side(side)
        return (lambda: run() + 1.0) if side == "ours" else run


def test_sides_that_compute_different_things_are_not_compared() -> None:
    with pytest.raises(measure.DifferentAnswers, match="ours computes"):
        measure.measure(Wrong(TINY), rounds=1, memory=False)


class NoCompiler(Forward):
    """A case on a machine where torch.compile cannot work."""

    def side(self, side: str) -> measure.Run:
        if side == "compile":
            raise RuntimeError("no C++ compiler\nand a long story")
        return super().side(side)


def test_without_a_compiler_the_other_sides_are_measured_and_the_reason_shown() -> None:
    measured = measure.measure(NoCompiler(TINY), rounds=2, memory=False)
    assert measured.sides["compile"].problem == "RuntimeError: no C++ compiler"
    assert [len(measured.sides[side].seconds) for side in SIDES] == [0 if side == "compile" else 2 for side in SIDES]
    assert measured.ratio("compile") is None
    assert any("no C++ compiler" in line for line in report.table([measured]))


def test_table_and_ratio_come_from_the_medians() -> None:
    sides = {"eager": measure.Side([4.0, 1.0, 3.0]), "compile": measure.Side(problem="none"), "ours": measure.Side([1.5])}
    case = measure.Measured("forward", "a title", 6, Operations(3e9, 9e9), sides, peak_gflops=100.0)
    assert case.ratio("ours") == 2.0
    row = next(line for line in report.table([case]) if line.split()[:1] == ["ours"])
    assert row.split() == ["ours", "1,500.0", "ms", "2.00", "4", "2", "2.0%", "6"]


def test_peak_memory_holds_at_least_the_weights() -> None:
    """A process of its own: embedding, three heads and sixteen convolutions of the TTL shape take 55 MiB."""
    peak = measure.peak_memory(Forward(TTL), "ours")
    weights = sum(p.numel() * p.element_size() for p in Forward(TTL).fast(3, "ours").parameters()) / 2**20
    assert weights < peak < 2000


def test_replay_clock_gives_back_the_durations() -> None:
    clock = ReplayClock()
    clock.durations = [2.0, 0.5]
    readings = [clock() for _ in range(4)]
    assert [readings[1] - readings[0], readings[3] - readings[2]] == [2.0, 0.5]
    assert readings[2] == readings[1]
