"""Low-rank gradients: kept as factors, `left @ right`, and formed some rows at a time when they are used.

The retention loss of n users gives a head's weight `[C, f]` a gradient of rank n: `[C, n]` times `[n, f]`. With hundreds of
thousands of labels, writing and reading that product takes a good part of a step. `optim.Adam` computes some rows at a time, uses
them while they are in the cache, and never stores the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Rows of a product that stay in the cache until they are used: 4 MiB of 256 channels.
_ROWS = 4096


class Factors(NamedTuple):
    """`left [C, n] @ right [n, f]`, float32."""

    left: Tensor
    right: Tensor


def accumulate(parameter: Tensor, factors: Factors) -> None:
    """Add a part to a parameter's low-rank gradient, which stands beside `parameter.grad` until `clear`."""
    parameter.low_rank_grad = (*parts_of(parameter), factors)  # type: ignore[attr-defined]


def parts_of(parameter: Tensor) -> tuple[Factors, ...]:
    """The parts of a parameter's low-rank gradient, whose sum it is."""
    found: tuple[Factors, ...] = getattr(parameter, "low_rank_grad", ())
    return found


def clear(parameter: Tensor) -> None:
    """Forget a parameter's low-rank gradient."""
    if parts_of(parameter):
        del parameter.low_rank_grad  # type: ignore[attr-defined]


def products(parts: tuple[Factors, ...]) -> Iterator[tuple[slice, Tensor]]:
    """The sum of the products, some rows at a time: which rows, and their values, valid until the next ones are asked for."""
    rows, channels = len(parts[0].left), parts[0].right.shape[1]
    room = torch.empty(min(_ROWS, rows), channels)
    for low in range(0, rows, _ROWS):
        part = slice(low, min(low + _ROWS, rows))
        values = torch.mm(parts[0].left[part], parts[0].right, out=room[: part.stop - low])
        for left, right in parts[1:]:
            values.addmm_(left[part], right)
        yield part, values


def dense(parts: tuple[Factors, ...]) -> Tensor:
    """The sum of the products, `[C, f]`."""
    return torch.cat([values.clone() for _, values in products(parts)])
