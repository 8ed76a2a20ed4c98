"""TERACON: one network under a mask for each task; earlier tasks are retained by the logits of a frozen copy (Eq. 10 to 18)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from teracon_fast import ops
from teracon_fast.data import Batch
from teracon_fast.methods.base import Group, Method, Sizes, StepContext, StepResult, group
from teracon_fast.methods.options import Option
from teracon_fast.methods.teracon_graphs import StepGraphs
from teracon_fast.methods.teracon_loss import loss_of_states, step_states
from teracon_fast.model.backbone import EncodeUsers
from teracon_fast.model.fast_tcn import FastTCN
from teracon_fast.ops.task_masks import MaskVariant, similarity
from teracon_fast.packing.transfers import HostCopy

FIRST_RHO = 0.9  # rate of every past task in the first step of a task, before any masks have been compared

Sampling = Literal["adaptive", "minimum", "all"]
StudentMask = Literal["past", "current"]


class Teracon(Method):
    """One network for all tasks, each with masks of its own; earlier tasks are retained by the logits of a frozen copy.

    From task 1 on the state dict lacks that copy: it is the network as the task before left it.

    Args:
        sizes: of the network.
        All others: see their `Option`.

    Attributes:
        model: the network, with the heads and masks of the tasks so far.
        teacher: the network of the tasks before the present one, frozen; None for task 0.

    Raises:
        ConfigError: an unknown mask variant, sampling or student mask, a negative alpha, or a scale that is not positive.
    """

    name = "teracon"
    order_seed = "order"
    network: ClassVar[type[FastTCN]] = FastTCN

    def __init__(
        self,
        sizes: Sizes,
        alpha: Annotated[float, Option("weight of the retention loss (Eq. 18)", per_task=True, least=0)] = 0.7,
        c: Annotated[float, Option("scale of the cosine in rho (Eq. 15)", per_task=True, above=0)] = 6.0,
        s_max: Annotated[float, Option("largest mask scale (Eq. 19), also that of inference", per_task=True, above=0)] = 50.0,
        mask: Annotated[
            MaskVariant, Option("relation-aware masks (Eq. 12), without negated embeddings, or plain (Eq. 6)")
        ] = "relation",
        sampling: Annotated[
            Sampling, Option("users drawn for retention: by rho (Eq. 15), by the smallest rho, or all")
        ] = "adaptive",
        student_mask: Annotated[
            StudentMask, Option("the student's mask in retention: the past task's (published program) or the current (Eq. 16)")
        ] = "past",
        task_embedding_range: Annotated[
            tuple[float, float], Option("bounds of the uniform initial task embeddings")
        ] = (0.0, 2.0),
    ) -> None:
        super().__init__(sizes)
        self.alpha, self.c, self.s_max, self.mask = alpha, c, s_max, mask
        self.sampling, self.student_mask, self.task_embedding_range = sampling, student_mask, task_embedding_range
        self.check_options()
        self.model: FastTCN
        self._frozen: list[FastTCN] = []  # a list, so that the teacher is no part of the module's state
        self._rho: list[float] | HostCopy = []
        self._wants_graphs = False
        self._graphs: dict[str, StepGraphs] = {}  # of the present phase, by precision

    @classmethod
    def around(cls, model: FastTCN, teacher: FastTCN | None = None, **options: Any) -> Self:
        """The method in its last task, on a network that exists; `begin_phase("train")` is next.

        Args:
            model: with the heads of all tasks so far. teacher: of the tasks before the last, frozen; None for task 0.
            options: as of the constructor, but for `mask`.
        """
        sizes = Sizes(**{size.name: getattr(model, size.name) for size in fields(Sizes)})
        method = cls(sizes, mask=model.mask_variant, **options)
        method.to(device=model.device, dtype=model.embeding.stored.dtype)
        method.task, method.model = model.num_tasks - 1, model
        method._frozen = [] if teacher is None else [teacher]
        method._rho = [FIRST_RHO] * method.task
        return method

    @property
    def teacher(self) -> FastTCN | None:
        return self._frozen[0] if self._frozen else None

    @property
    def rho(self) -> list[float]:
        """Rate of each earlier task for the next step (Eq. 15). Waits for the masks of the last step, not for the step."""
        if isinstance(self._rho, HostCopy):
            self._rho = self._rho.tolist()
        return self._rho

    @rho.setter
    def rho(self, rates: Sequence[float]) -> None:
        self._rho = list(rates)

    # The network keeps the heads: they are copied with it.

    def head(self, task: int) -> nn.Linear:
        self.check_task(task)
        return self.model.head(task)

    @property
    def labels(self) -> list[int]:
        return list(self.model.labels) if self.task >= 0 else []

    def _initial_seed(self, generator: torch.Generator | None) -> int:
        return super()._initial_seed(None) if generator is None else generator.initial_seed()

    def _add_head(self, labels: int) -> None:
        if self.task == 0:
            self.model = self.network(
                **vars(self.sizes), labels=[labels], task_embedding_range=self.task_embedding_range, mask=self.mask
            )
        else:
            self._frozen = [self.model.frozen()]
            self.model = self.model.extended(labels, torch.Generator().manual_seed(torch.initial_seed()))

    def _start(self, task: int) -> None:
        self._rho = [FIRST_RHO] * task

    def grown(self, num_items: int, labels: Sequence[int], generator: torch.Generator | None = None) -> Self:
        self._check_growth(num_items, labels)
        options = {name: value for name, value in self._options().items() if name != "mask"}
        return type(self).around(self.model.grown(num_items, labels, generator), **options)

    def next_item_loss(self, batch: Batch) -> Tensor:
        return self.model.next_item_loss(batch.x, self.s_max, lengths=batch.lengths)

    def training_state(self) -> dict[str, Any]:
        return {**super().training_state(), "rho": self.rho}

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        super().load_training_state(state)
        self.rho = state["rho"]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for teacher in self._frozen:
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def enable_graphs(self) -> None:
        StepGraphs.check(self.sizes.backend, self.device)
        self._wants_graphs = True

    def _groups(self, phase: str) -> list[Group]:
        self._graphs.clear()
        return [group(self.model)]

    # A step

    def step(self, batch: Batch, context: StepContext) -> StepResult:
        """As `Method.step`; with CUDA graphs the forward and backward passes are replayed."""
        if not self._wants_graphs:
            return super().step(batch, context)
        precision = context.precision
        if precision not in self._graphs:
            self._graphs[precision] = StepGraphs(self.model, self.teacher, self.alpha, self.student_mask == "current", precision)
        graphs, self.result, s = self._graphs[precision], StepResult(), self._scale(context)
        self.clear_gradients()
        if self.teacher is None:
            found = graphs.next_item(batch.x, self.model.masks(s), batch.lengths, context.predictions)
            self._report(batch, context, found)
        else:
            users, rates, masks = self._draw(batch, s)
            found, retention = graphs.continual(batch.x, batch.y, users, rates, *masks, batch.lengths, context.predictions)
            self._report(batch, context, found, retention)
        return self.result

    def loss(self, batch: Batch, context: StepContext) -> Tensor:
        """Class loss, and from task 1 on alpha times that of retention (Eq. 18). Draws the users and moves rho on."""
        model, s = self.model, self._scale(context)
        if self.teacher is None:
            found = model.next_item(batch.x, s, lengths=batch.lengths, predictions=context.predictions)
            self._report(batch, context, found)
            return found.loss
        with torch.autocast(self.device.type, enabled=False):
            users, rates, masks = self._draw(batch, s)
        states = step_states(model, self.teacher, batch.x, users, *masks, self.student_mask == "current", batch.lengths)
        # Gradients in forms that only `optim.adam.Adam` takes, together or not at all.
        loss, found, retention = loss_of_states(
            model, self.teacher, *states, batch.y, rates, self.alpha, context.predictions, model.sparse_embedding_grad
        )
        self._report(batch, context, found, retention)
        return loss

    def _scale(self, context: StepContext) -> float:
        s = self.result.log["scale"] = context.scale(self.s_max)
        return s

    def _draw(self, batch: Batch, s: float) -> tuple[list[Tensor], list[float], tuple[Tensor, Tensor]]:
        """Users and rates of retention, and the masks of student and teacher; moves rho on."""
        assert self.teacher is not None
        rates = self.result.log["rho"] = drawing_rates(self.rho, self.sampling)
        users = self.draw_users(len(batch.x), rates)
        masks, teacher_masks, next_rho = self.model.step_masks(self.teacher, s, self.c)
        self._rho = HostCopy(next_rho)  # on its way before anything else is queued
        return users, rates, (masks, teacher_masks)

    def draw_users(self, batch: int, rates: Sequence[float]) -> list[Tensor]:
        """For each past task `max(1, int(batch * rate))` rows of the batch, uniform, independent of each other (Eq. 14)."""
        return draw_users(batch, rates, self.draws)

    def _report(self, batch: Batch, context: StepContext, found: ops.CrossEntropy, retention: Tensor | None = None) -> None:
        self.result.add("class_loss", found.loss)
        if retention is not None:
            self.result.add("retention_loss", retention / (self.alpha or 1.0), self.alpha)
        if context.predictions:
            self.report_hits(found.rank, batch.x[:, 1:].reshape(-1) != 0 if self.teacher is None else None)

    def after_step(self) -> None:
        """Clamp the task embeddings."""
        self.model.clamp_task_embeddings()

    # Inference

    def encoder(self, task: int) -> EncodeUsers:
        return self.encoders([task])[task]

    def encoders(self, tasks: Sequence[int]) -> dict[int, EncodeUsers]:
        """Of the network under the tasks' masks at s_max."""
        for task in tasks:
            self.check_task(task)
        encode = self.model.encoder(self.s_max)

        def of(task: int) -> EncodeUsers:
            return lambda x, drop_last=0, lengths=None: encode(x, task, drop_last, lengths)

        return {task: of(task) for task in tasks}

    @torch.no_grad()
    def describe(self) -> dict[str, Any]:
        """Share of mask channels above 1/2 at s_max, of each task."""
        return {"open_mask_share": (self.model.masks(self.s_max) > 0.5).float().mean((0, 2)).tolist()}

    @torch.no_grad()
    def summarize(self) -> dict[str, Any]:
        """Cosines of the tasks' masks, `[S][T][T]`."""
        masks = self.model.masks(self.s_max)
        return {"similarity": similarity(masks[:, :, None], masks[:, None]).tolist()}


def drawing_rates(rho: Sequence[float], sampling: Sampling) -> list[float]:
    """Rates that users are drawn and losses weighted with: rho itself, the smallest rho for all, or 1 for all."""
    if sampling == "adaptive":
        return list(rho)
    return [min(rho) if sampling == "minimum" else 1.0] * len(rho)


def draw_users(batch: int, rates: Sequence[float], generator: torch.Generator) -> list[Tensor]:
    """For each past task `max(1, int(batch * rate))` rows of the batch, uniform, independent of each other (Eq. 14)."""
    return [torch.randperm(batch, generator=generator)[: max(1, int(batch * rate))] for rate in rates]



