"""A backbone run densely, every position of every sequence, by plain PyTorch: what methods on packed rows are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from teracon_fast.backbone import Backbone
from teracon_fast.reference.model import causal_conv


def dense_states(
    backbone: Backbone, x: Tensor, weights: Sequence[Tensor] | None = None,
    addend: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """States of all positions, `[B, L, f]`, of sequences int64 `[B, L]`.

    Args:
        weights: of the convolutions, in place of their own.
        addend: called with (site, the convolution's input `[B, L, f]`); what it returns is added before LayerNorm.
    """

    def layer(site: int, state: Tensor, dilation: int) -> Tensor:
        conv, norm = backbone.site(site)
        assert conv.bias is not None
        out = causal_conv(state, conv.weight if weights is None else weights[site], conv.bias, dilation)
        if addend is not None:
            out = out + addend(site, state)
        return F.layer_norm(out, out.shape[-1:], norm.weight, norm.bias, norm.eps).relu()

    state = backbone.embeding.weight[x]
    for block, dilation in enumerate(backbone.dilations):
        inner = layer(2 * block, state, dilation)
        state = layer(2 * block + 1, inner, 2 * dilation) + state
    return state
