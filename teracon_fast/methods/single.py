"""SinMo: for every task a network of its own, trained from scratch."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from teracon_fast.data import Batch
from teracon_fast.methods.base import Group, Method, Sizes, StepContext, group
from teracon_fast.model.backbone import Backbone, EncodeUsers


class SinMo(Method):
    """A new network without masks for every task: nothing is shared, so nothing is forgotten or transferred.

    Attributes:
        backbones: one per task so far.
    """

    name = "sinmo"
    growth_refusal = "every task has item embeddings of its own, and rows of new items are fitted with task 1 only"

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.backbones = nn.ModuleList()

    def backbone(self, task: int) -> Backbone:
        """The network of a task."""
        return cast(Backbone, self.backbones[task])

    def _start(self, task: int) -> None:
        self.backbones.append(self.new_backbone())

    def _groups(self, phase: str) -> list[Group]:
        return [group(self.backbone(self.task), self.head(self.task))]

    def loss(self, batch: Batch, context: StepContext) -> Tensor:
        """Cross-entropy of the present task."""
        return self.task_loss(self.task, self.backbone(self.task), batch, context)

    def encoder(self, task: int) -> EncodeUsers:
        """By the task's own network."""
        self.check_task(task)
        return self.backbone(task).encoder()
