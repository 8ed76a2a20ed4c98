"""Metrics and layout of tables from hand-made results: nothing is trained."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from teracon_fast.data import split_task
from teracon_fast.data.order import NOISE
from teracon_fast.reproduce import Choices, Found, Plan, RunResult, make_plan, read_run, write_pages
from teracon_fast.reproduce.frequency import frequency_grid
from teracon_fast.reproduce.grids import Column, Entry, Grid, Line, csv_text
from teracon_fast.reproduce.paper import LEAST_SHARE, Paper, paper_of
from teracon_fast.reproduce.plan import _digest
from teracon_fast.reproduce.plots import mean_curve
from teracon_fast.reproduce.tables import cost_grid, main_grids, matrix_grids, transfer_grid, value
from teracon_fast.train.checkpoint import RunState
from teracon_fast.train.metrics import forgetting, gem_backward_transfer, result_matrix

NAN = math.nan
R = [[0.5], [0.4, 0.2], [0.45, 0.3, 0.8]]
TTL = Paper("ttl", "TTL", 4)


def result(rows: list[list[float]], curves: dict[int, list[float]] | None = None) -> RunResult:
    count = len(rows)
    return RunResult(["mrr@5"] * count, rows, [2] * count, [8.0] * count, 1000, 0.5, 100.0, "cpu", curves or {})


def found(
    plan: Plan, rows: list[list[float]], single: list[list[float]] | None = None, plain: list[list[float]] | None = None
) -> list[Found]:  # fmt: skip
    return [
        Found(
            row, tuple(result(rows) for _ in row.runs), tuple(None if single is None else result(single) for _ in row.single),
            tuple(None if plain is None else result(plain) for _ in row.plain),
        )
        for row in plan.rows
    ]  # fmt: skip


def test_backward_transfer_and_forgetting_of_other_literature() -> None:
    matrix = result_matrix(R)
    assert gem_backward_transfer(matrix) == pytest.approx([0.45 - 0.5, 0.3 - 0.2])
    assert forgetting(matrix) == pytest.approx([0.5 - 0.45, 0.2 - 0.3])
    higher = result_matrix([[0.2], [0.6, 0.1], [0.3, 0.1, 0.5]])
    assert forgetting(higher)[0] == pytest.approx(0.3), "the best of all earlier, not of the diagonal"
    assert gem_backward_transfer(result_matrix([[1.0]])).size == forgetting(result_matrix([[1.0]])).size == 0


def test_bwt_fwt_and_metric_of_an_order(choices: Callable[..., Choices]) -> None:
    """Tasks in the order 1, 3, 2: SinMo's figures are found by the number of the task."""
    plan = make_plan("table3", choices(methods=("hat",)))
    single = [[0.4], [0.4, 0.1], [0.4, 0.1, 0.5]]
    original, backwards = found(plan, R, single)
    assert backwards.order == (1, 3, 2)
    assert [value(original, 0, i, "metric") for i in range(3)] == R[-1]
    assert [value(original, 0, i, "bwt") for i in range(3)] == pytest.approx([-10, 50, 0])
    assert [value(original, 0, i, "fwt") for i in range(3)] == pytest.approx([NAN, 100, 60], nan_ok=True)
    assert [value(backwards, 0, i, "fwt") for i in range(3)] == pytest.approx([NAN, 100 * (0.2 - 0.5) / 0.5, 700], nan_ok=True)
    assert value(original, 0, 1, "seconds") == 4.0 and math.isnan(value(original, 0, 0, "seconds"))
    transfer = transfer_grid(plan, [original]).lines[0].entries
    means = [entry.mean for (entry,) in transfer]
    assert means == pytest.approx([20, 80, 0.025, -0.025])
    costs = [entry.mean for (entry,) in cost_grid(plan, [original]).lines[0].entries]
    assert costs == [1000, 0.5, 6, 24, 4, 100]


def test_change_by_a_noisy_task_and_means_without_it(choices: Callable[..., Choices]) -> None:
    plan = make_plan("table4", choices(methods=("hat",), noise_at=2))
    noisy = [[0.5], [0.4, 0.02], [0.3, 0.01, 0.2], [0.45, 0.0, 0.15, 0.8]]
    (row,) = found(plan, noisy, plain=R)
    assert row.order == (1, NOISE, 2, 3)
    changes = [value(row, 0, i, "change") for i in range(4)]
    assert changes == pytest.approx([0, NAN, -50, 0], nan_ok=True)
    assert math.isnan(value(row, 0, 1, "metric"))
    gem = transfer_grid(plan, [row]).lines[0].entries[2][0].mean
    assert gem == pytest.approx((-0.05 - 0.05) / 2), "the noisy task does not count"
    (grid,) = main_grids(plan, [row])
    heading, lines = grid.rows()
    assert heading == ["method", "T1 next MRR@5 (change)", "T' noise", "T2 task 2 MRR@5 (change)", "T3 task 3 accuracy (change)"]
    assert lines == [["HAT", "0.4500 (+0.00 %)", "–", "0.1500 (-50.00 %)", "0.8000 (+0.00 %)"]]


def test_mean_and_spread_over_seeds() -> None:
    entry = Entry((1.0, 2.0, NAN), "+.2f %")
    assert entry.mean == 1.5 and entry.spread == pytest.approx(math.sqrt(0.5)) and entry.text() == "+1.50 ± 0.71 %"
    assert Entry((1.0,), ".4f").text() == "1.0000" and math.isnan(Entry((1.0,)).spread)
    assert Entry((NAN,)).text() == "–" and Entry((), "+.2f %").text() == "–"
    assert Entry((0.0,), ".2f", paper=0.25).paper_text() == "0.25"
    assert Entry((-0.001,), "+.2f %").text() == "+0.00 %", "no minus before a zero"
    assert Entry((-0.006,), "+.2f %").text() == "-0.01 %"


def test_layout_of_markdown_and_csv() -> None:
    entries = ((Entry((0.1, 0.3), ".2f", 0.4), Entry((5.0, NAN), "+.1f %", -1.0)), (Entry((NAN, NAN)), Entry((NAN, NAN))))
    columns = (Column("T1 (BWT)", ("T1", "T1 BWT")), Column("T2 | x", ("T2", "T2 BWT")))
    grid = Grid("Title", "method", columns, (Line("A", entries),))
    assert grid.markdown() == (
        "## Title\n\n| method | T1 (BWT) | T2 \\| x |\n| --- | ---: | ---: |\n"
        "| A | 0.20 ± 0.14 (+5.0 %) | – |\n| A, paper | 0.40 (-1.0 %) | – |"
    )
    heading, row = csv.reader(csv_text(grid).splitlines())
    names = ["T1", "T1 BWT", "T2", "T2 BWT"]
    assert heading == ["method", "seeds", *(part for name in names for part in (name, f"{name} spread", f"{name} paper"))]
    assert next(csv.reader(csv_text(grid, paper=False).splitlines()))[2:] == [
        part for name in names for part in (name, f"{name} spread")
    ]  # fmt: skip
    turned, lines = grid.upright()
    assert turned == ["method", "A", "A, paper"] and lines[0] == ["T1 (BWT)", "0.20 ± 0.14 (+5.0 %)", "0.40 (-1.0 %)"]
    assert row[:2] == ["A", "2"] and float(row[2]) == 0.2 and row[4:8] == ["0.4", "5.0", "", "-1.0"] and row[8:] == [""] * 6


def test_table_3_has_a_table_for_each_order_and_columns_for_each_quantity(choices: Callable[..., Choices]) -> None:
    plan = make_plan("table3", choices(methods=("hat", "conure")))
    assert {run.method for run in plan.runs} == {"sinmo", "hat", "conure"} and len(plan.runs) == 5
    rows = found(plan, R, R)
    first, second = main_grids(plan, rows)
    assert first.title.endswith("(original)") and second.title.endswith("(reversed)")
    assert first.rows()[0][1:4] == ["T1 next MRR@5", "T1 next BWT", "T1 next FWT"]
    assert second.rows()[0][4] == "T3 task 3 accuracy"
    line = ["HAT (original)", "0.4500", "-10.00 %", "–", "0.3000", "+50.00 %", "+0.00 %", "0.8000", "–", "+0.00 %"]
    assert first.rows()[1][0] == line
    matrix = matrix_grids(plan, rows[:1])[0].rows()[1]
    assert matrix[1] == ["after T2 task 2", "0.4000", "0.2000", "–"]
    files = write_pages(plan, rows)
    assert [file.name for file in files] == [
        "table3.md", "table3_original.csv", "table3_reversed.csv", "table3_frequency.csv", "table3_transfer.csv",
        "table3_cost.csv", "table3_R.csv",
    ]  # fmt: skip
    named = main_grids(make_plan("table3", choices(methods=("hat",), order="1,3,2")), rows[2:3])
    assert named[0].rows()[1][0][0] == "HAT (reversed)"


def test_no_figure_of_the_paper_beside_another_data_set(choices: Callable[..., Choices]) -> None:
    plan = make_plan("table2", choices(methods=("sinmo", "mtl")))
    assert plan.paper is None
    text = write_pages(plan, found(plan, R))[0].read_text("utf-8")
    assert "not one of the paper's data sets" in text and ", paper |" not in text
    assert "| MTL | – | 0.3000 | 0.8000 |" in text, "as in the paper, the pairs have no figure for T1"


def test_the_papers_figures_stand_beside_its_data_set(choices: Callable[..., Choices]) -> None:
    plan = make_plan("table2", choices(methods=("sinmo", "mtl", "parameter_masks")))
    plan = replace(plan, paper=Paper("ml", "ML", None))
    heading, lines = main_grids(plan, found(plan, R))[0].rows()
    assert lines[1] == ["SinMo, paper", "0.0566", "0.0186", "0.0314"] and lines[3] == ["MTL, paper", "–", "0.0144", "0.0267"]
    assert len(lines) == 5, "the paper has no such row"
    other = replace(make_plan("table2", choices(methods=("sinmo",), order="reversed")), paper=plan.paper)
    assert len(main_grids(other, found(other, R))[0].rows()[1]) == 1, "Table 2 is of the original order"
    noisy = replace(make_plan("table2", choices(methods=("sinmo",), noise_at=2)), paper=plan.paper)
    assert len(main_grids(noisy, found(noisy, [*R, [0.1] * 4]))[0].rows()[1]) == 1, "Table 2 is without noise"


def test_a_run_folder_is_read(tmp_path: Path) -> None:
    """Made up: an interrupted and resumed run of two tasks."""
    view = {"method": "hat"}
    run = tmp_path / f"hat-1.2-seed0-{_digest(view)}"
    (run / "checkpoints").mkdir(parents=True)
    cost = {"parameters": 7, "kept_mib": 0.5, "peak_mib": 99.0, "device": "cpu", "more": 1}
    events = [
        {"event": "step", "task": 1, "loss": 1.0},
        {"event": "valid", "task": 1, "metrics": {"mrr@5": 0.9}},
        {"event": "task_end", "task": 1, "epochs": 1, "seconds": 2.5, "test": {}},
        {"event": "valid", "task": 2, "metrics": {}, "test": {"accuracy": 0.25, "hit@1": 0.0}},
        {"event": "valid", "task": 2, "metrics": {}, "test": {"accuracy": 0.75, "hit@1": 0.0}},
        {"event": "task_end", "task": 2, "epochs": 2, "seconds": 5.0, "test": {}},
        {"event": "run_end", "task": 2, "cost": cost},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    RunState({"result": view, "exact": {"device": "cuda"}}, begun=2).save(run)
    assert read_run(run) is None, "no results yet"
    metrics, matrix = ["mrr@5", "accuracy"], [[0.5], [0.5, 0.75]]
    (run / "results.json").write_text(json.dumps({"metric": metrics, "tasks": ["a", "b"], "R": matrix}))
    assert read_run(run) == RunResult(metrics, matrix, [1, 2], [2.5, 5.0], 7, 0.5, 99.0, "cpu", {1: [0.25, 0.75]})
    RunState({"result": view, "exact": {}}, begun=2, training={"state": {}}).save(run)
    assert read_run(run) is None, "the last task is still in training"


def test_what_the_paper_prints() -> None:
    order, back = (1, 2, 3, 4, 5, 6), (1, 6, 5, 4, 3, 2)
    assert TTL.value("table2", "teracon", "", order, "metric", 2) == 0.0189
    assert TTL.value("table3", "hat", "original", order, "bwt", 1) == -11.30
    assert TTL.value("table3", "conure", "reversed", back, "metric", 2) == 0.0119, "by number, not by position"
    assert TTL.value("table3", "teracon", "reversed", back, "fwt", 6) == 20.38
    assert TTL.value("table4", "conure", "", order, "change", 6) == -14.55
    assert TTL.value("table5", "teracon", "positive_only", order, "bwt", 3) == 0.69
    assert TTL.value("table6", "teracon", "all", order, "seconds", 5) == 1355.18
    assert TTL.value("table6", "teracon", "all", back, "seconds", 2) == 1673.55, "Table 9"
    for method, unknown, quantity in (("own", order, "metric"), ("hat", back, "metric"), ("hat", order, "bwt")):
        assert math.isnan(TTL.value("table2", method, "", unknown, quantity, 1))


def test_the_papers_changes_follow_from_its_metrics() -> None:
    """What was copied is what its own arithmetic gives, to the rounding of the printed figures."""
    order = (1, 2, 3, 4, 5, 6)
    for key in ("ttl", "naver"):
        paper = Paper(key, "", None)
        for method in ("hat", "conure", "teracon"):
            for task in order:
                before, now = (paper.value(f"table{n}", method, "", order, "metric", task) for n in (2, 4))
                printed = paper.value("table4", method, "", order, "change", task)
                # The metric is printed in steps of 1e-4.
                assert printed == pytest.approx(100 * (now - before) / before, abs=0.02 + 1.1e-2 / before), (key, method, task)


def test_a_data_set_is_the_papers_by_name_tasks_and_size(choices: Callable[..., Choices]) -> None:
    data = make_plan("table2", choices(methods=("sinmo",))).dataset
    users = int(np.ceil(162_541 * LEAST_SHARE))
    large = replace(data.tasks[0], groups=np.arange(users))
    same = replace(data, name="movielens", tasks=[large, *data.tasks[1:]])
    assert paper_of(same) == Paper("ml", "ML", None)
    others = [replace(same, name="shop"), replace(same, tasks=same.tasks[:2])]
    # One fewer; MovieLens 20M, 32M and 1M; 25M itself is the paper's.
    for count in (users - 1, 138_493, 200_948, 6040):
        others.append(replace(same, tasks=[replace(large, groups=np.arange(count)), *data.tasks[1:]]))
    assert [paper_of(other) for other in others] == [None] * 6
    whole = replace(large, groups=np.arange(162_541))
    assert paper_of(replace(same, tasks=[whole, *data.tasks[1:]])) == Paper("ml", "ML", None)


def test_pages_name_settings_and_all_that_figures_are_computed_from(choices: Callable[..., Choices]) -> None:
    plan = make_plan("table3", choices(methods=("hat", "conure"), preset="ml", quick=False))
    single = [[0.4], [0.4, 0.1], [0.4, 0.1, 0.5]]
    rows = found(plan, R, single)
    page = write_pages(plan, rows)[0].read_text("utf-8")
    assert "- T2: learning rate 0.0001, 1024 samples a step, at most 100 epochs, patience 5, best weights by hit@1" in page
    assert "- T3: learning rate 0.0005" in page and "- CONURE (reversed): pruning = (0.7, 0.7, 0.8), block = post-norm" in page
    assert "SinMo, against which FWT is measured\n" in page and "| SinMo | 0.4000 | 0.1000 | 0.5000 |" in page
    values = list(csv.DictReader((Path(plan.output) / "table3_R.csv").read_text("utf-8").splitlines()))
    assert len(values) == 5 * 6
    (one,) = [row for row in values if (row["method"], row["after"][:2], row["task"][:2]) == ("HAT (reversed)", "T3", "T1")]
    assert (float(one["R"]), one["seed"], one["metric"]) == (0.4, "0", "MRR@5")
    assert {row["method"] for row in values} >= {"SinMo"}


def test_a_curve_that_has_ended_keeps_its_last_value() -> None:
    mean, spread = mean_curve([[1.0, 2.0, 3.0], [3.0]])
    assert mean.tolist() == [2.0, 2.5, 3.0] and spread[2] == 0 and spread[0] == pytest.approx(math.sqrt(2))
    assert mean_curve([[1.0]])[1].tolist() == [0.0]


@pytest.mark.parametrize(("name", "titles"), [("figure2", ["T3 task 3"]), ("figure3", ["T2 task 2", "T3 task 3"])])
def test_figures(name: str, titles: list[str], choices: Callable[..., Choices]) -> None:
    plan = make_plan(name, choices(methods=("hat", "teracon"), seeds=(0, 1)))
    curves = {1: [0.1, 0.2], 2: [0.2, 0.5, 0.3], 0: [0.1]}
    rows = [Found(row, (result(R, curves), result(R, {**curves, 2: [0.4]})), (), ()) for row in plan.rows]
    files = {file.suffix: file for file in write_pages(plan, rows, "svg")}
    assert files[".svg"].name == f"{name}.svg" and "<svg" in files[".svg"].read_text("utf-8")
    page = next(file for file in files.values() if file.suffix == ".md").read_text("utf-8")
    assert f"![{name}]({name}.svg)" in page
    points = list(csv.DictReader((Path(plan.output) / f"{name}.csv").read_text("utf-8").splitlines()))
    assert list(dict.fromkeys(point["task"] for point in points)) == titles
    last = [point for point in points if point["task"] == "T3 task 3" and point["method"] == "HAT"]
    assert [float(point["mean"]) for point in last] == pytest.approx([0.3, 0.45, 0.35]) and last[0]["seeds"] == "2"
    assert "| HAT |" in page and "0.4500 ± 0.0707" in page, "best of each seed: 0.5 and 0.4"


def test_ranking_by_frequency(choices: Callable[..., Choices]) -> None:
    """By hand: labels of the training samples counted, the test targets' places among them."""
    plan = make_plan("table2", choices(seeds=(0, 1)))
    (line,) = frequency_grid(plan).lines
    assert len(line.entries) == len(plan.dataset.tasks)
    for data, (entry,) in zip(plan.dataset.tasks, line.entries, strict=True):
        assert len(entry.values) == 2
        for seed, got in enumerate(entry.values):
            split = split_task(data, plan.config.split_by, seed)
            train, test = data.samples[split.train, 1].tolist(), data.samples[split.test, 1].tolist()
            ranked = sorted(range(data.num_labels), key=lambda label: (-train.count(label), label))
            places = [ranked.index(label) for label in test]
            cutoff = 5 if data.num_labels > 20 else 1  # MRR@1 is the accuracy
            assert got == pytest.approx(sum(1 / (place + 1) for place in places if place < cutoff) / len(places))
