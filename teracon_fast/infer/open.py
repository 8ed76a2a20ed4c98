"""Opens a run folder for inference, whatever method trained it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from teracon_fast.config import RunConfig, load_config
from teracon_fast.data import Dictionary
from teracon_fast.data.layout import read_about
from teracon_fast.errors import ConfigError
from teracon_fast.methods import Method
from teracon_fast.train.checkpoint import load_task, read_task_header
from teracon_fast.train.folder import resolved_device, trained_labels


@dataclass(frozen=True)
class TrainedTask:
    """A task that a method has learned.

    Attributes:
        number: in the order of training, from 1.
        name, kind: as in the data set.
        labels: its label dictionary; the items for a next_item task.
        trained: how many labels, the first ones, are trained: in a grown run, not those that came by growth.
    """

    number: int
    name: str
    kind: str
    labels: Dictionary
    trained: int

    def __str__(self) -> str:
        return f"task {self.number} ({self.name})"


@dataclass(frozen=True)
class TrainedRun:
    """A run opened for inference.

    Attributes:
        path: run folder. config: its configuration.
        method: as the newest finished task left it, or the one asked for; on its device, in eval mode, without gradients.
        length: L, items per sequence.
        items: item dictionary.
        tasks: those that the method has learned, in the order of training.
        order: their numbers in the prepared folder, from 1; NOISE for the noisy one.
    """

    path: Path
    config: RunConfig
    method: Method
    length: int
    items: Dictionary
    tasks: list[TrainedTask]
    order: tuple[int, ...]

    def task(self, which: int | str) -> TrainedTask:
        """A task by its name, or its number from 1.

        Raises:
            ConfigError: the method has not learned it.
        """
        return self.tasks[task_number([task.name for task in self.tasks], which, self.path) - 1]


def task_number(names: Sequence[str], which: int | str, where: str | Path) -> int:
    """Number, from 1, of a task that a person gave by name or by number. `where` begins the message of the error.

    Raises:
        ConfigError: none of the named tasks.
    """
    text = str(which).strip()
    if text.isdecimal() and 1 <= int(text) <= len(names):
        return int(text)
    if text in names:
        return names.index(text) + 1
    known = ", ".join(f"{number} ({name})" for number, name in enumerate(names, 1))
    raise ConfigError(f"{where}: got task {text!r}, expected one of {known}")


def open_run(
    run: str | Path, after: int | str | None = None, device: str = "auto", backend: str | None = None,
    threads: int | None = None,
) -> TrainedRun:  # fmt: skip
    """Open a run folder for inference.

    Args:
        after: open the method as this task left it, by name or by number from 1; None: the newest finished one.
        device: "auto", "cpu", "cuda", "cuda:N". backend: None: as in the run's configuration.
        threads: CPU threads; None leaves PyTorch's choice.

    Raises:
        ConfigError: no such run, task, device or backend, a plugin of the run is missing, or a dictionary is not that of the
            weights. CheckpointError, DataError: a file is missing or damaged.
    """
    run = Path(run)
    if not (run / "config.toml").is_file():
        raise ConfigError(f"{run}: has no config.toml, expected a run folder of `teracon train`")
    config = load_config(path=run / "config.toml", overrides={"device": device, "backend": backend})
    checkpoints = (re.fullmatch(r"task(\d+)\.safetensors", path.name) for path in (run / "checkpoints").glob("task*"))
    done = max((int(found[1]) for found in checkpoints if found), default=0)  # a task's is written when it ends
    if not done:
        raise ConfigError(f"{run}: no task is finished yet")
    about = read_about(run)
    number = done if after is None else task_number([meta.name for meta in about.tasks[:done]], after, f"{run}, finished tasks")
    order = config.task_order(len(about.tasks) - (config.noise_at is not None))[:number]
    trained, sizes, tasks = trained_labels(run), read_task_header(run, number).labels, list[TrainedTask]()
    for task, (meta, size) in enumerate(zip(about.tasks, sizes, strict=False), 1):
        name = "items.parquet" if meta.kind == "next_item" else f"task{task}/labels.parquet"
        labels = Dictionary.load(run / name)
        if len(labels) != size:
            raise ConfigError(f"{run / name}: has {len(labels)} ids, expected {size} as in the run's weights")
        tasks.append(TrainedTask(task, meta.name, meta.kind, labels, trained.get(task, size)))
    if threads is not None:
        torch.set_num_threads(threads)
    items = tasks[0].labels
    method = config.new_method(len(items)).to(resolved_device(config))
    load_task(run, number, method)
    method.configure(config.task_options(order[-1]))
    return TrainedRun(run, config, method.requires_grad_(False).eval(), about.length, items, tasks, order)
