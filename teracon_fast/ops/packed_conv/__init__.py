"""Dilated causal convolution on packed rows without normalization, mask or activation, with an optional residual."""

from teracon_fast.ops.packed_conv.api import packed_conv

__all__ = ["packed_conv"]
