"""Tables built on the device by Triton kernels."""

from __future__ import annotations

import torch

from teracon_fast.kernels import packing as kernels
from teracon_fast.packing import PackedBatch, Plan


def tables(plan: Plan, device: torch.device, padded: bool) -> PackedBatch:
    """As `ops.pack`."""
    return kernels.pack(plan, device, padded)
