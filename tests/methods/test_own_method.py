"""examples/own_method.py: a method and a data set of one's own."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

from teracon_fast.data import open_dataset
from teracon_fast.methods import METHODS, Sizes
from teracon_fast.methods.sequence import Settings, learn_sequence

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "own_method.py"


def test_the_example_is_short_and_writes_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(EXAMPLE.read_text("utf-8").splitlines()) < 60
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(tmp_path)])
    for name in list(METHODS):
        monkeypatch.setitem(METHODS, name, METHODS[name])  # what the example adds is taken out again
    monkeypatch.delitem(METHODS, "head_only", raising=False)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    page = capsys.readouterr().out
    assert page == (tmp_path / "table2.md").read_text("utf-8") + "\n"
    lines = [line for line in page.splitlines() if line.startswith(("| SinMo |", "| FineAll |", "| head_only |"))]
    assert len(lines) == 3 * 3, "each in the table, in transfer and in cost"

    data = open_dataset(tmp_path / "data")
    assert [task.num_labels for task in data.tasks] == [41, 40, 2]
    method = METHODS["head_only"](Sizes(data.num_items, channels=8, dilations=(1, 2)))
    states = []
    learnt = learn_sequence(
        method, data, lambda task: Settings(lr=0.01, batch_size=32, epochs=6),
        observe=lambda task, epoch: states.append({k: v.clone() for k, v in method.backbone.state_dict().items()}),
    )  # fmt: skip
    assert learnt.results.bwt == [0.0, 0.0, 0.0] and learnt.results.R[0][0] > 0.3
    first = len(learnt.epochs[0])
    assert any(not torch.equal(states[0][name], states[first - 1][name]) for name in states[0])
    assert all(torch.equal(states[first][name], states[-1][name]) for name in states[0]), "after task 0 it stays"
    METHODS.pop("head_only")
