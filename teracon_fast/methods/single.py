"""SinMo: for every task a network of its own, trained from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
from torch import Tensor, nn

from teracon_fast.data import Batch
from teracon_fast.methods.base import Group, Method, Place, Sizes, group
from teracon_fast.model.backbone import Backbone


class SinMo(Method):
    """A new network without masks for every task: nothing is shared, so nothing is forgotten and nothing transferred.

    Attributes:
        backbones: one per task so far.
    """

    name = "sinmo"

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

    def loss(self, batch: Batch, place: Place, companions: Mapping[int, Batch]) -> Tensor:
        """Cross-entropy of the present task."""
        return self.task_loss(self.task, self.backbone(self.task), batch)

    def encode(self, x: Tensor, task: int, drop_last: int = 0, lengths: np.ndarray | None = None) -> Tensor:
        """By the task's own network."""
        with self.inference(task):
            return self.backbone(task).represent(x, None, drop_last, lengths)
