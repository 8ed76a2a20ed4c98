"""A sequence of tasks, learnt by any method: training with validation and patience, the matrix R, going on after a stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teracon_fast import ops
from teracon_fast.data import (
    Batch,
    BatchSource,
    Split,
    TaskData,
    TaskSequence,
    check_tasks,
    epoch_batches,
    prefetch,
    split_task,
)
from teracon_fast.errors import CheckpointError, ConfigError
from teracon_fast.methods.base import Method, Place
from teracon_fast.model.checkpoints import load_state, save_state
from teracon_fast.train.checkpoint import Keeper, Unfinished, require_same
from teracon_fast.train.evaluation import check_task, ranks_of
from teracon_fast.train.folder import RunStopped
from teracon_fast.train.loop import Losses, Position, StepRecord, StepResult, make_optimizer
from teracon_fast.train.metrics import selection_value, task_metrics
from teracon_fast.train.results import Results, derived_seed, results_of


@dataclass(frozen=True)
class Settings:
    """How one task is learnt. The defaults are those of later tasks in the published program; see `published`.

    Attributes:
        lr: of Adam, for parameter groups that have none of their own.
        batch_size: samples per step.
        epochs: of each phase, at most.
        patience: validations without a better one, after which a phase ends.
        select: the metric by which the best weights are chosen, see `metrics.selection_value`.
        companion_batch_size: samples of each companion task in a step; None: as many as `batch_size`.
        evaluate_batch_size: sequences encoded at a time.
    """

    lr: float = 1e-4
    batch_size: int = 1024
    epochs: int = 100
    patience: int = 5
    select: str = "hit@1"
    companion_batch_size: int | None = None
    evaluate_batch_size: int = 1024

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "patience", "evaluate_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.companion_batch_size is not None and self.companion_batch_size < 1:
            raise ConfigError(f"companion_batch_size is {self.companion_batch_size}, expected at least 1")
        if not self.lr > 0:
            raise ConfigError(f"lr is {self.lr}, expected more than 0")

    @staticmethod
    def published(task: int) -> Settings:
        """Those of the published program for a task, counted from 0: the first has small batches, a high rate, 10 epochs."""
        return Settings(lr=1e-3, batch_size=32, epochs=10) if task == 0 else Settings()


@dataclass(frozen=True)
class Epoch:
    """One epoch of a phase: mean loss over its samples, validation metrics, whether they are the best so far."""

    phase: str
    epoch: int
    loss: float
    valid: dict[str, float]
    best: bool
    seconds: float


def evaluate_method(
    method: Method, data: TaskData, task: int, samples: NDArray[np.int64], batch_size: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Metrics of a task over the given samples, as `evaluation.evaluate`."""
    head = method.head(task)
    check_task(head.out_features, data, task, samples)
    ranks = ranks_of(method.encode, head, data, task, samples, batch_size, progress, method.sizes.backend)
    return task_metrics(ranks, data.num_labels)


def learn_task(
    method: Method,
    dataset: TaskSequence,
    splits: Sequence[Split],
    task: int,
    settings: Settings,
    seed: int = 0,
    observe: Callable[[int, Epoch], None] | None = None,
    keeper: Keeper | None = None,
) -> list[Epoch]:
    """Start a task and train it through all phases; the best weights of each are kept.

    Args:
        method: has learnt the tasks before.
        dataset: the tasks.
        splits: of each task, at least up to this one.
        task: counted from 0.
        settings: of this task.
        seed: of initial weights and the order of samples.
        observe: called with (task, what an epoch came to) after each.
        keeper: of the file by which a stopped task goes on; None: nothing is kept.

    Returns:
        The epochs of all phases.

    Raises:
        DivergedError: a loss became NaN or infinite. RunStopped: by the keeper's `poll`; all is saved.
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, task + 1, "initial weights"))
    method.start(task, dataset.tasks[task].num_labels, generator)
    found = None if keeper is None else keeper.load(task)
    epochs = [] if found is None else [Epoch(**epoch) for epoch in found.epochs]
    phases = list(method.phases())
    for phase in phases[phases.index(found.phase) if found else 0 :]:
        part = _Phase(method, dataset, splits, task, settings, seed, phase, epochs, keeper)
        part.train(found, observe)
        found = None
        method.end_phase(phase)
    return epochs


@dataclass(frozen=True)
class Learnt:
    """What a sequence came to.

    Attributes:
        results: R, BWT and the rest.
        tests: test metrics of each task so far, after each task.
        epochs: of each task.
    """

    results: Results
    tests: list[list[dict[str, float]]]
    epochs: list[list[Epoch]]


def learn_sequence(
    method: Method,
    dataset: TaskSequence,
    settings: Callable[[int], Settings] = Settings.published,
    seed: int = 0,
    split_by: Literal["sample", "user"] = "sample",
    num_tasks: int | None = None,
    folder: str | Path | None = None,
    observe: Callable[[int, Epoch], None] | None = None,
    save_seconds: float = 120.0,
    poll: Callable[[], None] | None = None,
) -> Learnt:
    """Learn tasks one after the other, and test every task so far after each.

    With a folder, what a finished task left is written to `FOLDER/sequence.pt`, and from time to time what the task in training
    needs to `FOLDER/task.pt`, each whole or not at all. A sequence that was stopped goes on from there, to the same bits. The
    file of a finished sequence is read, and nothing is trained; with more tasks, those are.

    Args:
        method: has started no task; its device is where it trains.
        dataset: the tasks.
        settings: of each task, counted from 0.
        seed: of splits, initial weights and orders of samples.
        split_by: see `data.split_task`.
        num_tasks: only the first so many; None: all.
        folder: created where it is missing; None: nothing is kept.
        observe: called with (task, what an epoch came to) after each epoch; again with an epoch that ended after the last save.
        save_seconds: between two writes of the task in training.
        poll: called after every step; where it raises RunStopped, all is saved first.

    Raises:
        ConfigError: a task has been started already, the tasks are not the next item first and then labels, or the folder is
            that of another sequence. CheckpointError: its file is damaged. DivergedError: a loss became NaN or infinite.
            RunStopped: by `poll`.
    """
    count = len(dataset.tasks) if num_tasks is None else num_tasks
    if not 1 <= count <= len(dataset.tasks):
        raise ConfigError(f"num_tasks is {num_tasks}, expected 1 to {len(dataset.tasks)}, as the data set has")
    if method.task != -1:
        raise ConfigError(f"{method.name} has started task {method.task} already, expected a method before its first task")
    tasks = dataset.tasks[:count]
    splits = [split_task(data, split_by, seed) for data in tasks]
    check_tasks(dataset, splits)
    plans = [_plan(method, dataset, settings(number), number, seed, split_by) for number in range(count)]
    file = None if folder is None else Path(folder) / "sequence.pt"
    keeper = None
    if file is not None:
        keeper = Keeper(file.with_name("task.pt"), plans, save_seconds, poll or (lambda: None))
    tests: list[list[dict[str, float]]] = []
    epochs: list[list[Epoch]] = []
    if file is not None and file.exists():
        tests, epochs = _go_on(method, file, plans)
    for task in range(len(tests), count):
        epochs.append(learn_task(method, dataset, splits, task, settings(task), seed, observe, keeper))
        size = settings(task).evaluate_batch_size
        tests.append([evaluate_method(method, tasks[i], i, splits[i].test, size) for i in range(task + 1)])
        if file is not None:
            save_state(file, {
                "plans": plans[: task + 1], "labels": method.labels, "tests": tests, "state": method.state_dict(),
                "epochs": [[asdict(epoch) for epoch in of_task] for of_task in epochs],
            })  # fmt: skip
        if keeper is not None:
            keeper.forget()
    return Learnt(results_of(dataset, tests), tests, epochs)


def _plan(
    method: Method, dataset: TaskSequence, settings: Settings, task: int, seed: int, split_by: str
) -> dict[str, Any]:
    """All that decides what a task comes to, given those before it; how fast it is computed is not part of that."""
    data, apart = dataset.tasks[task], ("backend", "algorithm")
    return {
        "method": {name: value for name, value in method.settings().items() if name not in apart},
        "task": {"name": data.name, "labels": data.num_labels, "samples": len(data.samples)},
        "data": {"name": dataset.name, "num_items": dataset.num_items, "length": dataset.length},
        "settings": {name: value for name, value in asdict(settings).items() if name != "evaluate_batch_size"},
        "seed": seed,
        "split_by": split_by,
    }


def _go_on(
    method: Method, file: Path, plans: Sequence[dict[str, Any]]
) -> tuple[list[list[dict[str, float]]], list[list[Epoch]]]:
    """Bring the method to where the file left it; returns tests and epochs of the finished tasks."""
    saved = load_state(file)
    if len(saved["plans"]) > len(plans):
        raise ConfigError(f"{file}: {len(saved['plans'])} tasks are finished, expected at most the {len(plans)} wanted")
    require_same(file, saved["plans"], plans)
    try:
        method.restore(saved["labels"], saved["state"])
    except RuntimeError as error:
        raise CheckpointError(f"{file}: the state does not fit {method.name}: {error}") from None
    return saved["tests"], [[Epoch(**epoch) for epoch in of_task] for of_task in saved["epochs"]]


class _Phase:
    """A phase of a task in training.

    Args:
        epochs: of the task so far; those of the phase are added.
        keeper: None: nothing is kept.
        The others: as `learn_task`.
    """

    def __init__(
        self, method: Method, dataset: TaskSequence, splits: Sequence[Split], task: int, settings: Settings, seed: int,
        phase: str, epochs: list[Epoch], keeper: Keeper | None,
    ) -> None:  # fmt: skip
        self.method, self.task, self.settings, self.phase = method, task, settings, phase
        self.dataset, self.splits, self.seed = dataset, splits, seed
        self.data, self.split = dataset.tasks[task], splits[task]
        self.epochs, self.keeper = epochs, keeper
        self.at, self.best, self.losses = Position(), dict[str, Tensor](), Losses(task + 1)

    def train(self, found: Unfinished | None, observe: Callable[[int, Epoch], None] | None) -> None:
        """Train it to its end, from its beginning or from where it was found; afterwards the method has its best weights."""
        self.began = time.monotonic()
        if found is None:
            self.optimizer = self._new_optimizer()
        else:
            assert self.keeper is not None
            try:
                self.optimizer = found.begin(self.method, self._new_optimizer)
            except (KeyError, RuntimeError, ValueError) as error:
                raise CheckpointError(f"{self.keeper.file}: does not fit {self.method.name}: {error}") from None
            self.at, self.best = found.position, found.best
        others = {other: self._stream(other) for other in self.method.companions()}
        source = BatchSource(self.data, self.method.device)
        try:
            while self.at.epoch < self.settings.epochs and self.at.stale < self.settings.patience:
                self._steps(source, others)
                epoch = self._validated()
                self.epochs.append(epoch)
                if observe is not None:
                    observe(self.task, epoch)
                self._keep()
        except RunStopped as stopped:
            if self.keeper is None:
                raise
            self._save()
            where = f" in task {self.task + 1}, {self.phase}, epoch {self.at.epoch + 1}"
            raise RunStopped(stopped.signum, where) from None
        finally:
            for stream in others.values():
                stream.close()
        self.method.load_state_dict(self.best, strict=False)

    def _stream(self, other: int) -> Generator[Batch, None, None]:
        """Batches of a companion task, from the next step's on."""
        size = self.settings.companion_batch_size or self.settings.batch_size
        order_seed = derived_seed(self.seed, self.task + 1, f"{self.phase} {other}")
        return _endless(
            self.dataset.tasks[other], self.method.device, self.splits[other], size, order_seed, self.at.step
        )

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return make_optimizer(self.method, self.settings.lr, self.method.begin_phase(self.phase))

    def _steps(self, source: BatchSource, others: Mapping[int, Iterator[Batch]]) -> None:
        """Those of an epoch that are left."""
        at, method = self.at, self.method
        order_seed = derived_seed(self.seed, self.task + 1, f"order {self.phase}")
        batches = epoch_batches(self.split.train, self.settings.batch_size, order_seed, at.epoch)
        num_batches = len(self.split.train) / self.settings.batch_size  # a float: the official annealing does not round it
        rest = (source.prepare(batches[number]) for number in range(at.batch, len(batches)))
        with closing(prefetch(rest)) as ready:
            for batch in map(source.load, ready):
                place = Place(at.batch, num_batches)
                companions = {other: next(stream) for other, stream in others.items()}
                result = StepResult(train_step(method, self.optimizer, batch, place, companions))
                self.losses.add(StepRecord(len(batch.x), at.epoch, at.batch, at.step, place.scale(50.0), [], result))
                at.batch, at.step = at.batch + 1, at.step + 1
                self._keep()

    def _validated(self) -> Epoch:
        """The epoch that has just ended; the best weights are kept."""
        at, settings, progress = self.at, self.settings, None
        self.losses.read(at)
        if self.keeper is not None:
            poll = self.keeper.poll

            def progress(done: int, total: int) -> None:
                poll()

        valid = evaluate_method(self.method, self.data, self.task, self.split.valid, settings.evaluate_batch_size, progress)
        score = selection_value(valid, settings.select)
        better = score > at.best_score
        if better:
            self.best = _what_changes(self.method)
        self._count_seconds()
        epoch = Epoch(self.phase, at.epoch, at.mean_losses()["class_loss"], valid, better, at.seconds)
        at.end_epoch(score)
        at.seconds = 0.0
        return epoch

    def _keep(self) -> None:
        """Stop if asked to, save if it is time."""
        if self.keeper is not None:
            self.keeper.poll()
            if self.keeper.due:
                self._save()

    def _save(self) -> None:
        assert self.keeper is not None
        self.losses.read(self.at)
        self._count_seconds()
        epochs = [asdict(epoch) for epoch in self.epochs]
        training, optimizer = self.method.training_state(), self.optimizer.state_dict()
        state = self.method.state_dict()
        self.keeper.save(self.task, Unfinished(self.phase, self.at, state, training, optimizer, self.best, epochs))
        self.began = time.monotonic()  # saving is no part of an epoch

    def _count_seconds(self) -> None:
        """Add the time since the last call to the epoch's."""
        now = time.monotonic()
        self.at.seconds, self.began = self.at.seconds + now - self.began, now


def train_step(
    method: Method, optimizer: torch.optim.Optimizer, batch: Batch, place: Place, companions: Mapping[int, Batch]
) -> Tensor:
    """One step of the present task; returns its loss, left on the device.

    Args:
        method: its phase has begun.
        optimizer: of the phase's parameter groups.
        batch: of the task, where the method is.
        place: of the step in its epoch.
        companions: a batch of each task in `method.companions()`.
    """
    optimizer.zero_grad(set_to_none=True)
    loss = method.loss(batch, place, companions)
    loss.backward(ops.unit_gradient(loss))  # type: ignore[no-untyped-call]
    method.after_backward()
    optimizer.step()
    method.after_step()
    return loss.detach()


def _endless(
    data: TaskData, device: torch.device, split: Split, batch_size: int, seed: int, done: int = 0
) -> Generator[Batch, None, None]:
    """Batches of a task, epoch after epoch, from the one after the first `done`."""
    source = BatchSource(data, device)
    epoch, first = divmod(done, len(epoch_batches(split.train, batch_size, seed, 0)))
    while True:
        batches = epoch_batches(split.train, batch_size, seed, epoch)
        with closing(prefetch(source.prepare(batches[number]) for number in range(first, len(batches)))) as ready:
            yield from map(source.load, ready)
        epoch, first = epoch + 1, 0


def _what_changes(method: Method) -> dict[str, Tensor]:
    """Copies of all of the state but frozen parameters."""
    frozen = {name for name, parameter in method.named_parameters() if not parameter.requires_grad}
    return {name: value.clone() for name, value in method.state_dict().items() if name not in frozen}
