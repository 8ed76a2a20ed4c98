"""examples/own_method.py: a method and a data set of one's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from teracon_fast.config import load_config
from teracon_fast.data import open_dataset
from teracon_fast.methods import METHODS
from teracon_fast.train.checkpoint import load_task
from teracon_fast.train.run import train

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_method.py"


def test_the_example_is_short_and_writes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(EXAMPLE.read_text("utf-8").splitlines()) < 60
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(EXAMPLE), str(tmp_path)], capture_output=True, text=True, env=environment)
    page = done.stdout
    assert page == (tmp_path / "table2.md").read_text("utf-8") + "\n", done.stderr
    lines = [line for line in page.splitlines() if line.startswith(("| SinMo |", "| FineAll |", "| head_only |"))]
    assert len(lines) == 3 * 3, "each in the table, in transfer and in cost"
    assert not any("–" in line for line in lines)
    data = open_dataset(tmp_path / "data")
    assert [task.num_labels for task in data.tasks] == [41, 40, 2]

    # The plugin registers its method here too: it is removed with the test.
    monkeypatch.setitem(METHODS, "head_only", METHODS["sinmo"])
    values = {
        "data": data.path, "run": tmp_path / "run", "plugins": [str(EXAMPLE)], "method": "head_only", "model.channels": 8,
        "model.dilations": [1, 2], "first.epochs": 6, "first.lr": 0.01, "later.epochs": 2, "tensorboard": False, "device": "cpu",
    }  # fmt: skip
    config = load_config(overrides=values)
    results = train(config)
    assert results.bwt == [0.0, 0.0, 0.0] and results.R[0][0] > 0.3
    states = []
    for task in (1, 3):
        method = config.new_method(data.num_items)
        load_task(config.run, task, method)
        states.append({name: value for name, value in method.state_dict().items() if name.startswith("backbone.")})
    assert states[0] and all(torch.equal(value, states[1][name]) for name, value in states[0].items()), "frozen after task 1"
