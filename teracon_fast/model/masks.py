"""Annealing of the mask scale."""

from __future__ import annotations

import math
from typing import Literal

Parity = Literal["official", "paper"]


def annealed_scale(batch_index: int, num_batches: float, s_max: float = 50.0, parity: Parity = "official") -> float:
    """Mask scale s of a training step, rising over an epoch from 1/s_max towards s_max (Eq. 19).

    Args:
        batch_index: from 0, restarted each epoch.
        num_batches: samples / batch size, not rounded.
        s_max: scale of inference.
        parity: "official" divides by `num_batches`; "paper" by the number of batches less one, so the last batch has s_max.
    """
    low = 1.0 / s_max
    if parity == "official":
        return (s_max - low) * batch_index / num_batches + low
    last = math.ceil(num_batches) - 1
    return low + (s_max - low) * (batch_index / last if last else 0.0)
