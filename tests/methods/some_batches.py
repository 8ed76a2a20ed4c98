"""What tests of methods share: batches, and parameters off their initial values."""

from __future__ import annotations

import torch

from teracon_fast.data import Batch
from teracon_fast.methods import Method
from teracon_fast.packing import real_lengths


def some_batch(items: int, labels: int, users: int = 12, length: int = 8, seed: int = 0) -> Batch:
    """Left-padded sequences, one of them all pads, and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(1, items, (users, length), generator=generator)
    for row in range(users):
        x[row, : row % (length + 1)] = 0
    return Batch(x, torch.randint(labels, (users,), generator=generator), real_lengths(x))


def shaken(method: Method, seed: int = 0) -> None:
    """Move all parameters off their initial values, so that no two are alike and heads tell states apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in method.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.3 * noise.to(parameter.dtype))
