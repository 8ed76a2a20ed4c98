"""The methods' networks in eager, dense form: every position of every sequence, all logits, no packed rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from teracon_fast.reference.model import causal_conv

Addend = Callable[[int, Tensor], Tensor]


class Backbone(Protocol):
    """What is read of a backbone: its parameters, under the published names."""

    channels: int
    dilations: tuple[int, ...]

    @property
    def embeding(self) -> nn.Embedding: ...

    def site(self, number: int) -> tuple[nn.Conv2d, nn.LayerNorm]: ...


class Batch(Protocol):
    """What is read of a batch: sequences int64 `[B, L]`, labels int64 `[B]`."""

    @property
    def x(self) -> Tensor: ...

    @property
    def y(self) -> Tensor: ...


def dense_states(
    backbone: Backbone, x: Tensor, masks: Tensor | None = None, weights: Sequence[Tensor] | None = None,
    pre_activation: bool = False, addend: Addend | None = None,
) -> Tensor:  # fmt: skip
    """States of all positions, `[B, L, f]`.

    Args:
        backbone: provides the parameters only.
        x: int64 `[B, L]` item ids.
        masks: `[S, f]`, multiplied with the convolutions' outputs; None: ones.
        weights: S tensors `[f, f, 1, K]` instead of the backbone's own.
        pre_activation: LayerNorm and ReLU before the convolution, without masks.
        addend: called with (site, input of the convolution `[B, L, f]`); its result is added before LayerNorm.
    """
    hidden = F.embedding(x, backbone.embeding.weight)
    for i, dilation in enumerate(backbone.dilations):
        inner = hidden
        for number in (2 * i, 2 * i + 1):
            conv, norm = backbone.site(number)
            assert conv.bias is not None
            weight = conv.weight if weights is None else weights[number]
            step, shape = dilation * (1 + number % 2), (backbone.channels,)
            if pre_activation:
                inner = F.relu(F.layer_norm(inner, shape, norm.weight, norm.bias, norm.eps))
                inner = causal_conv(inner, weight, conv.bias, step)
                continue
            added = None if addend is None else addend(number, inner)
            inner = causal_conv(inner, weight, conv.bias, step)
            inner = inner if added is None else inner + added
            inner = F.relu(F.layer_norm(inner, shape, norm.weight, norm.bias, norm.eps))
            inner = inner if masks is None else masks[number] * inner
        hidden = hidden + inner
    return hidden


def dense_loss(
    task: int, backbone: Backbone, head: nn.Linear, batch: Batch, masks: Tensor | None = None,
    weights: Sequence[Tensor] | None = None, pre_activation: bool = False, addend: Addend | None = None,
) -> Tensor:  # fmt: skip
    """Cross-entropy over all labels: of the next item at all positions (task 0), or at the last position. See `dense_states`."""
    how = masks, weights, pre_activation, addend
    if task == 0:
        logits = head(dense_states(backbone, batch.x[:, :-1], *how))
        return F.cross_entropy(logits.flatten(0, 1), batch.x[:, 1:].flatten())
    return F.cross_entropy(head(dense_states(backbone, batch.x, *how)[:, -1]), batch.y)


def patch_addend(down: Sequence[nn.Linear], up: Sequence[nn.Linear], slope: float) -> Addend:
    """PeterRec's parallel patches as an addend: `up(leaky_relu(down(input)))`, one pair per site."""
    return lambda site, inner: up[site](F.leaky_relu(down[site](inner), slope))
