"""Training steps of TERACON, and the loop that trains one task.

`t1_step` and `continual_step` are whole optimiser steps on given inputs. `train_task` is the loop around them; what it
needs from its surroundings (a log, checkpoints, validation) it takes as a `Host`, so that it can be read without them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teracon_fast import ops, packing
from teracon_fast.data import BatchSource, ahead, epoch_batches
from teracon_fast.errors import TeraconError
from teracon_fast.model.backbone import Backbone
from teracon_fast.model.fast_tcn import FastTCN, Request
from teracon_fast.model.masks import Parity, annealed_scale
from teracon_fast.ops import native
from teracon_fast.optim.adam import Adam
from teracon_fast.packing import transfers
from teracon_fast.train.metrics import selection_value

if TYPE_CHECKING:
    from teracon_fast.config import TaskConfig
    from teracon_fast.data import Split, TaskData
    from teracon_fast.methods.teracon_graphs import StepGraphs

FIRST_RHO = 0.9  # rate of every past task in the first step of a task, before any masks have been compared
# Numbers in an item embedding, from which on leaving rows behind is faster than a pass over all of them.
LAZY_FROM = 10_000_000

Sampling = Literal["adaptive", "minimum", "all"]
StudentMask = Literal["past", "current"]
Precision = Literal["fp32", "bf16"]


class DivergedError(TeraconError):
    """A loss became NaN or infinite."""


class HostCopy:
    """A small tensor on its way to the host: reading it waits for what was queued before it, not for later work."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            # The copy's own stream, which is not the current device's where the tensor is on another.
            self._event.record(torch.cuda.current_stream(tensor.device))
        else:
            self._values = tensor

    def tolist(self) -> list[float]:
        """The values as floats."""
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._values.tolist()
        return values


@dataclass(frozen=True)
class StepResult:
    """Losses of one step, scalars left on the device, and the sampling rates of the next step."""

    class_loss: Tensor
    retention_loss: Tensor | None = None  # before alpha; None for T1
    next_rho: HostCopy | None = None
    hit: Tensor | None = None  # hit@1 of the batch before the step, where asked for; T1: of real targets


def make_optimizer(
    model: torch.nn.Module, lr: float, groups: Sequence[Mapping[str, Any]] | None = None
) -> Adam:
    """Adam with default betas, without weight decay, in one fused kernel where PyTorch has one.

    From here on an item embedding's gradient is sparse where a kernel is there to take it: float32 on the CPU, or of a model
    with backend="triton". Of a large embedding, rows without gradient are left behind until they are read, see `optim.Adam`.

    Args:
        model: a `Backbone`, or a module with some inside.
        lr: of groups that have none of their own.
        groups: of parameters, as optimisers take them; None: all parameters of the model.
    """
    groups = [{"params": list(model.parameters())}] if groups is None else groups
    trained = [parameter for group in groups for parameter in group["params"]]
    chosen, lazy, backend = {id(parameter) for parameter in trained}, False, "auto"
    for backbone in model.modules():
        if not isinstance(backbone, Backbone):
            continue
        weight = backbone.embeding.weight
        if backbone.backend == "triton":
            backend = "triton"
        here = backbone.backend == "triton" or (weight.device.type == "cpu" and native.available())
        served = here and weight.dtype == torch.float32 and id(weight) in chosen
        backbone.sparse_embedding_grad = served
        lazy = lazy or (served and weight.numel() >= LAZY_FROM)
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in trained)
    return Adam([dict(group) for group in groups], lr=lr, fused=fused or None, lazy=lazy, backend=backend)


def _forward(model: FastTCN, precision: Precision) -> torch.autocast:
    """The context that losses are computed in. One per step: autocast keeps its copies of the weights until it ends."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16")


def t1_step(
    model: FastTCN, optimizer: torch.optim.Optimizer, x: Tensor, s: float, precision: Precision = "fp32",
    lengths: NDArray[np.int64] | None = None, predictions: bool = False, graphs: StepGraphs | None = None,
) -> StepResult:  # fmt: skip
    """One step of task 1: next item at all positions, then the clamp.

    Args:
        x: int64 `[B, L]`; inputs are `x[:, :-1]`, targets `x[:, 1:]`, pad targets counted.
        s: mask scale.
        precision: of matrix products; "bf16" keeps weights, masks, statistics and losses in fp32.
        lengths: `packing.real_lengths(x)`, int64 `[B]`, where they are known.
        predictions: also count hits, in the loss's own pass over the items.
        graphs: made for this model and precision; forward and backward pass are then replayed from there.
    """
    if lengths is None:
        lengths = packing.real_lengths(x)  # while x is on the host: asking the device would wait for it
    optimizer.zero_grad(set_to_none=True)
    x = to_device(x, model)
    if graphs is None:
        with _forward(model, precision):
            found = model.next_item(x, s, lengths=lengths, predictions=predictions)
        found.loss.backward(ops.unit_gradient(found.loss))  # type: ignore[no-untyped-call]
    else:
        found = graphs.next_item(x, model.masks(s), lengths, predictions)
    optimizer.step()
    model.clamp_task_embeddings()
    return StepResult(found.loss.detach(), hit=_hit(found.rank, x[:, 1:].reshape(-1) != 0) if predictions else None)


def _hit(rank: Tensor, counts: Tensor | None = None) -> Tensor:
    """Share of first places; 0 where nothing counts."""
    hits = rank == 0
    return hits.float().mean() if counts is None else (hits & counts).sum() / counts.sum().clamp_min(1)


def continual_step(
    model: FastTCN,
    teacher: FastTCN,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    users: Sequence[Tensor],
    rho: Sequence[float],
    s: float,
    alpha: float,
    student_mask: StudentMask = "past",
    c: float = 6.0,
    precision: Precision = "fp32",
    lengths: NDArray[np.int64] | None = None,
    predictions: bool = False,
    graphs: StepGraphs | None = None,
) -> StepResult:
    """One step of task i >= 2 (Eq. 15 to 18): class loss + alpha * retention loss, then the clamp.

    Args:
        model: i tasks, in training.
        teacher: i-1 tasks, frozen when task i began. With one task it has the plain mask.
        x: int64 `[B, L]`. y: int64 `[B]`, labels of task i.
        users: for each past task j the rows of x drawn for it, int64 `[n_j]`, n_j at least 1.
        rho: the rate of each past task that those users were drawn with; they weight the retention loss.
        s: mask scale of student and teacher.
        alpha: weight of the retention loss.
        student_mask: "past": the student uses the current mask of task j (the published program); "current": that of
            task i (Eq. 10 and 16 as printed).
        c: scale of the cosine in Eq. 15.
        precision, lengths, predictions, graphs: as in `t1_step`; graphs for this teacher, alpha and student mask too.

    Returns:
        StepResult; next_rho is computed from the masks that this step used.
    """
    lengths = packing.real_lengths(x) if lengths is None else lengths  # as in `t1_step`
    x, y = to_device(x, model), to_device(y, model)
    masks, teacher_masks, rates = model.step_masks(teacher, s, c)
    next_rho = HostCopy(rates)  # on its way before anything else is queued
    if graphs is None:
        with _forward(model, precision):
            states = step_states(model, teacher, x, users, masks, teacher_masks, student_mask, lengths)
            factors = isinstance(optimizer, Adam)
            loss, found, retention = loss_of_states(model, teacher, *states, y, rho, alpha, predictions, factors)
        optimizer.zero_grad(set_to_none=True)  # not earlier: memory that was given back takes time to get again
        loss.backward(ops.unit_gradient(loss))  # type: ignore[no-untyped-call]
    else:
        optimizer.zero_grad(set_to_none=True)
        found, retention = graphs.continual(x, y, users, rho, masks, teacher_masks, lengths, predictions)
    optimizer.step()
    model.clamp_task_embeddings()
    hit = _hit(found.rank) if predictions else None
    return StepResult(found.loss.detach(), retention.detach() / (alpha or 1.0), next_rho, hit)


def step_states(
    model: FastTCN, teacher: FastTCN, x: Tensor, users: Sequence[Tensor], masks: Tensor, teacher_masks: Tensor,
    student_mask: StudentMask, lengths: NDArray[np.int64],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """States of all users under the current mask; for each past task the student's and the teacher's of its users."""
    current = model.num_tasks - 1

    def asked(one_mask: bool) -> list[Request]:
        # Task 1 predicts the last item of a sequence, so it must not see it.
        return [Request(current if one_mask else j, rows, int(j == 0)) for j, rows in enumerate(users)]

    with torch.no_grad():
        pseudo = teacher.encode(x, asked(False), masks=teacher_masks, lengths=lengths)
    everyone = [Request(current), *asked(student_mask == "current")]
    hidden, *student = model.encode(x, everyone, masks=masks, lengths=lengths)
    return hidden, student, pseudo


def loss_of_states(
    model: FastTCN, teacher: FastTCN, hidden: Tensor, student: Sequence[Tensor], pseudo: Sequence[Tensor], y: Tensor,
    rho: Sequence[float] | Tensor, alpha: float, predictions: bool, factored: bool = False, valid: Tensor | None = None,
) -> tuple[Tensor, ops.CrossEntropy, Tensor]:  # fmt: skip
    """The loss of a step, that of the class in it, and that of retention times alpha (or 1, where alpha is 0).

    Args:
        hidden: `[B, f]`, states under the current mask. y: int64 `[B]`.
        student, pseudo: for each past task the student's and the teacher's states of its users, `[n_j, f]`.
        rho, valid, factored: as `ops.retention_mse`, the last its `low_rank_gradients`.
    """
    found = model.class_loss(hidden, model.num_tasks - 1, y, predictions)
    heads, its_heads = ([m.head(j) for j in range(teacher.num_tasks)] for m in (model, teacher))
    # alpha is part of the loss: it is formed with its gradients.
    retention = ops.retention_mse(
        student, [head.weight for head in heads], [head.bias for head in heads],
        pseudo, [head.weight for head in its_heads], [head.bias for head in its_heads],
        rho, scale=alpha or 1.0, low_rank_gradients=factored, valid=valid, backend=model.backend,
    )  # fmt: skip
    return found.loss + retention if alpha else found.loss, found, retention


def to_device(tensor: Tensor, model: FastTCN) -> Tensor:
    """The tensor where the model is; from the host to a GPU without waiting for what the GPU is doing."""
    return transfers.to_device(tensor, model.device)


def drawing_rates(rho: Sequence[float], sampling: Sampling) -> list[float]:
    """Rates that users are drawn and losses weighted with: rho itself, the smallest rho for all, or 1 for all."""
    if sampling == "adaptive":
        return list(rho)
    return [min(rho) if sampling == "minimum" else 1.0] * len(rho)


def draw_users(batch: int, rates: Sequence[float], generator: torch.Generator) -> list[Tensor]:
    """For each past task `max(1, int(batch * rate))` rows of the batch, uniform, independent of each other (Eq. 14)."""
    return [torch.randperm(batch, generator=generator)[: max(1, int(batch * rate))] for rate in rates]


@dataclass(frozen=True)
class StepRecord:
    """A step that has been queued: its samples, where it stood, and what it returns."""

    users: int
    epoch: int
    batch: int
    step: int
    s: float
    rho: list[float]
    result: StepResult


class Losses:
    """Losses of past steps, left on the device until someone asks: reading them waits for the device."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._pending: list[StepRecord] = []

    def add(self, record: StepRecord) -> None:
        """Remember a step, unread."""
        self._pending.append(record)

    def read(self, position: Position) -> dict[str, Any] | None:
        """Add the unread losses to the sums of the epoch; returns what there is to log of the last step.

        Raises:
            DivergedError: a loss is not finite.
        """
        if not self._pending:
            return None
        results = [record.result for record in self._pending]
        losses = [loss for r in results for loss in (r.class_loss, r.retention_loss) if loss is not None]
        values = iter(torch.stack(losses).tolist())
        for record in self._pending:
            class_loss = next(values)
            retention = None if record.result.retention_loss is None else next(values)
            self._require_finite(record, class_loss, retention)
            position.samples += record.users
            position.class_sum += record.users * class_loss
            position.retention_sum += record.users * (retention or 0.0)
        self._pending.clear()
        event = {"epoch": record.epoch, "batch": record.batch, "step": record.step, "scale": record.s}
        event["class_loss"] = class_loss
        if record.result.hit is not None:
            event["hit@1"] = float(record.result.hit)
        return event if retention is None else {**event, "retention_loss": retention, "rho": record.rho}

    def _require_finite(self, at: StepRecord, class_loss: float, retention: float | None) -> None:
        losses = {"class": class_loss, "retention": 0.0 if retention is None else retention}
        bad = [name for name, value in losses.items() if not math.isfinite(value)]
        if bad:
            raise DivergedError(
                f"task {self._number}, epoch {at.epoch}, batch {at.batch} (step {at.step}): the {' and '.join(bad)} "
                f"loss is not finite: got class loss {class_loss}, retention loss {retention}, at s = {at.s:.6g}, "
                f"rho = {at.rho}. Nothing of this step was saved; a lower learning rate usually helps"
            )


@dataclass
class Position:
    """Where the training of a task stands between two steps; with the tensors, all that an interrupted task needs."""

    epoch: int = 0
    batch: int = 0  # the next one; equal to the number of batches while validation is due
    step: int = 0
    rho: list[float] = field(default_factory=list)  # for the next step, one per past task
    samples: int = 0  # of this epoch so far, with their losses summed up:
    class_sum: float = 0.0
    retention_sum: float = 0.0
    best_score: float = -1.0
    best_epoch: int = -1
    stale: int = 0  # validations since the best one
    seconds: float = 0.0

    def mean_losses(self) -> dict[str, float]:
        """Means over the samples of this epoch so far."""
        losses = {"class_loss": self.class_sum / self.samples}
        return losses | {"retention_loss": self.retention_sum / self.samples} if self.rho else losses

    def end_epoch(self, score: float) -> None:
        """Move to the next epoch, having validated this one."""
        if score > self.best_score:
            self.best_score, self.best_epoch, self.stale = score, self.epoch, 0
        else:
            self.stale += 1
        self.epoch, self.batch, self.samples, self.class_sum, self.retention_sum = self.epoch + 1, 0, 0, 0.0, 0.0


@dataclass
class TaskTraining:
    """One task in training."""

    number: int  # from 1
    config: TaskConfig
    data: TaskData
    split: Split
    order_seed: int
    model: FastTCN
    teacher: FastTCN | None  # None for task 1
    optimizer: torch.optim.Optimizer
    draws: torch.Generator  # draws the users of retention
    position: Position
    losses: Losses
    precision: Precision = "fp32"
    sampling: Sampling = "adaptive"
    student_mask: StudentMask = "past"
    parity: Parity = "official"
    log_every: int = 20
    graphs: StepGraphs | None = None


class Host(Protocol):
    """What `train_task` asks of its surroundings. `after_step` and `validate` may raise to stop the training."""

    def after_step(self, task: TaskTraining, users: int, event: dict[str, Any] | None) -> None:
        """A step of `users` samples is done; `event` holds what to log of it, if anything."""

    def validate(self, task: TaskTraining) -> dict[str, float]:
        """Metrics of the model on the validation samples."""

    def keep_best(self, task: TaskTraining, metrics: dict[str, float]) -> None:
        """Keep the present weights: the best so far."""

    def log(self, event: str, task: TaskTraining, **fields: Any) -> None:
        """Log an event."""

    def checkpoint(self, task: TaskTraining) -> None:
        """Save everything that the training needs to go on from here."""


def train_task(task: TaskTraining, host: Host) -> None:
    """Train a task from its position on, until its epochs or its patience run out. The host keeps the best weights."""
    at, config = task.position, task.config
    num_batches = len(task.split.train) / config.batch_size  # a float: the official annealing does not round it
    read_always = not waits_for_device(task.model)
    source = BatchSource(task.data, task.model.device)
    while at.epoch < config.epochs and at.stale < config.patience:
        batches = epoch_batches(task.split.train, config.batch_size, task.order_seed, at.epoch)
        rest = (source.prepare(batches[k]) for k in range(at.batch, len(batches)))
        with closing(ahead(rest)) as ready:
            for x, y, lengths in map(source.load, ready):
                s = annealed_scale(at.batch, num_batches, config.s_max, task.parity)
                logged = at.step % task.log_every == 0
                task.losses.add(run_step(task, x, y, s, lengths, logged))
                event = task.losses.read(at) if logged or read_always else None
                at.batch, at.step = at.batch + 1, at.step + 1
                host.after_step(task, len(x), event if logged else None)
        task.losses.read(at)
        metrics = host.validate(task)
        score = selection_value(metrics, config.select)
        best = score > at.best_score
        if best:
            host.keep_best(task, metrics)
        host.log("valid", task, epoch=at.epoch, step=at.step - 1, metrics=metrics, best=best, **at.mean_losses())
        at.end_epoch(score)
        host.checkpoint(task)


def waits_for_device(model: FastTCN) -> bool:
    """Whether reading a tensor of the model waits for work that is queued."""
    return model.head(0).weight.device.type != "cpu"


def run_step(
    task: TaskTraining, x: Tensor, y: Tensor, s: float, lengths: NDArray[np.int64] | None = None, predictions: bool = False
) -> StepRecord:
    """One optimiser step of the task on a batch: draws the users of retention and moves rho on."""
    at, config = task.position, task.config
    if task.teacher is None:
        result = t1_step(task.model, task.optimizer, x, s, task.precision, lengths, predictions, task.graphs)
        return StepRecord(len(x), at.epoch, at.batch, at.step, s, [], result)
    rates = drawing_rates(at.rho, task.sampling)
    users = draw_users(len(x), rates, task.draws)
    result = continual_step(
        task.model, task.teacher, task.optimizer, x, y, users, rates, s, config.alpha, task.student_mask, config.c,
        task.precision, lengths, predictions, task.graphs,
    )  # fmt: skip
    record = StepRecord(len(x), at.epoch, at.batch, at.step, s, rates, result)
    assert result.next_rho is not None
    at.rho = result.next_rho.tolist()  # waits for the masks of this step, not for the step
    return record
