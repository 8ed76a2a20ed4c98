"""Adam on an item embedding of which each step reads few rows: ours beside `torch.optim.Adam(fused=True)`.

    python -m bench.adam [--users 1024 32] [--rounds 3] [--quick] [--results FOLDER]

A step reads the rows of a batch of Zipf(1) items, forms the gradient and takes an optimizer step: ours brings the rows up to
date first, and sums the gradients of repeated items; PyTorch forms the dense gradient in memory that it keeps. Both take the
same steps, so the rows that they read must agree bit by bit on the CPU. Many untimed steps come first, until rows have missed
about as many as they ever do.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench import record
from bench.harness import CPU, Answer, Call, Case, measure
from teracon_fast import ops
from teracon_fast.optim.adam import Adam


@dataclass
class AdamStep(Case):
    """Steps of Adam. `head`: labels of a head whose gradient is dense; `earlier`: steps before the first one that is timed."""

    items: int = 646_000
    channels: int = 256
    users: int = 1024
    length: int = 47
    head: int = 0
    earlier: int = 120
    device: torch.device = CPU
    backend: str = "auto"

    name = "adam"
    sides = ("eager", "ours")

    def __post_init__(self) -> None:
        exact = self.device.type == "cpu"
        self.limits = {"": (0.0, 0.0) if exact else (1e-3, 1e-3)}  # type: ignore[misc]

    @property
    def title(self) -> str:
        return f"Adam, {self.items:,} items + head of {self.head:,} labels, {self.users:,} x {self.length} items read"

    def tiny(self) -> Case:
        return replace(self, items=500, channels=16, users=4, head=min(self.head, 8), earlier=1)

    def moved_bytes(self, side: str) -> float:
        """Parameter, both moments and gradient of the rows that are read, and of the head."""
        return 32.0 * self.channels * (self.users * self.length + self.head)

    def side(self, name: str) -> Call:
        generator, count = torch.Generator(self.device).manual_seed(0), self.users * self.length
        with self.device:
            start = torch.empty(self.items, self.channels).normal_(0.0, 1e-3, generator=generator)
            weight, head = nn.Parameter(start), nn.Parameter(torch.zeros(self.head, self.channels))
            pool = 1e-4 * torch.randn(2 * count, self.channels, generator=generator)
            zipf = 1 / torch.arange(1, self.items + 1, dtype=torch.float64)
        trained, batch = [weight, head] if self.head else [weight], list[Tensor]()
        head.grad = torch.full_like(head, 1e-4)
        optimizer: Any = torch.optim.Adam(trained, fused=True)
        if name == "ours":
            optimizer = Adam(trained, fused=True, lazy=True, backend=self.backend)
        else:
            weight.grad = torch.zeros_like(weight)

        def draw() -> None:
            first = int(torch.randint(count, (), generator=generator, device=self.device))
            batch[:] = [torch.multinomial(zipf, count, True, generator=generator), pool[first : first + count]]

        def run() -> Answer:
            drawn, gradient = batch
            if name == "ours":
                weight.grad = None
                rows = ops.embedding_rows(weight, drawn, sparse=True)
                rows.backward(gradient)
            else:
                rows = weight.detach()[drawn]
                assert weight.grad is not None
                weight.grad.zero_().index_add_(0, drawn, gradient)
            optimizer.step()
            return {"rows": rows}

        for _ in range(self.earlier):
            draw()
            run()
        return Call(run, draw)


def main(arguments: Sequence[str] | None = None) -> int:
    users = {"type": int, "nargs": "+", "default": [1024, 32], "help": "of a batch (1024 32)"}
    given = record.parse(__doc__, arguments, users=users)
    report = record.Report("adam", given)
    for number in given.users:
        case = AdamStep(users=number)
        report.add(measure(case.tiny() if given.quick else case, given.rounds, given.budget, apart=True))
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
