"""Small runs, and what is in their folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from teracon_fast.config import RunConfig, load_config
from teracon_fast.train.log import TIME_FIELDS, Observer, Step, TaskStart

SETTINGS: dict[str, Any] = {
    "model.channels": 12, "model.dilations": [1, 2], "first.epochs": 3, "first.lr": 0.01, "later.epochs": 2,
    "later.lr": 0.01, "later.batch_size": 64, "log_every": 3, "evaluate_batch_size": 64, "threads": 1, "tensorboard": False,
}  # fmt: skip


def tiny_config(data: Path, run: Path, **changes: Any) -> RunConfig:
    """A configuration of seconds; `first__lr` stands for first.lr."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return load_config(overrides={**SETTINGS, "data": str(data), "run": str(run), **changes})


def events(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, all or those of one kind."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["event"])]


def lasting(run: Path) -> list[dict[str, Any]]:
    """The events without times and memory."""
    found = [{name: value for name, value in event.items() if name not in TIME_FIELDS} for event in events(run)]
    for event in found:
        event.get("cost", {}).pop("peak_mib", None)
    return found


def assert_same_run(one: Path, other: Path) -> None:
    """The same weights, results and events, byte by byte."""
    files = sorted(path.name for path in (other / "checkpoints").glob("*.safetensors"))
    assert sorted(path.name for path in (one / "checkpoints").glob("*.safetensors")) == files and files
    for name in (*(f"checkpoints/{file}" for file in files), "dataset.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    results = [folder / "results.json" for folder in (one, other)]
    assert [path.exists() and path.read_bytes() for path in results][0] == (results[1].exists() and results[1].read_bytes())
    assert lasting(one) == lasting(other)


class Recorder(Observer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.starts: list[TaskStart] = []
        self.steps: list[Step] = []
        self.valid: list[dict[str, Any]] = []
        self.ends: list[dict[str, Any]] = []
        self.evaluated: list[tuple[int, str, int, int]] = []
        self.messages: list[str] = []

    def on_task_start(self, start: TaskStart) -> None:
        self.starts.append(start)

    def on_step(self, step: Step) -> None:
        self.steps.append(step)

    def on_evaluate(self, task: int, split: str, done: int, total: int) -> None:
        self.evaluated.append((task, split, done, total))

    def on_valid(self, event: dict[str, Any]) -> None:
        self.valid.append(event)

    def on_task_end(self, event: dict[str, Any]) -> None:
        self.ends.append(event)

    def on_message(self, text: str) -> None:
        self.messages.append(text)
