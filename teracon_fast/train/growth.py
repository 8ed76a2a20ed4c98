"""A trained run on a catalogue that has grown: a new run folder with rows for the new items and labels; the old one stays.

Growing is a step of its own, not something that training does on the way, because it changes what the old results mean: the
larger data set has other rows, other test samples and more labels to rank among. In the new folder everything is of the larger
data set: the weights after every task have the same new rows, R is measured again with them, and the log says so. What follows
is a run like any other: `teracon train` goes on with it, to the same bits after an interruption.

The teacher and the student of the next task begin from one file, so they have the same new rows. A label that came by growth
has an untrained row in the head of its (finished) task; retention holds its scores where the initial row puts them. So
inference leaves these labels out, see `runfolder.trained_labels`. Of task 1 the new rows can be fitted to the network as it
is: nothing but them changes, so that nothing is forgotten.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter

from teracon_fast.config import RunConfig, load_config
from teracon_fast.data import Dictionary, TaskSequence, check_tasks, epoch_batches, fetch, open_dataset
from teracon_fast.data.layout import read_about
from teracon_fast.data.seeds import derived_seed
from teracon_fast.errors import ConfigError
from teracon_fast.files import atomic_write
from teracon_fast.model.checkpoints import load_model, load_state, read_notes, save_model, save_state
from teracon_fast.model.fast_tcn import FastTCN
from teracon_fast.train.evaluation import evaluate
from teracon_fast.train.folder import (
    keep_dictionaries,
    locked,
    resolved,
    settings,
    trained_labels,
    write_trained_labels,
)
from teracon_fast.train.log import Observer, RunLog, Step
from teracon_fast.train.loop import DivergedError, to_device
from teracon_fast.train.results import Results, results_of
from teracon_fast.train.run import task_split

if TYPE_CHECKING:
    from teracon_fast.data import TaskData


@dataclass(frozen=True)
class Growth:
    """What `grow` did.

    Attributes:
        items: numbers of items before and after, the pad and buckets counted.
        labels: the same of the labels of each task, by its number from 1.
        losses: mean loss of each epoch in which the new rows of task 1 were fitted.
        results: R and BWT of the grown weights on the larger data set.
    """

    items: tuple[int, int]
    labels: dict[int, tuple[int, int]]
    losses: list[float]
    results: Results


def grow(
    run: str | Path, data: str | Path, output: str | Path, observer: Observer | None = None, epochs: int = 0
) -> Growth:
    """Make a run folder for a larger catalogue from a run that stands between two tasks. `run` stays as it is.

    Args:
        run: run folder; all of its begun tasks are finished.
        data: prepared folder of which the items, and the labels of the finished tasks, extend those of the run: made with
            `--extend`. It may have further tasks.
        output: run folder to make; written whole or not at all.
        observer: told of the progress.
        epochs: passes of `fit_new_rows` over the training sequences of task 1; 0 leaves the new rows at their initial values.

    Raises:
        ConfigError: no such run, a task in training, an id that has moved, another length or other tasks, `output` exists, or
            with epochs no training sequence holds a new item.
        DivergedError: a loss of the fit became NaN or infinite.
        CheckpointError, DataError: a file is missing or damaged.
    """
    run, output, observer = Path(run), Path(output), observer or Observer()
    if not (run / "config.toml").is_file():
        raise ConfigError(f"{run}: has no config.toml, expected a run folder that `teracon train` made")
    if output.exists():
        raise ConfigError(f"{output}: exists already, expected a new folder")
    dataset = open_dataset(data)
    threads = torch.get_num_threads()
    with locked(run), _folder(output) as folder:
        if not (run / "checkpoints" / "resume.pt").exists():
            raise ConfigError(f"{run}: no task is finished yet")
        state = load_state(run / "checkpoints" / "resume.pt")
        done = len(state["tests"])
        if state["position"] is not None:
            raise ConfigError(f"{run}: task {state['begun']} is in training, expected a run between two tasks: finish it first")
        labels, known = _require_extended(run, dataset, done), trained_labels(run)
        overrides = {"data": str(data), "run": str(output)}
        config = resolved(load_config(path=run / "config.toml", overrides=overrides), state["settings"])
        config = config.model_copy(update={"num_tasks": None})
        if config.split_by == "sample":
            observer.on_message(
                f"{run} splits by sample: some test samples of the larger data may have been trained on, so that the tests after "
                "growth are too good; a run with split_by = user has no such doubt"
            )
        try:
            torch.set_num_threads(state["settings"]["threads"])
            growing = _Growing(run, config, dataset, labels)
            losses = growing.fit(epochs, known.get(1, labels[1][0]), observer) if epochs else []
            tests = growing.write(folder, observer)
        finally:
            torch.set_num_threads(threads)
        keep_dictionaries(dataset, folder, 0)
        growth = Growth(labels[1], labels, losses, results_of(dataset, tests))
        trained = {number: known.get(number, before) for number, (before, _) in labels.items() if number > 1 or not epochs}
        write_trained_labels(folder, {n: count for n, count in trained.items() if count < labels[n][1]})
        with atomic_write(folder / "config.toml", "w") as file:
            file.write(config.to_toml())
        with atomic_write(folder / "results.json", "w") as file:
            file.write(json.dumps(dataclasses.asdict(growth.results), indent=2) + "\n")
        offset = _write_log(run, folder, state["log_offset"], growth, tests)
        save_state(folder / "checkpoints" / "resume.pt", {
            "settings": settings(config, dataset, done), "begun": done, "tests": tests, "steps": state["steps"],
            "log_offset": offset, "torch": str(torch.__version__), "position": None,
        })  # fmt: skip
    return growth


@contextmanager
def _folder(path: Path) -> Iterator[Path]:
    """A folder that gets its name when the context ends without an error, and is removed otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.parent / f".{path.name}.{os.getpid()}.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "checkpoints").mkdir(parents=True)
    try:
        yield folder
        os.replace(folder, path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _require_extended(run: Path, dataset: TaskSequence, done: int) -> dict[int, tuple[int, int]]:
    """Numbers of labels of the finished tasks, before and after.

    Raises:
        ConfigError: the data set does not extend that of the run.
    """
    about = read_about(run)
    if dataset.length != about.length:
        raise ConfigError(f"{dataset.path}: got sequences of length {dataset.length}, expected {about.length} as in {run}")
    got, expected = [data.name for data in dataset.tasks[:done]], [meta.name for meta in about.tasks[:done]]
    if got != expected:
        raise ConfigError(f"{dataset.path}: its first tasks are {got}, expected {expected} as in {run}")
    before = _require_prefix("item", run / "items.parquet", dataset.path / "items.parquet", run)
    labels = {1: (before, dataset.num_items)}
    for number, data in enumerate(dataset.tasks[1:done], 2):
        name = f"task{number}/labels.parquet"
        before = _require_prefix(f"label of task {number},", run / name, dataset.path / name, run)
        labels[number] = before, data.num_labels
    return labels


def _require_prefix(what: str, old: Path, new: Path, run: Path) -> int:
    """Number of ids of the dictionary `old`, all of which must have their indices in `new` too."""
    expected = Dictionary.load(old).ids
    got = Dictionary.load(new).ids[: len(expected)]
    moved = np.flatnonzero(expected[: len(got)] != got)
    first = int(moved[0]) if len(moved) else len(got)
    if first < len(expected):
        found = repr(got[first]) if first < len(got) else "none"
        raise ConfigError(
            f"{new}: {what} with index {first} is {found}, expected {expected[first]!r} as in {run}: indices of a trained "
            f"model must not move; prepare the data with --extend {run}"
        )
    return len(expected)


class _Growing:
    """The weights after each finished task, and the rows that they get."""

    def __init__(self, run: Path, config: RunConfig, dataset: TaskSequence, labels: dict[int, tuple[int, int]]) -> None:
        self._run, self._config, self._dataset, self._labels = run, config, dataset, labels
        self._splits = [task_split(config, data) for data in dataset.tasks[: len(labels)]]
        self._fitted: list[Tensor] | None = None
        check_tasks(dataset, self._splits)

    def model(self, after: int) -> FastTCN:
        """The grown model after a task (from 1). All of them have the same new rows."""
        config, done = self._config, len(self._labels)
        old = load_model(self._run / _weights(after), config.device, config.backend, config.algorithm)
        generator = torch.Generator().manual_seed(derived_seed(config.seed, done, "grown"))
        model = old.grown(self._dataset.num_items, [self._labels[task][1] for task in range(1, after + 1)], generator)
        for own, rows in zip(_rows_of_task_1(model), self._fitted or [], strict=False):
            own.data[len(own) - len(rows) :] = rows
        return model

    def fit(self, epochs: int, trained: int, observer: Observer) -> list[float]:
        """Fit the new rows of task 1 to the network after the last task; returns the mean loss of each epoch."""
        model, config, data = self.model(len(self._labels)), self._config.for_task(1), self._dataset.tasks[0]
        firsts, s = (self._labels[1][0], trained, trained), self._config.for_task(len(self._labels)).s_max
        losses = fit_new_rows(
            model, data, self._splits[0].train, firsts[0], firsts[1], epochs, config.lr, config.batch_size, s,
            derived_seed(self._config.seed, len(self._labels), "fit"), observer,
        )  # fmt: skip
        self._fitted = [own.detach()[first:] for own, first in zip(_rows_of_task_1(model), firsts, strict=True)]
        return losses

    def write(self, folder: Path, observer: Observer) -> list[list[dict[str, float]]]:
        """Write the grown weights after each task; returns the test metrics of each with every task so far."""
        tests, batch_size = [], self._config.evaluate_batch_size
        for after in range(1, len(self._labels) + 1):
            model, s = self.model(after), self._config.for_task(after).s_max
            save_model(model, folder / _weights(after), read_notes(self._run / _weights(after)))
            row = []
            for number, (data, split) in enumerate(zip(self._dataset.tasks[:after], self._splits, strict=False), 1):
                show = partial(observer.on_evaluate, number, "test")
                row.append(evaluate(model, data, number - 1, split.test, s, batch_size, show))
            tests.append(row)
        return tests


def _weights(after: int) -> str:
    return f"checkpoints/task{after}.safetensors"


def _rows_of_task_1(model: FastTCN) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors that have a row for each item: embedding, weight and bias of task 1's head."""
    head = model.head(0)
    return model.embeding.weight, head.weight, head.bias


def fit_new_rows(
    model: FastTCN, data: TaskData, samples: NDArray[np.int64], first_item: int, first_label: int, epochs: int, lr: float,
    batch_size: int, s: float, seed: int, observer: Observer,
) -> list[float]:  # fmt: skip
    """Train the rows of new items, and nothing else, with task 1's loss and mask at a fixed scale.

    Args:
        model: its rows `first_item`... of the item embedding and `first_label`... of task 1's head are trained, in place.
        data: task 1. samples: int64 `[n]`, those to train on: also the ones without a new item, which teach when none comes.
        epochs, lr, batch_size, seed: of Adam, and of the order of the samples.
        s: mask scale, that of inference.
        observer: told of every step.

    Returns:
        Mean loss of each epoch.

    Raises:
        ConfigError: no sample holds a new item. DivergedError: a loss is not finite.
    """
    parts = (data.sequences[data.samples[samples[low : low + 65_536], 0]] for low in range(0, len(samples), 65_536))
    if not any((part >= min(first_item, first_label)).any() for part in parts):
        raise ConfigError(f"{data.path}: got no training sequence with a new item, expected some to fit their rows on")
    model.requires_grad_(False)
    masks = model.masks(s)
    tensors, firsts, losses = _rows_of_task_1(model), (first_item, first_label, first_label), []
    # The optimiser has only the new rows, which share the tensors' memory: no other row can move.
    rows = [Parameter(tensor.requires_grad_().data[first:]) for tensor, first in zip(tensors, firsts, strict=True)]
    optimizer = torch.optim.Adam(rows, lr=lr)
    for epoch in range(epochs):
        total, batches = 0.0, epoch_batches(samples, batch_size, seed, epoch)
        for number, batch in enumerate(batches):
            x = to_device(fetch(data, batch)[0], model)
            model.zero_grad()
            loss = model.next_item_loss(x, s, masks)
            loss.backward()  # type: ignore[no-untyped-call]
            for own, tensor, first in zip(rows, tensors, firsts, strict=True):
                assert tensor.grad is not None
                own.grad = tensor.grad[first:]
            optimizer.step()
            value = loss.item()
            if not math.isfinite(value):
                raise DivergedError(f"fit of new rows, epoch {epoch}, batch {number}: the loss is {value}")
            total += value * len(batch)
            observer.on_step(Step(1, epoch, number, len(batches), len(batch), None))
        losses.append(total / len(samples))
        observer.on_message(f"new rows, epoch {epoch + 1}: loss {losses[-1]:.4f} over {len(samples):,} sequences")
    return losses


def _write_log(run: Path, folder: Path, offset: int, growth: Growth, tests: list[list[dict[str, float]]]) -> int:
    """The log of the run with the tests measured again, and what was done; returns its length in bytes."""
    with (run / "metrics.jsonl").open("rb") as reader, atomic_write(folder / "metrics.jsonl") as writer:
        for line in reader.read(offset).splitlines():
            event: dict[str, Any] = json.loads(line)
            if event["event"] == "task_end":
                event["test"] = {str(number): metrics for number, metrics in enumerate(tests[event["task"] - 1], 1)}
            if event["event"] != "run_end":
                writer.write((json.dumps(event) + "\n").encode())
    log = RunLog(folder, (folder / "metrics.jsonl").stat().st_size, tensorboard=False)
    log.write(
        "grown", len(tests), run=run.resolve().name, items=growth.items, labels=growth.labels, fit_losses=growth.losses
    )  # fmt: skip
    log.write("run_end", len(tests), R=growth.results.R, bwt=growth.results.bwt)
    end = log.synced_offset()
    log.close()
    return end
