"""The eager dense form of a backbone: every position of every sequence, plain PyTorch, no packed rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teracon_fast.backbone import Backbone
from teracon_fast.data import Batch
from teracon_fast.methods import Method
from teracon_fast.packing import real_lengths
from teracon_fast.reference.model import causal_conv


def dense_states(
    backbone: Backbone, x: Tensor, masks: Tensor | None = None, weights: Sequence[Tensor] | None = None,
    pre_activation: bool = False, addend: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """States of all positions, `[B, L, f]`. masks: `[S, f]`; weights: S tensors `[f, f, 1, K]`.

    pre_activation: LayerNorm and ReLU come before the convolution, and nothing is masked.
    addend: called with (site, the convolution's input `[B, L, f]`), what it returns is added before LayerNorm.
    """
    hidden = F.embedding(x, backbone.embeding.weight)
    for i, dilation in enumerate(backbone.dilations):
        inner = hidden
        for number in (2 * i, 2 * i + 1):
            conv, norm = backbone.site(number)
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
    weights: Sequence[Tensor] | None = None, pre_activation: bool = False,
) -> Tensor:  # fmt: skip
    """Cross-entropy with all logits: of the next item at all positions (task 0), or of the last state."""
    if task == 0:
        logits = head(dense_states(backbone, batch.x[:, :-1], masks, weights, pre_activation))
        return F.cross_entropy(logits.flatten(0, 1), batch.x[:, 1:].flatten())
    return F.cross_entropy(head(dense_states(backbone, batch.x, masks, weights, pre_activation)[:, -1]), batch.y)


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
