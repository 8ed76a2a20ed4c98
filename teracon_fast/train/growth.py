"""A trained run on a catalogue that has grown: a new run folder with rows for the new items and labels; the old one stays.

Growing is a command of its own, not something that training does along the way, because it changes what the old results mean:
the larger data set has other rows, other test samples and more labels to rank among. In the new folder everything refers to the
larger data set: the weights after every task have the same new rows, R is measured again with them, and the log says so. From
there it is a run like any other: `teracon train` continues it, and resumes to the same bits.

A label that came by growth has an untrained row in the head of its (finished) task, so inference leaves it out, see
`folder.trained_labels`. The new rows of task 1 can be fitted to the network as it is: nothing else changes, so nothing is
forgotten.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
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
from teracon_fast.data import BatchSource, Dictionary, TaskSequence, check_tasks, epoch_batches, open_dataset
from teracon_fast.data.layout import read_about
from teracon_fast.data.order import NOISE
from teracon_fast.data.seeds import derived_seed
from teracon_fast.errors import ConfigError
from teracon_fast.files import atomic_write
from teracon_fast.methods import Method
from teracon_fast.methods.plugins import find_method
from teracon_fast.model.backbone import Backbone
from teracon_fast.train.checkpoint import RunState, load_task, read_task_header, save_task
from teracon_fast.train.evaluation import evaluate
from teracon_fast.train.folder import (
    fingerprint,
    keep_dictionaries,
    locked,
    resolved,
    trained_labels,
    training_data,
    write_trained_labels,
)
from teracon_fast.train.log import Observer, RunLog, Step
from teracon_fast.train.loop import DivergedError
from teracon_fast.train.results import Results, results_of
from teracon_fast.train.run import cost, task_split

if TYPE_CHECKING:
    from teracon_fast.data import TaskData


@dataclass(frozen=True)
class Growth:
    """What `grow` did.

    Attributes:
        items: numbers of items before and after, with the pad and buckets. labels: of labels of each task, by number from 1.
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
    """Make a run folder for a larger catalogue from a run that is between two tasks. `run` stays as it is.

    Args:
        run: run folder; all tasks that it has started are finished.
        data: prepared folder whose items, and labels of the finished tasks, extend those of the run: made with `--extend`. It
            may have further tasks; they are trained after those of the run.
        output: run folder to make; written whole or not at all.
        observer: told of the progress.
        epochs: passes of `fit_new_rows` over the training sequences of task 1; 0 leaves the new rows at their initial values.

    Raises:
        ConfigError: no such run, a method that cannot grow, a task in training, an id that has moved, another length or other
            tasks, `output` exists, or with epochs no training sequence holds a new item.
        DivergedError: a loss of the fit became NaN or infinite.
        CheckpointError, DataError: a file is missing or damaged.
    """
    run, output, observer = Path(run), Path(output), observer or Observer()
    if not (run / "config.toml").is_file():
        raise ConfigError(f"{run}: has no config.toml, expected a run folder of `teracon train`")
    if output.exists():
        raise ConfigError(f"{output}: exists already, expected a new folder")
    config = load_config(path=run / "config.toml")
    if reason := find_method(config.method).growth_refusal:
        raise ConfigError(f"{run}: a run of {config.method} cannot grow: {reason}")
    threads = torch.get_num_threads()
    with locked(run), _folder(output) as folder:
        state = RunState.load(run)
        if state is None:
            raise ConfigError(f"{run}: no task is finished yet")
        if state.training is not None or not state.tests:
            raise ConfigError(f"{run}: task {state.begun} is in training, expected a run between two tasks; finish it first")
        done, known = len(state.tests), trained_labels(run)
        raw = open_dataset(data)
        order = _grown_order(config, run, raw, done)
        config = resolved(config.model_copy(update={"data": raw.path, "run": output, **order}), state.fingerprint["exact"])
        dataset, numbers = training_data(config)
        labels = _require_extended(run, dataset, numbers[:done])
        if config.split_by == "sample":
            observer.on_message(
                f"{run} splits by sample: some test samples of the larger data may have been trained on, so tests after growth "
                "may be too good; a run that splits by user does not have this problem"
            )
        try:
            torch.set_num_threads(state.fingerprint["exact"]["threads"])
            growing = _Growing(run, config, dataset, numbers, labels)
            losses = growing.fit(epochs, known.get(1, labels[1][0]), observer) if epochs else []
            tests = growing.write(folder, observer)
        finally:
            torch.set_num_threads(threads)
        keep_dictionaries(dataset, numbers, folder, 0)
        growth = Growth(labels[1], labels, losses, results_of(dataset, tests))
        trained = {number: known.get(number, before) for number, (before, _) in labels.items() if number > 1 or not epochs}
        write_trained_labels(folder, {n: count for n, count in trained.items() if count < labels[n][1]})
        with atomic_write(folder / "config.toml", "w") as file:
            file.write(config.to_toml())
        growth.results.write(folder)
        costs = cost(growing.method(done), state.peak_mib)
        offset = _write_log(run, folder, state.log_offset, growth, tests, costs)
        now = fingerprint(config, dataset, numbers, done)
        RunState(now, done, None, tests, state.steps, offset, str(torch.__version__), state.peak_mib).save(folder)
    return growth


def _grown_order(config: RunConfig, run: Path, raw: TaskSequence, done: int) -> dict[str, Any]:
    """What changes in the configuration so that the finished tasks stay where they are, and further ones follow.

    Raises:
        ConfigError: the data set lacks a finished task, or has sequences of another length.
    """
    about = read_about(run)
    if raw.length != about.length:
        raise ConfigError(f"{raw.path}: got sequences of length {raw.length}, expected {about.length} as in {run}")
    order = config.task_order(len(about.tasks) - (config.noise_at is not None))
    names = {number: meta.name for number, meta in zip(order[:done], about.tasks, strict=False) if number != NOISE}
    got = {number: data.name for number, data in enumerate(raw.tasks, 1) if number in names}
    if got != names:
        found, expected = ([known[number] for number in sorted(known)] for known in (got, names))
        raise ConfigError(f"{raw.path}: got the tasks {found}, expected {expected} as in {run}")
    wanted = [number for number in order if number in range(1, len(raw.tasks) + 1)]
    wanted += [number for number in range(1, len(raw.tasks) + 1) if number not in wanted]
    text = "original" if wanted == sorted(wanted) else ",".join(map(str, wanted))
    return {"num_tasks": None, "order": text}


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


def _require_extended(run: Path, dataset: TaskSequence, order: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Numbers of labels of the finished tasks, by their number in the order of training: before and after.

    Args:
        dataset: in the order of training. order: numbers of the finished tasks in its folder.

    Raises:
        ConfigError: the data set does not extend that of the run.
    """
    labels = {}
    for task, (number, data) in enumerate(zip(order, dataset.tasks, strict=False), 1):
        if number == NOISE:
            labels[task] = data.num_labels, data.num_labels
            continue
        own, source = (f"task{index}/labels.parquet" if task > 1 else "items.parquet" for index in (task, number))
        expected = Dictionary.load(run / own).ids
        got = Dictionary.load(dataset.path / source).ids[: len(expected)]
        moved = np.flatnonzero(expected[: len(got)] != got)
        first = int(moved[0]) if len(moved) else len(got)
        if first < len(expected):
            what = "item" if task == 1 else f"label of task {task} ({data.name}),"
            found = repr(got[first]) if first < len(got) else "none"
            raise ConfigError(
                f"{dataset.path / source}: {what} with index {first} is {found}, expected {expected[first]!r} as in {run}: "
                f"indices of a trained model must not move; prepare the data with --extend {run}"
            )
        labels[task] = len(expected), data.num_labels
    return labels


class _Growing:
    """The method after each finished task, and the rows that it gets."""

    def __init__(
        self, run: Path, config: RunConfig, dataset: TaskSequence, order: Sequence[int], labels: Mapping[int, tuple[int, int]]
    ) -> None:
        self._run, self._config, self._dataset, self._order, self._labels = run, config, dataset, order, labels
        self._splits = [task_split(config, data) for data in dataset.tasks[: len(labels)]]
        check_tasks(dataset, self._splits)
        self._fitted: list[Tensor] = []

    def method(self, after: int) -> Method:
        """The grown method after a task (from 1): the same new rows after each."""
        config, done = self._config, len(self._labels)
        old = config.new_method(self._labels[1][0]).to(config.device)
        load_task(self._run, after, old)
        generator = torch.Generator().manual_seed(derived_seed(config.seed, done, "grown"))
        method = old.grown(self._dataset.num_items, [self._labels[task][1] for task in range(1, after + 1)], generator)
        method.configure(config.task_options(self._order[after - 1]))
        if self._fitted:
            for own, rows in zip(_rows_of_items(method), self._fitted, strict=True):
                own.data[len(own) - len(rows) :] = rows
        return method

    def fit(self, epochs: int, trained: int, observer: Observer) -> list[float]:
        """Fit the new rows of task 1 to the method after the last task; returns the mean loss of each epoch."""
        method, config, data = self.method(len(self._labels)), self._config.for_task(1), self._dataset.tasks[0]
        firsts, seed = (self._labels[1][0], trained, trained), derived_seed(self._config.seed, len(self._labels), "fit")
        losses = fit_new_rows(
            method, data, self._splits[0].train, *firsts[:2], epochs, config.lr, config.batch_size, seed, observer
        )
        self._fitted = [own.detach()[first:] for own, first in zip(_rows_of_items(method), firsts, strict=True)]
        return losses

    def write(self, folder: Path, observer: Observer) -> list[list[dict[str, float]]]:
        """Write the grown weights after each task; returns the test metrics of each with every task so far."""
        tests, batch_size = [], self._config.evaluate_batch_size
        for after in range(1, len(self._labels) + 1):
            method = self.method(after)
            save_task(folder, method, read_task_header(self._run, after).notes)
            encoders, row = method.encoders(range(after)), []
            for task, (data, split) in enumerate(zip(self._dataset.tasks[:after], self._splits, strict=False)):
                show = partial(observer.on_evaluate, task + 1, "test")
                row.append(evaluate(method, data, task, split.test, batch_size, show, encoders[task]))
            tests.append(row)
        return tests


def _rows_of_items(method: Method) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors that have a row for each item: embedding, weight and bias of task 1's head."""
    backbones = [module for module in method.modules() if isinstance(module, Backbone)]
    if len(backbones) != 1:
        raise ConfigError(f"{method.name}: got {len(backbones)} networks, expected one item embedding for all tasks")
    head = method.head(0)
    return backbones[0].embeding.weight, head.weight, head.bias


def fit_new_rows(
    method: Method, data: TaskData, samples: NDArray[np.int64], first_item: int, first_label: int, epochs: int, lr: float,
    batch_size: int, seed: int, observer: Observer,
) -> list[float]:  # fmt: skip
    """Train the rows of new items, and nothing else, with `Method.next_item_loss`; returns the mean loss of each epoch.

    Args:
        method: its rows `first_item`... of the item embedding and `first_label`... of task 1's head are trained, in place.
        data: task 1. samples: int64 `[n]`, those to train on: also the ones without a new item, which teach when none comes.
        epochs, lr, batch_size, seed: of Adam, and of the order of the samples.

    Raises:
        ConfigError: no sample holds a new item. DivergedError: a loss is not finite.
    """
    parts = (data.sequences[data.samples[samples[low : low + 65_536], 0]] for low in range(0, len(samples), 65_536))
    if not any((part >= min(first_item, first_label)).any() for part in parts):
        raise ConfigError(f"{data.path}: got no training sequence with a new item, expected some to fit their rows on")
    method.requires_grad_(False)
    tensors, firsts, losses = _rows_of_items(method), (first_item, first_label, first_label), []
    # The optimizer has only the new rows, which share the tensors' memory: no other row can move.
    rows = [Parameter(tensor.requires_grad_().data[first:]) for tensor, first in zip(tensors, firsts, strict=True)]
    optimizer, source = torch.optim.Adam(rows, lr=lr), BatchSource(data, method.device)
    for epoch in range(epochs):
        total, batches = 0.0, epoch_batches(samples, batch_size, seed, epoch)
        for number, batch in enumerate(batches):
            method.zero_grad()
            loss = method.next_item_loss(source.load(source.prepare(batch)))
            loss.backward()  # type: ignore[no-untyped-call]
            for own, tensor, first in zip(rows, tensors, firsts, strict=True):
                assert tensor.grad is not None
                own.grad = tensor.grad[first:]
            optimizer.step()
            value = loss.item()
            if not math.isfinite(value):
                raise DivergedError(f"fit of new rows, epoch {epoch + 1}, batch {number + 1}: the loss is {value}")
            total += value * len(batch)
            observer.on_step(Step(1, epoch, number, len(batches), len(batch), None))
        losses.append(total / len(samples))
        observer.on_message(f"new rows, epoch {epoch + 1}: loss {losses[-1]:.4f} over {len(samples):,} sequences")
    return losses


def _write_log(
    run: Path, folder: Path, offset: int, growth: Growth, tests: list[list[dict[str, float]]], cost: dict[str, Any]
) -> int:
    """The log of the run with the tests measured again, and what was done; returns its length in bytes."""
    with (run / "metrics.jsonl").open("rb") as reader, atomic_write(folder / "metrics.jsonl") as writer:
        for line in reader.read(offset).splitlines():
            event: dict[str, Any] = json.loads(line)
            if event["event"] == "task_end":
                event["test"] = {str(number): metrics for number, metrics in enumerate(tests[event["task"] - 1], 1)}
            if event["event"] != "run_end":
                writer.write((json.dumps(event) + "\n").encode())
    log = RunLog(folder, (folder / "metrics.jsonl").stat().st_size, tensorboard=False)
    about = {"run": run.resolve().name, "items": growth.items, "labels": growth.labels, "fit_losses": growth.losses}
    log.write("grown", len(tests), **about)
    log.write("run_end", len(tests), R=growth.results.R, bwt=growth.results.bwt, cost=cost)
    end = log.synced_offset()
    log.close()
    return end
