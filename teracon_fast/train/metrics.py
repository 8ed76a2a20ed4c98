"""Metrics of one task from the ranks of its targets, and of a task sequence from the matrix R.

A rank counts from 0: the number of labels with a strictly higher score, plus the equal ones at a lower index. The ranks
of a whole test set are one int64 tensor, whatever the batches they came from, so every sample counts, also those of the
last partial batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teracon_fast.errors import ConfigError, ShapeError

CUTOFFS = (5, 20)
SELECTABLE = ("hit@1", *(f"{name}@{k}" for k in CUTOFFS for name in ("mrr", "hit", "ndcg")))
RANKING_LABELS = 20  # a task with more labels than this is ranked; with fewer its accuracy is reported


def _checked(ranks: Tensor) -> Tensor:
    if ranks.dtype != torch.int64 or ranks.dim() != 1 or ranks.numel() == 0:
        raise ShapeError(f"ranks: got {ranks.dtype} {list(ranks.shape)}, expected int64 [N] with N >= 1")
    if int(ranks.min()) < 0:
        raise ShapeError(f"ranks: got {int(ranks.min())}, expected ranks from 0")
    return ranks


def hit(ranks: Tensor, k: int) -> float:
    """Share of the samples whose target is among the first k. ranks: int64 [N]."""
    return (_checked(ranks) < k).double().mean().item()


def ranking_metrics(ranks: Tensor) -> dict[str, float]:
    """hit@1, and MRR, hit and NDCG at 5 and at 20 (one target per sample, so the ideal DCG is 1), each from 0 to 1.

    Args:
        ranks: int64 [N], any device.

    Raises:
        ShapeError: not int64 [N], no sample, or a negative rank.
    """
    metrics = {"hit@1": hit(ranks, 1)}
    position = ranks.double() + 1
    for k in CUTOFFS:
        inside = ranks < k
        metrics[f"mrr@{k}"] = torch.where(inside, 1 / position, 0.0).mean().item()
        metrics[f"hit@{k}"] = hit(ranks, k)
        metrics[f"ndcg@{k}"] = torch.where(inside, 1 / torch.log2(position + 1), 0.0).mean().item()
    return metrics


def task_metrics(ranks: Tensor, num_labels: int) -> dict[str, float]:
    """What is reported of one task: `ranking_metrics` above 20 labels, else its accuracy (also named hit@1).

    Args:
        ranks: int64 [N], ranks among all labels of the task.
        num_labels: C_t.

    Raises:
        ShapeError: bad ranks, or a rank that `num_labels` labels cannot give.
    """
    if int(_checked(ranks).max()) >= num_labels:
        raise ShapeError(f"ranks: got {int(ranks.max())}, expected ranks below num_labels = {num_labels}")
    if num_labels > RANKING_LABELS:
        return ranking_metrics(ranks)
    accuracy = hit(ranks, 1)
    return {"accuracy": accuracy, "hit@1": accuracy}


def headline(num_labels: int) -> str:
    """The metric that stands for a task in R: "mrr@5" above 20 labels, else "accuracy"."""
    return "mrr@5" if num_labels > RANKING_LABELS else "accuracy"


def selection_value(metrics: Mapping[str, float], select: str = "hit@1") -> float:
    """The value by which the best epoch is chosen; a task that is not ranked has its accuracy for every choice.

    Args:
        metrics: of one task, from `task_metrics`.
        select: one of SELECTABLE, "hit@1" (published program) or for example "mrr@5".

    Raises:
        ConfigError: another name.
    """
    if select in metrics:
        return metrics[select]
    if "accuracy" in metrics and select in SELECTABLE:
        return metrics["accuracy"]
    raise ConfigError(f"select: got {select!r}, expected one of {', '.join(SELECTABLE)}")


def result_matrix(rows: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """R as float64 [M, M]: R[j, i] is the test metric of task i after training task j, NaN where i > j.

    Args:
        rows: row j holds the metric of tasks 0..j, so j+1 values.
    """
    matrix = np.full((len(rows), len(rows)), np.nan)
    for j, row in enumerate(rows):
        if len(row) != j + 1:
            raise ShapeError(f"R: got {len(row)} values in row {j}, expected {j + 1}, one for each task trained so far")
        matrix[j, : j + 1] = row
    return matrix


def _relative_change(now: NDArray[np.float64], before: NDArray[np.float64]) -> NDArray[np.float64]:
    """100 * (now - before) / before; NaN where `before` is 0 or not known."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(before != 0, 100 * (now - before) / before, np.nan)


def _square(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise ShapeError(f"R: got {list(matrix.shape)}, expected [M, M] with M >= 1")
    return matrix


def backward_transfer(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """BWT_i = 100 * (R[M, i] - R[i, i]) / R[i, i] in percent: what later tasks did to task i.

    Args:
        matrix: R, [M, M], see `result_matrix`.

    Returns:
        float64 [M]; 0 for the last task, NaN where R[i, i] is 0.
    """
    matrix = _square(matrix)
    return _relative_change(matrix[-1], np.diagonal(matrix))


def forward_transfer(matrix: NDArray[np.float64], single: Sequence[float]) -> NDArray[np.float64]:
    """FWT_i = 100 * (R[i, i] - SinMo_i) / SinMo_i in percent: what earlier tasks did for task i.

    Args:
        matrix: R, [M, M], see `result_matrix`.
        single: SinMo, the metric of each task when a model is trained on it alone, [M]; NaN where it was not measured.

    Returns:
        float64 [M]; NaN where SinMo is 0 or NaN.
    """
    matrix, alone = _square(matrix), np.asarray(single, dtype=np.float64)
    if alone.shape != (len(matrix),):
        raise ShapeError(f"single: got {list(alone.shape)}, expected [{len(matrix)}], one value for each task")
    return _relative_change(np.diagonal(matrix), alone)


def gem_backward_transfer(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """R[M, i] - R[i, i] of every task but the last, in units of the metric; their mean is the backward transfer of GEM
    (Lopez-Paz and Ranzato 2017, "Gradient Episodic Memory") and of Avalanche.

    Args:
        matrix: R, [M, M], see `result_matrix`.

    Returns:
        float64 [M - 1].
    """
    matrix = _square(matrix)
    return (matrix[-1] - np.diagonal(matrix))[:-1]


def forgetting(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The best R[j, i] of any j before M, less R[M, i], of every task but the last, in units of the metric; their mean is the
    forgetting of Chaudhry et al. (2018, "Riemannian Walk for Incremental Learning").

    Args:
        matrix: R, [M, M], see `result_matrix`.

    Returns:
        float64 [M - 1].
    """
    matrix = _square(matrix)
    if len(matrix) == 1:
        return np.empty(0)
    return np.asarray(np.fmax.reduce(matrix[:-1, :-1], axis=0) - matrix[-1, :-1])
