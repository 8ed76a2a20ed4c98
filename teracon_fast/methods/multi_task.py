"""MTL: every later task is learned together with the first, from scratch."""

from __future__ import annotations

from torch import Tensor, nn

from teracon_fast.data import Batch
from teracon_fast.methods.base import Group, Sizes, StepContext, group
from teracon_fast.methods.single import SinMo


class MTL(SinMo):
    """A new network for every pair of task 0 and a later task; a step's loss is the sum of both tasks' (1:1).

    The paper pairs them since not all users of task 0 are in the other tasks, and reports no figure for task 0. Here task 0
    alone trains the network that serves it, as in SinMo, so that R has a first row; the pairs do not touch it.

    Attributes:
        backbones: one per task so far.
        first_head: of task 0 in the newest pair, a module list of one; no inference uses it. Empty while task 0 is in training.
    """

    name = "mtl"

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.first_head = nn.ModuleList()

    def _start(self, task: int) -> None:
        super()._start(task)
        if task:
            self.first_head = nn.ModuleList([self.new_head(self.head(0).out_features)])

    def inference_state(self) -> dict[str, Tensor]:
        """All but the head of task 0 in the newest pair."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("first_head.")}

    def companions(self) -> tuple[int, ...]:
        """Task 0, while another is in training."""
        return (0,) if self.task else ()

    def _groups(self, phase: str) -> list[Group]:
        return [group(self.backbone(self.task), self.head(self.task), self.first_head)]

    def loss(self, batch: Batch, context: StepContext) -> Tensor:
        """Cross-entropy of the present task, and of task 0 over a batch of its own."""
        backbone = self.backbone(self.task)
        loss = self.task_loss(self.task, backbone, batch, context)
        self.result.add("class_loss", loss)
        for head in self.first_head:
            assert isinstance(head, nn.Linear)
            first = self.task_loss(0, backbone, context.companions[0], head=head)
            self.result.add("first_task_loss", first)
            loss = loss + first
        return loss
