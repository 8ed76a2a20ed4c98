"""The script that times steps of methods compares the same steps, and its figures follow from the times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bench.cases import TINY
from bench.measure import DifferentAnswers

from bench import methods
from teracon_fast.methods import METHODS


def test_quick_run_leaves_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods.main(["--quick", "--rounds", "3", "--results", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    run, said = json.loads(path.read_text()), capsys.readouterr().out
    assert path.name.endswith("-methods.json") and run["kind"] == "methods" and run["rounds"] == 3
    assert {"date", "machine", "versions", "shape", "fma_peak_gflops"} <= set(run)
    assert {case["method"] for case in run["cases"]} >= set(methods.BAR)
    for case in run["cases"]:
        ours, eager = sorted(case["seconds"]["ours"])[1], sorted(case["seconds"]["eager"])[1]
        assert case["times_eager"] == pytest.approx(eager / ours)
        assert 0 < case["useful_gflop"] < case["dense_gflop"]
        name = " ".join([case["method"], *case["settings"].values()])
        assert f"| {name} | {case['task']} | {eager * 1e3:,.0f} ms | {ours * 1e3:,.0f} ms | " in said
    below = {(case["method"], case["task"]) for case in run["cases"] if case["times_eager"] < 3 and case["method"] in methods.BAR}
    assert all(f"{method} " in said.split("below it: ")[1] for method, _ in below)


def test_every_method_with_the_ordinary_loss_is_measured() -> None:
    assert {case.method for case in methods.CASES} == set(METHODS) - {"teracon", "parameter_masks"}
    assert {case.task for case in methods.CASES} == {0, 1}


@pytest.mark.parametrize("name", ["sinmo", "conure"])
def test_a_method_that_computes_something_else_is_not_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = methods.dense_loss
    monkeypatch.setattr(methods, "dense_loss", lambda *arguments: 1.01 * plain(*arguments))
    with pytest.raises(DifferentAnswers, match=f"{name}, task 2: the loss is"):
        methods.measure(methods.Case(name, 1), TINY, 1)


def test_both_sides_train_the_same_parameters_from_the_same_weights() -> None:
    for case in methods.CASES:
        ours, eager = methods.sides(case, TINY)
        torch.manual_seed(0)
        first = [(float(ours()), float(eager())) for _ in range(3)]
        for one, other in first:
            assert one == pytest.approx(other, rel=1e-3), case
        assert first[0][0] > first[-1][0], f"{case}: a step does not train"


def test_patches_cost_two_passes_of_frozen_convolutions() -> None:
    whole = methods.operations(methods.Case("sinmo", 1), TINY)
    frozen = methods.operations(methods.Case("peterrec", 1), TINY)
    head = TINY.network.head(TINY.batch, TINY.labels[1]) * 3
    assert frozen.useful - head.useful == pytest.approx((whole.useful - head.useful) * 2 / 3)
    first = methods.operations(methods.Case("sinmo", 0), TINY)
    assert methods.operations(methods.Case("mtl", 1), TINY).useful == first.useful + whole.useful


def test_bad_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        methods.main(["--quick", "--rounds", "0"])
    assert "--rounds: got 0, expected at least 1" in capsys.readouterr().err
