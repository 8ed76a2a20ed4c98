"""The scaling script measures what it says, and its figures follow from the times."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from bench.cases import RHO, TINY, TTL, ContinualStep, Forward

from bench import measure, scaling

ROOT = Path(__file__).resolve().parent.parent


def test_quick_run_leaves_table_json_and_picture(tmp_path: Path) -> None:
    """Started as a script from another folder, as from the root."""
    command = [sys.executable, str(ROOT / "bench" / "scaling.py"), "--quick", "--rounds", "3"]
    done = subprocess.run(
        [*command, "--results", str(tmp_path / "kept")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    path, drawn = sorted((tmp_path / "kept").iterdir())
    assert drawn == path.with_suffix(".png") and path.name.endswith("-scaling.json")
    assert drawn.read_bytes().startswith(b"\x89PNG") and drawn.stat().st_size > 20_000
    run = json.loads(path.read_text())
    assert {"date", "machine", "versions", "backend", "shape", "rounds", "fma_peak_gflops"} <= set(run)
    assert run["kind"] == "scaling" and run["rounds"] == 3 and run["date"][:4] == path.name[:4]
    sizes = {(curve["variable"], curve["call"]): [p["at"] for p in curve["points"]] for curve in run["curves"]}
    step, forward = "training step of task 3", "forward, last position"
    assert sizes == {
        **{("length", call): [6, 12, 20, 40] for call in (forward, step)},
        **{("batch", call): [6, 12, 24, 48] for call in (forward, step)},
        ("past", "training step of the next task"): list(range(1, 9)),
    }
    for curve in run["curves"]:
        base = next(point for point in curve["points"] if point["at"] == curve["base"])
        for point in curve["points"]:
            assert len(point["seconds"]) == 3 and point["median_seconds"] == sorted(point["seconds"])[1] > 0
            operations, seconds = point["useful_gflop"], point["median_seconds"]
            cost = (seconds / operations) / (base["median_seconds"] / base["useful_gflop"])
            assert point["time_per_operation_times_base"] == pytest.approx(cost)
            assert f"| {seconds * 1e3:,.4g} |" in done.stdout
    assert done.stdout.count("### ") == done.stdout.count("The time of a useful operation is ") == 5


def test_full_run_has_the_sizes_that_were_asked_for() -> None:
    sizes = {(curve.variable, curve.points[0].case.name): curve for curve in scaling.curves(TTL)}
    for name in (Forward.name, ContinualStep.name):
        assert [point.at for point in sizes["length", name].points] == [30, 60, 100, 200]
        assert [point.at for point in sizes["batch", name].points] == [64, 128, 256, 512]
        assert [point.case.shape.length for point in sizes["length", name].points] == [30, 60, 100, 200]
        assert [point.case.shape.batch for point in sizes["batch", name].points] == [64, 128, 256, 512]
    past = sizes["past", ContinualStep.name]
    assert [scaling._drawn(point) for point in past.points] == [int(RHO * 256) * n for n in range(1, 9)]
    bases = {curve.points[curve.base].operations for key, curve in sizes.items() if key[1] == ContinualStep.name}
    assert past.points[1].operations in bases, "with two past tasks it is the suite's own case"
    assert past.points[1].operations == ContinualStep(TTL).operations()


def test_steps_with_any_number_of_past_tasks_are_those_of_the_reference() -> None:
    for past in (1, 4):
        case = ContinualStep(TINY, past)
        assert case.shape.task_labels(past + 1) == [60, 30, 8, 8, 8][: past + 1]
        measure.check(case, {side: case.side(side)() for side in ("eager", "torch", "ours")})


def curve_of(times: list[float], operations: list[float], base: int = 0, variable: str = "past") -> scaling.Curve:
    case = ContinualStep(TINY)
    points = [
        scaling.Point(at, case, replace(case.operations(), useful=useful), [99.0, taken, 0.0])
        for at, (taken, useful) in enumerate(zip(times, operations, strict=True), 1)
    ]
    return scaling.Curve(variable, "a step", points, base)


def test_figures_follow_from_the_medians() -> None:
    linear = curve_of([1.0, 2.0, 4.0], [3e9, 6e9, 12e9], base=1)
    assert linear.time == linear.useful == [0.5, 1, 2] and linear.cost == [1, 1, 1]
    assert linear.exponent == pytest.approx(1)
    square = curve_of([1.0, 4.0, 16.0], [3e9, 6e9, 12e9])
    assert square.cost == [1, 2, 4] and square.exponent == pytest.approx(2)
    line = curve_of([1.0, 1.2, 1.4], [10e9, 11e9, 12e9])
    assert scaling.added(line) == pytest.approx((0.1, 0.2))
    said = scaling.statement(line)
    assert "1.00 to 1.17 of that at 1;" in said and "adds 10.0% of the base's useful operations and 20.0%" in said
    assert "| 2 | 2 | 11 | 1,200 |" in "\n".join(scaling.table(line))


def test_points_take_turns() -> None:
    order: list[int] = []

    class Recorded(Forward):
        def side(self, side: str) -> measure.Run:
            assert side == "ours"
            run, batch = super().side(side), self.shape.batch

            def noted() -> measure.torch.Tensor:
                order.append(batch)
                return run()

            return noted

    points = [scaling._point(size, Recorded(replace(TINY, batch=size))) for size in (2, 3, 4)]
    scaling.measure(scaling.Curve("batch", "forward", points, 0), rounds=3)
    assert order == [2, 3, 4, *(2, 3, 4), *(3, 4, 2), *(4, 2, 3)], "one call each that is not timed, then rounds"
    assert [len(point.seconds) for point in points] == [3, 3, 3]


def test_bad_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        scaling.main(["--quick", "--rounds", "0"])
    assert "--rounds: got 0, expected at least 1" in capsys.readouterr().err
