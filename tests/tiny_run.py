"""Small data sets, runs trained on them in seconds, and what tests of runs compare: weights, events, signals."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from teracon_fast.config import RunConfig, load_config
from teracon_fast.train.log import TIME_FIELDS, Observer, Step, TaskStart

LENGTH = 12
ITEMS = np.arange(101, 141)  # raw ids; index 1 is item 101
SMALL = {"channels": 8, "dilations": "1,2", "epochs": 2, "batch-size": 32, "lr": 0.01, "log-every": 1}
SETTINGS: dict[str, Any] = {
    "model.channels": 12, "model.dilations": [1, 2], "first.epochs": 3, "first.lr": 0.01, "later.epochs": 2,
    "later.lr": 0.01, "later.batch_size": 64, "log_every": 3, "evaluate_batch_size": 64, "threads": 1, "tensorboard": False,
}  # fmt: skip


def write_dataset(folder: Path, ages: tuple[str, str, str] = ("old", "young", "mid")) -> Path:
    """Three tasks: next item, an item to click (30 labels, which are items), an age group (3 labels)."""
    from teracon_fast.data import DatasetWriter

    random = np.random.default_rng(0)
    sequences = ITEMS[random.integers(0, len(ITEMS), (120, LENGTH))]
    sequences[: len(ITEMS), -1] = ITEMS  # every id occurs, so that the dictionary is known
    sequences[np.arange(LENGTH) < random.integers(0, LENGTH - 3, 120)[:, None]] = 0
    users = np.arange(120)
    with DatasetWriter(folder, name="tiny", length=LENGTH) as writer:
        writer.add_task("next", "next_item", sequences, groups=users)
        writer.add_task("click", "label", sequences, labels=ITEMS[users % 30], groups=users)
        writer.add_task("age", "label", sequences, labels=np.asarray(ages)[users % 3], groups=users)
    return folder


def arguments(data: Path, run: Path, *more: str) -> list[str]:
    """Arguments of `teracon train` for a run of two or three seconds."""
    flags = [part for name, value in SMALL.items() for part in (f"--{name}", str(value))]
    return ["train", "--data", str(data), "--run", str(run), "--no-tensorboard", "--no-report", *flags, *more]


def train_tiny(folder: Path) -> tuple[Path, Path]:
    """(prepared folder, run folder) under `folder`, trained."""
    from teracon_fast.train.run import train

    data = write_dataset(folder / "data")
    train(tiny_config(data, folder / "run", model__channels=8, first__epochs=2, later__batch_size=32, log_every=1))
    return data, folder / "run"


def tiny_config(data: Path, run: Path, **changes: Any) -> RunConfig:
    """SETTINGS with changes; `__` stands for the dot of a name."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return load_config(overrides={**SETTINGS, "data": str(data), "run": str(run), **changes})


def events(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Of metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["event"])]


def timeless(run: Path) -> list[dict[str, Any]]:
    """The events without what differs from run to run: times and memory."""
    found = [{name: value for name, value in event.items() if name not in TIME_FIELDS} for event in events(run)]
    for event in found:
        event.get("cost", {}).pop("peak_mib", None)
    return found


def weights(run: Path, task: int) -> dict[str, torch.Tensor]:
    """State of the method after a task (from 1)."""
    from teracon_fast.infer.open import open_run

    return open_run(run, after=task, device="cpu").method.state_dict()


def assert_same_run(one: Path, other: Path, tasks: int) -> None:
    """The same weights, results and events, bit for bit."""
    for task in range(1, tasks + 1):
        name = f"checkpoints/task{task}.safetensors"
        assert (one / name).read_bytes() == (other / name).read_bytes(), task
    assert timeless(one) == timeless(other)


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


class StopAt(Recorder):
    """Sends this process a signal in the middle of something."""

    def __init__(self, where: Callable[[str, int], bool], signum: int = signal.SIGTERM) -> None:
        super().__init__()
        self.where, self.signum = where, signum

    def on_step(self, step: Step) -> None:
        super().on_step(step)
        if self.where("step", len(self.steps)):
            signal.raise_signal(self.signum)

    def on_evaluate(self, task: int, split: str, done: int, total: int) -> None:
        super().on_evaluate(task, split, done, total)
        if self.where(split, len(self.evaluated)):
            signal.raise_signal(self.signum)
