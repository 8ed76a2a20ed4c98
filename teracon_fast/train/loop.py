"""One training loop for every method: phases, epochs and steps of a task, with validation and patience.

`train_step` is a whole optimizer step on given inputs. `Trainer` is the loop around it; what it needs from its surroundings
(a log, checkpoints, somewhere to keep the best weights) it asks of `Callbacks`, so that it can be read without them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from teracon_fast.data import Batch, BatchSource, Split, TaskSequence, epoch_batches, prefetch
from teracon_fast.data.seeds import derived_seed
from teracon_fast.errors import CheckpointError, ConfigError, TeraconError
from teracon_fast.methods.base import Method, Precision, StepContext, StepResult
from teracon_fast.model.backbone import Backbone
from teracon_fast.model.masks import Parity
from teracon_fast.ops import native
from teracon_fast.optim.adam import Adam
from teracon_fast.train.evaluation import evaluate
from teracon_fast.train.metrics import selection_value

# Numbers in an item embedding from which on lazy Adam is faster than a pass over all rows.
LAZY_FROM = 10_000_000


class DivergedError(TeraconError):
    """A loss became NaN or infinite."""


@dataclass(frozen=True)
class TaskSettings:
    """How one task is trained. The defaults are those of later tasks in the published program.

    Attributes:
        lr: of Adam, for parameter groups that have none of their own.
        batch_size: samples a step. epochs: of each phase, at most.
        patience: validations without a better one, after which a phase ends.
        select: validation metric that picks the best weights, see `metrics.selection_value`.
    """

    lr: float = 1e-4
    batch_size: int = 1024
    epochs: int = 100
    patience: int = 5
    select: str = "hit@1"

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not self.lr > 0:
            raise ConfigError(f"lr is {self.lr}, expected more than 0")


@dataclass(frozen=True)
class LoopSettings:
    """What all tasks of a run have in common.

    Attributes:
        seed: of the order of samples.
        precision, parity: see `StepContext`.
        log_every: steps between two logged ones.
        evaluate_batch_size: sequences encoded at a time in evaluation.
    """

    seed: int = 0
    precision: Precision = "fp32"
    parity: Parity = "official"
    log_every: int = 20
    evaluate_batch_size: int = 1024


@dataclass
class TrainState:
    """Where the training of a task stands between two steps; with the tensors, all that an interrupted task needs.

    Attributes:
        phase: its name. epoch, batch: the next ones in it; batch is the number of batches while validation is due.
        step: the next one in the task. first_step: of the phase.
        samples: of this epoch so far. sums: of its losses, times samples.
        best_score, best_epoch: of the phase so far. stale: validations since the best one.
        epochs: done in the task. seconds: of its training and validation.
    """

    phase: str = ""
    epoch: int = 0
    batch: int = 0
    step: int = 0
    first_step: int = 0
    samples: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    best_score: float = -1.0
    best_epoch: int = -1
    stale: int = 0
    epochs: int = 0
    seconds: float = 0.0

    def begin_phase(self, phase: str) -> None:
        """Move to the first step of a phase."""
        self.phase, self.epoch, self.batch, self.first_step = phase, 0, 0, self.step
        self.best_score, self.best_epoch, self.stale = -1.0, -1, 0

    def end_epoch(self, score: float) -> None:
        """Move to the next epoch, having validated this one."""
        if score > self.best_score:
            self.best_score, self.best_epoch, self.stale = score, self.epoch, 0
        else:
            self.stale += 1
        self.epoch, self.epochs, self.batch, self.samples = self.epoch + 1, self.epochs + 1, 0, 0
        self.sums.clear()


@dataclass
class TaskCheckpoint:
    """What a task in training needs to resume between two of its steps, to the same bits.

    Attributes:
        state: of the loop.
        weights: see `Method.changing_state`. method: see `Method.training_state`. optimizer: its state.
    """

    state: TrainState
    weights: dict[str, Tensor]
    method: dict[str, Any]
    optimizer: dict[str, Any]

    def plain(self) -> dict[str, Any]:
        """As dicts of tensors, numbers and strings."""
        return {**vars(self), "state": asdict(self.state)}

    @staticmethod
    def of_plain(saved: Mapping[str, Any]) -> TaskCheckpoint:
        """What `plain` gave."""
        return TaskCheckpoint(**{**saved, "state": TrainState(**saved["state"])})


class Callbacks:
    """What a `Trainer` tells and asks of its surroundings. These keep the best weights in memory and do nothing else.

    Any of them may raise to stop the training.
    """

    def __init__(self) -> None:
        self._best: dict[str, Tensor] = {}

    def on_step(self, trainer: Trainer, users: int, event: dict[str, Any] | None) -> None:
        """A step of `users` samples is done; `event` holds what to log of it, if anything."""

    def on_evaluate(self, trainer: Trainer, done: int, total: int) -> None:
        """So many of the validation samples are ranked."""

    def on_epoch_end(self, trainer: Trainer, event: dict[str, Any]) -> None:
        """An epoch is validated, and the state is at the next one: a good time to save."""

    def keep_best(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Keep the present weights: the best of the phase so far."""
        self._best = {name: value.clone() for name, value in trainer.method.changing_state().items()}

    def load_best(self, trainer: Trainer) -> None:
        """Give the method the weights that were kept."""
        trainer.method.load_changing_state(self._best)


def make_optimizer(model: nn.Module, lr: float, groups: Sequence[Mapping[str, Any]] | None = None) -> Adam:
    """Adam with default betas, without weight decay, in one fused kernel where PyTorch has one.

    From here on an item embedding's gradient is sparse where a kernel is there to take it: float32 on the CPU, or of a model
    with backend="triton". Of a large embedding, rows without gradient are left behind until they are read, see `optim.adam.Adam`.

    Args:
        model: a `Backbone`, or a module with some inside.
        lr: of groups that have none of their own.
        groups: of parameters, as optimizers take them; None: all parameters of the model.
    """
    groups = [{"params": list(model.parameters())}] if groups is None else groups
    trained = [parameter for group in groups for parameter in group["params"]]
    chosen, lazy, backend = {id(parameter) for parameter in trained}, False, "auto"
    for backbone in model.modules():
        if not isinstance(backbone, Backbone):
            continue
        weight = backbone.embeding.weight
        backend = "triton" if backbone.backend == "triton" else backend
        here = backbone.backend == "triton" or (weight.device.type == "cpu" and native.available())
        served = here and weight.dtype == torch.float32 and id(weight) in chosen
        backbone.sparse_embedding_grad = served
        lazy = lazy or (served and weight.numel() >= LAZY_FROM)
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in trained)
    return Adam([dict(group) for group in groups], lr=lr, fused=fused or None, lazy=lazy, backend=backend)


def train_step(method: Method, optimizer: torch.optim.Optimizer, batch: Batch, context: StepContext) -> StepResult:
    """One optimizer step of the present task. The method's phase has begun; the optimizer has its parameter groups."""
    result = method.step(batch, context)
    method.after_backward()
    optimizer.step()
    method.after_step()
    return result


@dataclass(frozen=True)
class StepRecord:
    """A step that has been queued: its samples, where it stood, and what it returns."""

    users: int
    epoch: int
    batch: int
    step: int
    result: StepResult


class PendingLosses:
    """Losses of past steps, left on the device until someone asks: reading them waits for the device."""

    def __init__(self, task: str) -> None:
        self._task = task
        self._pending: list[StepRecord] = []

    def add(self, record: StepRecord) -> None:
        """Remember a step, unread."""
        self._pending.append(record)

    def read(self, state: TrainState) -> dict[str, Any] | None:
        """Add the unread losses to the sums of the epoch; returns what there is to log of the last step.

        Raises:
            DivergedError: a loss is not finite.
        """
        if not self._pending:
            return None
        values = iter(torch.stack([loss for r in self._pending for loss in r.result.losses.values()]).tolist())
        for record in self._pending:
            losses = {name: next(values) for name in record.result.losses}
            self._require_finite(record, losses)
            state.samples += record.users
            for name, loss in losses.items():
                state.sums[name] = state.sums.get(name, 0.0) + record.users * loss
        self._pending.clear()
        weights = record.result.weights
        log = {name: float(value) if isinstance(value, Tensor) else value for name, value in record.result.log.items()}
        return {
            "epoch": record.epoch, "batch": record.batch, "step": record.step, **log, **losses,
            "loss": sum(weights.get(name, 1.0) * loss for name, loss in losses.items()),
        }  # fmt: skip

    def _require_finite(self, at: StepRecord, losses: Mapping[str, float]) -> None:
        bad = [name.replace("_", " ") for name, value in losses.items() if not math.isfinite(value)]
        if bad:
            found = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in losses.items())
            about = "".join(f", {name} = {value}" for name, value in at.result.log.items() if not isinstance(value, Tensor))
            raise DivergedError(
                f"{self._task}, epoch {at.epoch + 1}, batch {at.batch + 1} (step {at.step + 1}): the {' and the '.join(bad)} "
                f"{'is' if len(bad) == 1 else 'are'} not finite: got {found}{about}. Nothing of this step was saved; a lower "
                "learning rate usually helps"
            )


class Trainer:
    """Trains the present task of a method through all its phases.

    Args:
        method: the task has been started.
        dataset: the tasks. splits: of each, at least up to this one.
        settings: of this task. loop: of the run.
        callbacks: None: the best weights are kept in memory, nothing is logged.

    Attributes:
        task: counted from 0. state: where it stands. optimizer: of the present phase.
    """

    def __init__(
        self, method: Method, dataset: TaskSequence, splits: Sequence[Split], settings: TaskSettings,
        loop: LoopSettings | None = None, callbacks: Callbacks | None = None,
    ) -> None:  # fmt: skip
        self.method, self.dataset, self.splits, self.settings = method, dataset, splits, settings
        self.loop, self.callbacks = loop or LoopSettings(), callbacks or Callbacks()
        self.task = method.task
        self.data, self.split = dataset.tasks[self.task], splits[self.task]
        self.state = TrainState()
        self.optimizer: torch.optim.Optimizer
        self._losses = PendingLosses(f"task {self.task + 1} ({self.data.name})")
        self._clock = time.monotonic()

    @property
    def num_batches(self) -> int:
        """Batches of an epoch."""
        return math.ceil(len(self.split.train) / self.settings.batch_size)

    def train(self, saved: TaskCheckpoint | None = None) -> TrainState:
        """Train to the end, from the beginning or from a checkpoint; afterwards the method has the best weights.

        Raises:
            DivergedError: a loss became NaN or infinite. CheckpointError: the checkpoint does not fit the method.
        """
        phases = list(self.method.phases())
        self._clock = time.monotonic()
        if saved is not None:
            self._restore(saved, phases)
        for phase in phases[phases.index(self.state.phase) if saved else 0 :]:
            if saved is None:
                self.state.begin_phase(phase)
                self.optimizer = self._new_optimizer()
            saved = None
            self._train_phase()
            self.callbacks.load_best(self)
            self.method.end_phase(phase)
        return self.state

    def checkpoint(self) -> TaskCheckpoint:
        """All that the task needs to resume from here; waits for the device."""
        self._losses.read(self.state)
        self.count_seconds()
        method = self.method
        return TaskCheckpoint(self.state, method.changing_state(), method.training_state(), self.optimizer.state_dict())

    def count_seconds(self, counts: bool = True) -> None:
        """Add the time since the last call to the task's, unless it is not the task's."""
        now = time.monotonic()
        self.state.seconds += (now - self._clock) * counts
        self._clock = now

    def _restore(self, saved: TaskCheckpoint, phases: Sequence[str]) -> None:
        if saved.state.phase not in phases:
            raise CheckpointError(f"got phase {saved.state.phase!r}, expected one of {list(phases)}")
        self.state = saved.state
        try:
            # What trains in a phase may follow from the weights, and some parameters may exist in a phase only.
            self.method.load_changing_state(saved.weights)
            self.optimizer = self._new_optimizer()
            unknown = self.method.load_changing_state(saved.weights)
            self.optimizer.load_state_dict(saved.optimizer)
            self.method.load_training_state(saved.method)
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint does not fit {self.method.name}: {error}") from None
        if unknown:
            raise CheckpointError(f"the checkpoint does not fit {self.method.name}: it has {unknown[0]!r}")
        if missing := set(self.method.changing_state()) - set(saved.weights):
            raise CheckpointError(f"the checkpoint does not fit {self.method.name}: it lacks {min(missing)!r}")

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return make_optimizer(self.method, self.settings.lr, self.method.begin_phase(self.state.phase))

    def _train_phase(self) -> None:
        state, settings = self.state, self.settings
        companions = {other: self._companion(other) for other in self.method.companions()}
        source = BatchSource(self.data, self.method.device)
        try:
            while state.epoch < settings.epochs and state.stale < settings.patience:
                self._train_epoch(source, companions)
                self._validate()
        finally:
            for stream in companions.values():
                stream.close()

    def _train_epoch(self, source: BatchSource, streams: Mapping[int, Generator[Batch, None, None]]) -> None:
        """The steps of an epoch that are left."""
        state, method, loop = self.state, self.method, self.loop
        read_always = method.device.type == "cpu"  # elsewhere reading waits for work that is queued
        num_batches = len(self.split.train) / self.settings.batch_size  # the official annealing does not round it
        order_seed = derived_seed(loop.seed, self.task + 1, method.order_seed.format(phase=state.phase))
        batches = epoch_batches(self.split.train, self.settings.batch_size, order_seed, state.epoch)
        rest = (source.prepare(batches[k]) for k in range(state.batch, len(batches)))
        with closing(prefetch(rest)) as ready:
            for batch in map(source.load, ready):
                logged = state.step % loop.log_every == 0
                companions = {other: next(stream) for other, stream in streams.items()}
                context = StepContext(state.batch, num_batches, loop.parity, loop.precision, logged, companions)
                result = train_step(method, self.optimizer, batch, context)
                self._losses.add(StepRecord(len(batch.x), state.epoch, state.batch, state.step, result))
                event = self._losses.read(state) if logged or read_always else None
                state.batch, state.step = state.batch + 1, state.step + 1
                self.callbacks.on_step(self, len(batch.x), event if logged else None)

    def _validate(self) -> None:
        """Measure the epoch that has just ended; keep its weights if they are the best so far."""
        state = self.state
        self._losses.read(state)
        metrics = self.measure(self.split.valid, lambda done, total: self.callbacks.on_evaluate(self, done, total))
        score = selection_value(metrics, self.settings.select)
        best = score > state.best_score
        if best:
            self.callbacks.keep_best(self, metrics)
        losses = {name: total / state.samples for name, total in state.sums.items()}
        event = {
            "phase": state.phase, "epoch": state.epoch, "step": state.step - 1, "metrics": metrics, "best": best,
            **losses, "method": self.method.describe(),
        }  # fmt: skip
        state.end_epoch(score)
        self.callbacks.on_epoch_end(self, event)

    def measure(self, samples: Any, progress: Any = None) -> dict[str, float]:
        """Metrics of the task on some of its samples with the present weights."""
        return evaluate(self.method, self.data, self.task, samples, self.loop.evaluate_batch_size, progress)

    def _companion(self, other: int) -> Generator[Batch, None, None]:
        """Batches of a companion task, epoch after epoch, from the next step's on."""
        samples, batch_size = self.splits[other].train, self.settings.batch_size
        order_seed = derived_seed(self.loop.seed, self.task + 1, f"{self.state.phase} {other}")
        source = BatchSource(self.dataset.tasks[other], self.method.device)
        epoch, first = divmod(self.state.step - self.state.first_step, math.ceil(len(samples) / batch_size))
        while True:
            batches = epoch_batches(samples, batch_size, order_seed, epoch)
            with closing(prefetch(source.prepare(batches[number]) for number in range(first, len(batches)))) as ready:
                yield from map(source.load, ready)
            epoch, first = epoch + 1, 0
