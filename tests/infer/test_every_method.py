"""Runs of every method, trained from the command line, and every command on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet
from tiny_data import write_tiny
from tiny_run import tiny_config
from typer.testing import CliRunner

from teracon_fast.cli.app import app
from teracon_fast.config import load_config
from teracon_fast.data import open_dataset
from teracon_fast.errors import ConfigError
from teracon_fast.infer.measure import measure
from teracon_fast.infer.open import open_run
from teracon_fast.methods import METHODS, Method
from teracon_fast.train.checkpoint import load_task
from teracon_fast.train.run import train

NINE = ("sinmo", "fine_all", "peterrec", "mtl", "piggyback", "hat", "conure", "teracon", "parameter_masks")
QUICK = {"channels": 8, "dilations": "1,2", "first-epochs": 2, "later-epochs": 1, "batch-size": 32, "lr": 0.01, "threads": 1}
TASKS = 6


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("data") / "tiny", tasks=TASKS, rows=80, items=20).path


@pytest.fixture(scope="module", params=NINE)
def run(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six tasks."""
    run, flags = tmp_path_factory.mktemp(request.param) / "run", [part for name in QUICK for part in (f"--{name}", QUICK[name])]
    shown = invoke("train", "--method", request.param, "--data", data, "--run", run, *flags, "--no-tensorboard", "--no-report")
    assert "T6 of 6: task 6" in shown
    return run


def read_back(run: Path, task: int) -> Method:
    """The method after a task, by hand."""
    config = load_config(path=run / "config.toml")
    method = config.new_method(open_dataset(config.data).num_items)
    load_task(run, task, method)
    method.configure(config.task_options(task))
    return method


def states(path: Path, task: int) -> np.ndarray:
    return np.asarray(parquet.read_table(path)[f"task_{task}"].to_pylist(), dtype=np.float32)


def test_nine_methods() -> None:
    assert set(NINE) <= set(METHODS)


def test_report_and_evaluate(run: Path) -> None:
    shown = invoke("report", run, "--no-plots")
    assert "T6 task 6" in shown and load_config(path=run / "config.toml").method in shown
    final = json.loads((run / "results.json").read_text())["final"]
    shown = invoke("evaluate", run, "--device", "cpu", "--batch-size", "1024")
    assert "test metrics after task 6 (task 6)" in shown
    for number, metrics in final.items():
        line = next(line for line in shown.splitlines() if f"T{number} " in line)
        assert all(f"{value:.4f}" in line for value in metrics.values()), line
    opened = open_run(run, device="cpu")
    assert {str(number): metrics for number, metrics in measure(opened).items()} == final


def test_embed_predict_recommend(run: Path, data: Path, tmp_path: Path) -> None:
    x = torch.from_numpy(np.array(open_dataset(data).tasks[1].sequences)).long()
    output = tmp_path / "out.parquet"
    shared = (run, "-i", data, "-o", output, "--input-task", "task 2", "--batch-size", 32)
    for after in (TASKS, 2):
        method = read_back(run, after)
        invoke("embed", *shared, "--after", f"task {after}")
        assert parquet.read_table(output).column_names == ["row", "group", *(f"task_{task}" for task in range(1, after + 1))]
        for task in range(after):
            np.testing.assert_allclose(states(output, task + 1), method.encoder(task)(x).numpy(), rtol=1e-5, atol=1e-6)
    method = read_back(run, TASKS)
    with torch.no_grad():
        scores = {task: method.head(task)(method.encoder(task)(x)) for task in (2, 3)}
    invoke("predict", *shared, "--task", "task 3")
    table = parquet.read_table(output)
    got = np.stack([table[f"p_{label}"].to_numpy() for label in range(4)], 1)
    np.testing.assert_allclose(got, torch.softmax(scores[2], 1).numpy(), rtol=1e-4)
    invoke("recommend", *shared, "--task", 4, "--top-k", 3)
    best = scores[3].topk(3)
    ids = open_dataset(data).tasks[3].label_ids()
    assert parquet.read_table(output)["items"].to_pylist() == ids[best.indices.numpy()].tolist()
    np.testing.assert_allclose(parquet.read_table(output)["scores"].to_pylist(), best.values.numpy(), rtol=1e-4, atol=1e-5)


def test_another_order_with_noise(data: Path, tmp_path: Path) -> None:
    """Tasks go by their names and by their place in the order; the noisy one is made again for its metrics."""
    train(tiny_config(data, tmp_path / "run", method="hat", order="1,3,2,4,6,5", noise_at=3, num_tasks=4, first__epochs=1))
    run = open_run(tmp_path / "run", device="cpu")
    assert [str(task) for task in run.tasks] == ["task 1 (next)", "task 2 (task 3)", "task 3 (noise)", "task 4 (task 2)"]
    final = json.loads((tmp_path / "run" / "results.json").read_text())["final"]
    assert {str(number): metrics for number, metrics in measure(run).items()} == final
    assert measure(run, data, unseen="pad") == measure(run)
    shown = invoke("evaluate", tmp_path / "run", "--after", "noise")
    assert "after task 3 (noise)" in shown and "T2 task 3" in shown and "T4" not in shown
    assert "T4 task 2" in invoke("report", tmp_path / "run", "--no-plots")
    output = tmp_path / "out.parquet"
    invoke("predict", tmp_path / "run", "-i", data, "-o", output, "--task", "noise")
    assert "p_noise 50" in parquet.read_table(output).column_names
    invoke("recommend", tmp_path / "run", "-i", data, "-o", output, "--task", "task 2", "-k", 2)
    x = torch.from_numpy(np.array(open_dataset(data).tasks[0].sequences)).long()
    with torch.no_grad():
        best = run.method.head(3)(run.method.encode(x, 3)).topk(2).indices.numpy()
    ids = open_dataset(data).tasks[1].label_ids()
    assert parquet.read_table(output)["items"].to_pylist() == ids[best].tolist()
    fewer = write_tiny(tmp_path / "fewer", tasks=2, rows=80, items=20)
    with pytest.raises(ConfigError, match="got 2 tasks, expected the 3 of"):
        measure(run, fewer.path)


def test_options_of_the_opened_task_count(data: Path, tmp_path: Path) -> None:
    """Mask scales that differ between tasks: R is that of the scale each task was trained with."""
    scales = {"first__s_max": 7, "task__2__s_max": 20, "task__3__s_max": 30}
    results = train(tiny_config(data, tmp_path / "run", order="1,3,2,4,5,6", num_tasks=3, first__epochs=1, **scales))
    for after, scale in ((1, 7.0), (2, 30.0), (3, 20.0)):
        run = open_run(tmp_path / "run", after, "cpu")
        assert run.method.s_max == scale
        assert [metrics[results.metric[number - 1]] for number, metrics in measure(run).items()] == results.R[after - 1]


PLUGIN = '''
from teracon_fast.methods import METHODS, Method, group

class HeadOnly(Method):
    name = "head_only"

    def _start(self, task):
        if task == 0:
            self.backbone = self.new_backbone()

    def _groups(self, phase):
        return [group(self.head(self.task), *([self.backbone] if self.task == 0 else []))]

    def loss(self, batch, context):
        return self.task_loss(self.task, self.backbone, batch, context)

    def encoder(self, task):
        return self.backbone.encoder()

METHODS["head_only"] = HeadOnly
'''


def test_a_plugin_is_found_from_anywhere(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {"plugins": ["own.py"], "method": "head_only", "num_tasks": 2, "first__epochs": 1}
    train(tiny_config(data, tmp_path / "run", **values))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    try:
        final = json.loads((tmp_path / "run" / "results.json").read_text())["final"]
        assert {str(n): metrics for n, metrics in measure(open_run(tmp_path / "run", device="cpu")).items()} == final
        settings = tmp_path / "run" / "config.toml"
        settings.write_text(settings.read_text().replace("own.py", "moved.py"))
        with pytest.raises(ConfigError, match=r"config\.toml: plugin: got .*moved\.py, expected a Python file"):
            open_run(tmp_path / "run")
    finally:
        METHODS.pop("head_only", None)
