"""One backbone for all tasks, of whose convolution weights each task uses some: what CONURE and Piggyback have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from teracon_fast.data import Batch
from teracon_fast.methods.base import Group, Method, Sizes, StepContext
from teracon_fast.model.backbone import Backbone, EncodeUsers

Weights = Sequence[Tensor]  # S tensors [f, f, 1, K], in network order


class MaskedWeights(Method):
    """One backbone, frozen after task 0 but for what a subclass says; tasks differ in which convolution weights are zero.

    Biases of convolutions, LayerNorms and the item embedding are trained with task 0 and shared by all tasks: each of them enters
    what every task computes, so a later change would change earlier tasks.

    Args:
        sizes: of the network.
        kind: of the network.

    Attributes:
        backbone: the network.
    """

    def __init__(self, sizes: Sizes, kind: type[Backbone] = Backbone) -> None:
        super().__init__(sizes)
        self._kind = kind
        self._phase = ""  # the present one; "" between phases

    def _start(self, task: int) -> None:
        self._phase = ""
        if task == 0:
            self.backbone = self.new_backbone(self._kind)

    @property
    def convolutions(self) -> list[nn.Parameter]:
        """The weights of the convolutions, `[f, f, 1, K]` each, in network order."""
        return [cast(nn.Parameter, self.backbone.site(site)[0].weight) for site in range(self.backbone.num_sites)]

    @abstractmethod
    def step_weights(self) -> Weights | None:
        """The weights of a training step of the present task, with gradients where they train; None: the backbone's own."""

    @abstractmethod
    def inference_weights(self, task: int) -> Weights | None:
        """The weights of a task at inference; None: the backbone's own."""

    def begin_phase(self, phase: str) -> list[Group]:
        """As `Method.begin_phase`."""
        groups = super().begin_phase(phase)
        self._phase = phase
        return groups

    def end_phase(self, phase: str) -> None:
        """As `Method.end_phase`."""
        self._phase = ""

    def loss(self, batch: Batch, context: StepContext) -> Tensor:
        """Cross-entropy of the present task."""
        return self.task_loss(self.task, self.backbone, batch, context, weights=self.step_weights())

    def next_item_loss(self, batch: Batch) -> Tensor:
        """As `Method.next_item_loss`."""
        return self.task_loss(0, self.backbone, batch, weights=self.inference_weights(0))

    @torch.no_grad()
    def encoder(self, task: int) -> EncodeUsers:
        """With the task's own weights; those of the present task as they are in its phase of training."""
        self.check_task(task)
        return self.backbone.encoder(weights=self.inference_weights(task))
