"""TERACON as one of the methods: `FastTCN` and the pieces of `trainer.continual_step`, under the same driver as the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, get_args

import numpy as np
import torch
from torch import Tensor, nn

from teracon_fast.data import Batch
from teracon_fast.errors import ConfigError
from teracon_fast.methods.base import Group, Method, Place, Sizes, group
from teracon_fast.model.fast_tcn import FastTCN, Request
from teracon_fast.ops.task_masks import check_variant
from teracon_fast.train.loop import (
    FIRST_RHO,
    HostCopy,
    Sampling,
    StudentMask,
    draw_users,
    drawing_rates,
    loss_of_states,
    step_states,
)


class Teracon(Method):
    """One network for all tasks, each with masks of its own; earlier tasks are retained by the answers of a frozen copy.

    From task 1 on the state dict lacks that copy: it is the network as the task before left it.

    Args:
        sizes: of the network.
        alpha: weight of the retention loss, one for all tasks or one for each task after the first in order; the last counts for
            any that follow. c: scale of the cosine in Eq. 15. s_max: mask scale of inference.
        mask: "relation", "positive_only" or "none", see `FastTCN`.
        sampling: rates that users are drawn with: "adaptive", "minimum" or "all", see `trainer.drawing_rates`.
        student_mask: see `trainer.continual_step`.
        task_embedding_range: bounds of the uniform initialisation of task embeddings.

    Attributes:
        model: the network, with the heads and masks of the tasks so far.
        teacher: the network of the tasks before the present one, frozen; None for task 0.
        draws: generator that draws the users of retention.

    Raises:
        ConfigError: an unknown mask variant, sampling or student mask, a negative alpha, or a scale that is not positive.
    """

    name = "teracon"
    network: ClassVar[type[FastTCN]] = FastTCN

    def __init__(
        self, sizes: Sizes, alpha: float | tuple[float, ...] = 0.7, c: float = 6.0, s_max: float = 50.0, mask: str = "relation",
        sampling: Sampling = "adaptive", student_mask: StudentMask = "past",
        task_embedding_range: tuple[float, float] = (0.0, 2.0),
    ) -> None:  # fmt: skip
        super().__init__(sizes)
        if not (alpha >= 0 if isinstance(alpha, int | float) else alpha and min(alpha) >= 0):
            raise ConfigError(f"{self.name}: alpha is {alpha}, expected at least 0")
        if not (c > 0 and s_max > 0):
            raise ConfigError(f"{self.name}: c is {c} and s_max {s_max}, expected both positive")
        for setting, value, kind in (("sampling", sampling, Sampling), ("student_mask", student_mask, StudentMask)):
            if value not in get_args(kind):
                raise ConfigError(f"{self.name}: {setting} is {value!r}, expected one of {list(get_args(kind))}")
        self.mask, self.task_embedding_range = check_variant(mask), task_embedding_range
        self.alpha, self.c, self.s_max = alpha, c, s_max
        self.sampling, self.student_mask = sampling, student_mask
        self.model: FastTCN
        self.draws = torch.Generator()
        self._frozen: list[FastTCN] = []  # a list, so that the teacher is no part of the module's state
        self._rho: list[float] | HostCopy = []

    @property
    def teacher(self) -> FastTCN | None:
        return self._frozen[0] if self._frozen else None

    @property
    def rho(self) -> list[float]:
        """Rate of each earlier task for the next step (Eq. 15). Waits for the masks of the last step, not for the step."""
        if isinstance(self._rho, HostCopy):
            self._rho = self._rho.tolist()
        return self._rho

    @property
    def present_alpha(self) -> float:
        """alpha of the present task."""
        if isinstance(self.alpha, int | float):
            return self.alpha
        return self.alpha[min(max(self.task - 1, 0), len(self.alpha) - 1)]

    # The network keeps the heads: they are copied with it.

    def head(self, task: int) -> nn.Linear:
        self.check_task(task)
        return self.model.head(task)

    @property
    def labels(self) -> list[int]:
        return list(self.model.labels) if self.task >= 0 else []

    def _add_head(self, labels: int) -> None:
        if self.task == 0:
            sizes = self.sizes
            self.model = self.network(
                num_items=sizes.num_items, channels=sizes.channels, labels=[labels], dilations=sizes.dilations,
                kernel_size=sizes.kernel_size, task_embedding_range=self.task_embedding_range, mask=self.mask,
                backend=sizes.backend, algorithm=sizes.algorithm,
            )  # fmt: skip
        else:
            self._frozen = [self.model.frozen()]
            self.model = self.model.extended(labels)

    def _start(self, task: int) -> None:
        self.draws.manual_seed(int(torch.randint(2**62, ())))
        self._rho = [FIRST_RHO] * task

    def training_state(self) -> dict[str, Any]:
        """The rates of the next step, and where the drawing of users stands."""
        return {"rho": self.rho, "draws": self.draws.get_state()}

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """As `Method.load_training_state`."""
        self._rho = list(state["rho"])
        self.draws.set_state(state["draws"])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for teacher in self._frozen:
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _groups(self, phase: str) -> list[Group]:
        return [group(self.model)]

    def loss(self, batch: Batch, place: Place, companions: Mapping[int, Batch]) -> Tensor:
        """Class loss, and from task 1 on alpha times that of retention (Eq. 18). Draws the users and moves rho on."""
        model, teacher, s = self.model, self.teacher, place.scale(self.s_max)
        if teacher is None:
            return model.next_item_loss(batch.x, s, lengths=batch.lengths)
        rates = drawing_rates(self.rho, self.sampling)
        users = draw_users(len(batch.x), rates, self.draws)
        masks, teacher_masks, next_rho = model.step_masks(teacher, s, self.c)
        self._rho = HostCopy(next_rho)  # on its way before anything else is queued
        states = step_states(model, teacher, batch.x, users, masks, teacher_masks, self.student_mask, batch.lengths)
        # Gradients in forms that only `optim.Adam` takes, together or not at all.
        factored = model.sparse_embedding_grad
        return loss_of_states(model, teacher, *states, batch.y, rates, self.present_alpha, False, factored)[0]

    def after_step(self) -> None:
        """Clamp the task embeddings."""
        self.model.clamp_task_embeddings()

    def encode(self, x: Tensor, task: int, drop_last: int = 0, lengths: np.ndarray | None = None) -> Tensor:
        """By the network under the task's present masks at s_max."""
        with self.inference(task):
            return self.model.encode(x, [Request(task, None, drop_last)], self.s_max, lengths=lengths)[0]
