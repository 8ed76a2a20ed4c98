"""Task embeddings -> masks of one site (one of the two convolutions of a residual block)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from teracon_fast.errors import ConfigError, ShapeError

VARIANTS = ("relation", "positive_only", "none")


def check_variant(variant: str) -> None:
    """Raise ConfigError unless `variant` is one of "relation", "positive_only", "none"."""
    if variant not in VARIANTS:
        raise ConfigError(f"mask variant: got {variant!r}, expected one of {', '.join(VARIANTS)}")


def num_relation_weights(num_tasks: int, variant: str = "relation") -> int:
    """Relation weights of one mask: 2T-1 for "relation" (Eq. 12), T for "positive_only", 0 for "none"."""
    check_variant(variant)
    return {"relation": 2 * num_tasks - 1, "positive_only": num_tasks, "none": 0}[variant]


def plain_masks(task_embedding: Tensor, s: float) -> Tensor:
    """Eq. 6: m = sigmoid(s * e), elementwise, any shape (for example [S, f] or [S, T, f])."""
    return torch.sigmoid(s * task_embedding)


def relation_rows(task_embeddings: Tensor, task: int, variant: str = "relation") -> Tensor:
    """The rows inside tanh in Eq. 12 and 13: [e_t ; e_i, -e_i for every i != t, ascending].

    Args:
        task_embeddings: [T, f], one site.
        task: t, counted from 0.
        variant: "positive_only" omits the rows -e_i.

    Returns:
        [2T-1, f], or [T, f] for "positive_only".
    """
    rows = [task_embeddings[task]]
    for other in range(len(task_embeddings)):
        if other != task:
            rows.append(task_embeddings[other])
            if variant == "relation":
                rows.append(-task_embeddings[other])
    return torch.stack(rows)


def relation_mask(
    task_embeddings: Tensor, weight: Tensor | None, bias: Tensor | None, task: int, s: float, variant: str = "relation"
) -> Tensor:
    """Eq. 12: m_t = sigmoid(s * (w_t @ tanh(s * rows) + b_t)), one site.

    Args:
        task_embeddings: [T, f].
        weight: w_t, [2T-1]; [T] for "positive_only" (own row first, then the others ascending); unused for "none".
        bias: b_t, scalar; unused for "none".
        task: t, counted from 0.
        s: mask scale.
        variant: "relation" (Eq. 12), "positive_only" (Eq. 13 without its negated half), "none" (Eq. 6).

    Returns:
        [f].

    Raises:
        ConfigError: unknown variant. ShapeError: weight of the wrong length for the variant.
    """
    expected = num_relation_weights(len(task_embeddings), variant)
    if variant == "none":
        return plain_masks(task_embeddings[task], s)
    if weight is None or bias is None or weight.shape != (expected,):
        got = None if weight is None else list(weight.shape)
        raise ShapeError(
            f"relation weights of {len(task_embeddings)} tasks, variant {variant}: got {got}, expected [{expected}]"
        )
    u = torch.tanh(s * relation_rows(task_embeddings, task, variant))
    # w @ u + b, as a linear layer over the channels: the published program's order of summation, bit for bit.
    return torch.sigmoid(s * F.linear(u.t(), weight.unsqueeze(0), bias.reshape(1)).squeeze(1))
