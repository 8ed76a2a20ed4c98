"""FineAll: every task fine-tunes a copy of the first task's network."""

from __future__ import annotations

import copy

from teracon_fast.methods.single import SinMo


class FineAll(SinMo):
    """Task 0 trains a network; each later task starts from a copy of it and a new head, and trains all of both.

    The copies are independent of each other, so nothing is forgotten: as many networks as tasks.
    """

    name = "fine_all"

    def _start(self, task: int) -> None:
        self.backbones.append(copy.deepcopy(self.backbone(0)) if task else self.new_backbone())
