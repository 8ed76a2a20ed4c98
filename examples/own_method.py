"""Your own method and your own data set, in the paper's Table 2 beside SinMo and FineAll.

    python examples/own_method.py OUTPUT                  # makes the data set, trains all three methods, writes the table
    teracon reproduce table2 --plugin examples/own_method.py --methods sinmo,head_only --data OUTPUT/data --output OUTPUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from torch import Tensor

from teracon_fast.data import Batch, DatasetWriter
from teracon_fast.methods import METHODS, EncodeUsers, Group, Method, StepContext, group
from teracon_fast.model.backbone import Backbone
from teracon_fast.reproduce import Choices, reproduce


class HeadOnly(Method):
    """Task 0 trains a network, which is then frozen; later tasks train only their heads. So nothing is forgotten."""

    name = "head_only"

    def _start(self, task: int) -> None:
        if task == 0:
            self.backbone: Backbone = self.new_backbone()

    def _groups(self, phase: str) -> list[Group]:
        return [group(self.head(self.task), *([self.backbone] if self.task == 0 else []))]

    def loss(self, batch: Batch, context: StepContext) -> Tensor:
        return self.task_loss(self.task, self.backbone, batch, context)

    def encoder(self, task: int) -> EncodeUsers:
        self.check_task(task)
        return self.backbone.encoder()


def write_data(folder: Path) -> None:
    """Users who walk up or down a row of 40 items; task 2 asks for the next but one, task 3 for the direction."""
    up, starts = np.random.default_rng(0).integers(0, [[2], [40]], (2, 300))
    items = (starts[:, None] + np.where(up, 1, -1)[:, None] * np.arange(10)) % 40 + 101  # any ids but 0, which is the pad
    with DatasetWriter(folder, name="walks", length=10) as writer:
        writer.add_task("next", "next_item", items, groups=np.arange(300))
        writer.add_task("later", "label", items, labels=(items[:, -1] - 101 + np.where(up, 2, -2)) % 40 + 101)
        writer.add_task("direction", "label", items, labels=np.where(up, "up", "down"))


METHODS[HeadOnly.name] = HeadOnly

if __name__ == "__main__":
    output = Path(sys.argv[1])
    if not (output / "data").exists():
        write_data(output / "data")
    methods = ("sinmo", "fine_all", HeadOnly.name)  # each run is a process, which finds the method in this file
    choices = Choices(output / "data", output, methods, plugins=(Path(__file__),), quick=True)
    print(reproduce("table2", choices).files[0].read_text("utf-8"))
