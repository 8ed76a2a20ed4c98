"""Training steps of the methods that TERACON is compared with, beside their eager dense forms, at the TTL shape.

    python -m bench.methods [--only METHOD] [--compile] [--rounds 3] [--quick] [--results FOLDER]

Each method learns task 1 (the next item, B = 32, 20,000 items) and task 2 (2,000 labels, B = 256). A step is the forward and the
backward pass, what the method does to gradients, Adam, and what the method does after it. Sides are the same method from the same
weights; PyTorch's compute every position of every sequence and all logits. TERACON's own step is in `make bench`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench import record, steps
from bench.harness import Call, Case, Operations, measure
from bench.shapes import TINY, TTL, Shape


@dataclass
class MethodStep(Case):
    """A step of a method's first or second task (0 or 1)."""

    shape: Shape
    method: str
    task: int
    options: Mapping[str, Any] = field(default_factory=dict)
    sides: tuple[str, ...] = ("eager", "ours")

    def __post_init__(self) -> None:
        self.name = " ".join([self.method, *map(str, self.options.values()), f"task {self.task + 1}"])
        self.users = self.shape.batch if self.task else self.shape.first_batch

    @property
    def title(self) -> str:
        return f"{self.name}, B={self.users}"

    def operations(self, side: str) -> Operations:
        """Three times the forward pass, but twice where convolutions are frozen; PeterRec's patches are left out."""
        shape, users = self.shape, self.shape.batch
        first = shape.next_item(shape.first_batch) * 3
        encoder = shape.encoder(shape.pack(shape.lengths(users)), users * shape.length)
        second = encoder * (2 if self.method == "peterrec" else 3) + shape.head(users, shape.labels[1]) * 3
        return first if self.task == 0 else first + second if self.method == "mtl" else second

    def side(self, name: str) -> Call:
        def compiled(function: Any) -> Any:
            return torch.compile(function, backend=self.shape.compiler, dynamic=False) if name == "compile" else function

        return Call(steps.method_step(self.method, self.options, self.task, self.shape, name != "ours", compiled))


def cases(shape: Shape, sides: tuple[str, ...]) -> list[MethodStep]:
    """All methods, and CONURE with its original's block too. Before their second task the other methods are SinMo."""
    kinds: list[tuple[str, Mapping[str, Any]]] = [(name, {}) for name in steps.NAMES]
    kinds.insert(steps.NAMES.index("conure") + 1, ("conure", {"block": "pre-activation"}))
    own_first_step = ("sinmo", "hat")
    return [
        MethodStep(shape, name, task, options, sides)
        for name, options in kinds for task in (0, 1) if task or options or name in own_first_step
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    compiled = {"action": "store_true", "help": "torch.compile of the eager form too (slow)"}
    given = record.parse(__doc__, arguments, only=steps.NAMES, compile=compiled)
    shape, report = TINY if given.quick else TTL, record.Report("methods", given)
    for case in cases(shape, ("eager", "compile", "ours") if given.compile else ("eager", "ours")):
        if case.method in given.only:
            report.add(measure(case, given.rounds, given.budget / 4))
    return report.close(shape=shape)


if __name__ == "__main__":
    sys.exit(main())
