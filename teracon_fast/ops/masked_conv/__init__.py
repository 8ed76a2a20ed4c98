"""Masked dilated causal convolution on packed rows, with LayerNorm, ReLU, output mask and residual in one operation."""

from teracon_fast.ops.masked_conv.api import ALGORITHMS, masked_conv

__all__ = ["ALGORITHMS", "masked_conv"]
