"""The terms of the objective, the sampling ratio, the annealing of the mask scale."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from teracon_fast.errors import ConfigError, ShapeError


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Eq. 18: mean over the rows of -log softmax(logits)[target]. Pad targets (0) count like any others.

    Args:
        logits: [N, C]. targets: int64 [N].

    Returns:
        Scalar.
    """
    return F.cross_entropy(logits, targets)


def retention_loss(student_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], rho: Sequence[float]) -> Tensor:
    """Eq. 16 as published: sum_j rho_j / sum(rho) * mean((student_j - teacher_j)^2), mean over users and labels.

    Args:
        student_logits, teacher_logits: for each past task j, [n_j, C_j].
        rho: the ratio with which the users of each past task were drawn.

    Returns:
        Scalar.
    """
    if not len(student_logits) == len(teacher_logits) == len(rho) > 0:
        raise ShapeError(
            f"retention_loss: got {len(student_logits)} student logits, {len(teacher_logits)} teacher logits and "
            f"{len(rho)} ratios, expected one of each for each past task, at least one"
        )
    terms = [
        rho_j / sum(rho) * F.mse_loss(student, teacher)
        for rho_j, student, teacher in zip(rho, student_logits, teacher_logits, strict=True)
    ]
    return torch.stack(terms).sum()


def rho(teacher_masks: Tensor, current_masks: Tensor, c: float = 6.0) -> float:
    """Eq. 15: 1 - mean over the sites of sigmoid(c * cos(teacher's mask of j, current mask of i)); no gradient.

    Args:
        teacher_masks: masks of past task j in the teacher, [S, f].
        current_masks: masks of the current task i, [S, f].
        c: scale.

    Returns:
        rho_j. Masks are positive, so it lies in [1 - sigmoid(c), 0.5].
    """
    cosine = F.cosine_similarity(teacher_masks.detach(), current_masks.detach(), dim=1, eps=1e-6)
    # rho is a small difference from 1, so the mean is in float64, as in the published program.
    return 1.0 - float(torch.sigmoid(c * cosine).double().mean())


def annealed_scale(batch_index: int, num_batches: float, s_max: float = 50.0, parity: str = "official") -> float:
    """Eq. 19: the mask scale s of one batch, linear from 1/s_max, restarting every epoch.

    Args:
        batch_index: from 0 within the epoch.
        num_batches: samples / batch size, not rounded.
        s_max: scale at the end of an epoch and at inference.
        parity: "official" (published program): s = (s_max - 1/s_max) * b / (N/B) + 1/s_max, which ends one step short
            of s_max; "paper": (b-1)/(B-1) with b from 1 and B the number of batches (N/B rounded up), which ends at
            s_max. In both, s = 1/s_max in an epoch of one batch.
    """
    if parity == "official":
        progress = batch_index / num_batches
    elif parity == "paper":
        progress = batch_index / max(math.ceil(num_batches) - 1, 1)
    else:
        raise ConfigError(f"parity: got {parity!r}, expected official or paper")
    return (s_max - 1 / s_max) * progress + 1 / s_max
