"""What methods that mask weights compute, in eager dense form: every position of every sequence, weights given from outside."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from teracon_fast.backbone import Backbone
from teracon_fast.data import Batch
from teracon_fast.methods import Method
from teracon_fast.packing import real_lengths
from teracon_fast.reference.model import causal_conv


def batch_of(lengths: list[int], length: int, items: int, labels: int, seed: int = 0) -> Batch:
    """Left-padded sequences with the given numbers of real items, and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(len(lengths), length, dtype=torch.int64)
    for row, real in enumerate(lengths):
        x[row, length - real :] = torch.randint(1, items, (real,), generator=generator)
    return Batch(x, torch.randint(0, labels, (len(lengths),), generator=generator), real_lengths(x))


def dense_states(backbone: Backbone, x: Tensor, weights: list[Tensor], pre_activation: bool = False) -> Tensor:
    """States of all positions, `[B, L, f]`."""
    state: Tensor = backbone.embeding.weight[x]
    for i, (block, dilation) in enumerate(zip(backbone.blocks, backbone.dilations, strict=True)):
        before, hidden = state, state
        for site, norm in ((0, block.ln1), (1, block.ln2)):
            bias = (block.conv1, block.conv2)[site].bias
            assert bias is not None
            step, weight = dilation * (site + 1), weights[2 * i + site]
            if pre_activation:
                hidden = causal_conv(F.relu(norm(hidden)), weight, bias, step)
            else:
                hidden = F.relu(norm(causal_conv(hidden, weight, bias, step)))
        state = hidden + before
    return state


def dense_loss(
    method: Method, backbone: Backbone, batch: Batch, weights: list[Tensor], pre_activation: bool = False
) -> Tensor:
    """Cross-entropy of the present task: of task 0 over the next item at all positions, of others over the labels."""
    head = method.head(method.task)
    if method.task == 0:
        states = dense_states(backbone, batch.x[:, :-1], weights, pre_activation)
        return F.cross_entropy(head(states).flatten(0, 1), batch.x[:, 1:].flatten())
    return F.cross_entropy(head(dense_states(backbone, batch.x, weights, pre_activation)[:, -1]), batch.y)


def dense_encoded(
    backbone: Backbone, x: Tensor, weights: list[Tensor], drop_last: int = 0, pre_activation: bool = False
) -> Tensor:
    """States of the last position after dropping items from the end, `[B, f]`."""
    seen = x[:, : x.shape[1] - drop_last]
    with torch.no_grad():
        return dense_states(backbone, seen, weights, pre_activation)[:, -1]


def gradients(method: Method) -> dict[str, Tensor]:
    """Gradients of all parameters that have one; then none has."""
    found = {name: p.grad.to_dense().clone() for name, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    return found


def snapshot(method: Method) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    return {name: value.clone() for name, value in method.state_dict().items()}


def changed(before: dict[str, Tensor], method: Method) -> set[str]:
    """Names of what is no longer bit-identical."""
    now = method.state_dict()
    return {name for name, value in before.items() if not np.array_equal(value.numpy(), now[name].numpy())}
