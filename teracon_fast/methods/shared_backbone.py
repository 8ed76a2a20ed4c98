"""One backbone for all tasks: what CONURE, HAT, PeterRec and Piggyback have in common."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from teracon_fast.data import Batch
from teracon_fast.methods.base import Method, StepContext
from teracon_fast.model.backbone import Backbone, EncodeUsers


class SharedBackbone(Method):
    """One backbone for all tasks, which runs with weights, masks or convolutions of the task's own.

    Attributes:
        backbone: the network.
    """

    backbone: Backbone

    def _start(self, task: int) -> None:
        if task == 0:
            self.backbone = self.new_backbone()

    @property
    def convolutions(self) -> list[nn.Parameter]:
        """The weights of the convolutions, `[f, f, 1, K]` each, in network order."""
        return [cast(nn.Parameter, self.backbone.site(site)[0].weight) for site in range(self.backbone.num_sites)]

    def backbone_options(self, task: int) -> dict[str, Any]:
        """`masks`, `weights` or `convolve` of `Backbone.run` for a task; of the present one as its phase of training has it."""
        return {}

    def loss(self, batch: Batch, context: StepContext) -> Tensor:
        """Cross-entropy of the present task."""
        return self.task_loss(self.task, self.backbone, batch, context, **self.backbone_options(self.task))

    def next_item_loss(self, batch: Batch) -> Tensor:
        return self.task_loss(0, self.backbone, batch, **self.backbone_options(0))

    @torch.no_grad()
    def encoder(self, task: int) -> EncodeUsers:
        self.check_task(task)
        return self.backbone.encoder(**self.backbone_options(task))
