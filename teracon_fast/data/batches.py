"""Batches of an epoch, determined by (seed, epoch), and the tensors of a batch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from teracon_fast.data.store import TaskData
from teracon_fast.errors import ConfigError

Indices = npt.NDArray[np.int64]


def epoch_batches(
    indices: npt.NDArray[np.integer], batch_size: int, seed: int, epoch: int, shuffle: bool = True, drop_last: bool = False
) -> list[Indices]:
    """The batches of one epoch over `indices`, each index once: int64 arrays of sample indices.

    Depends on the arguments only, so a run that stopped at batch k resumes with `epoch_batches(...)[k:]`.

    Args:
        indices: [n] sample indices (a part of a `Split`).
        batch_size: at least 1.
        seed, epoch: non-negative; choose the order.
        shuffle: False keeps the order of `indices`.
        drop_last: leave out an incomplete last batch.

    Raises:
        ConfigError: batch size below 1, negative seed or epoch.
    """
    if batch_size < 1:
        raise ConfigError(f"got batch_size {batch_size}; expected at least 1")
    if seed < 0 or epoch < 0:
        raise ConfigError(f"got seed {seed} and epoch {epoch}; expected non-negative integers")
    order = np.asarray(indices, dtype=np.int64)
    if shuffle:
        order = np.random.Generator(np.random.PCG64([seed, epoch, 1])).permutation(order)
    if drop_last:
        order = order[: len(order) // batch_size * batch_size]
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def fetch(task: TaskData, sample_indices: npt.NDArray[np.integer]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences and labels of some samples, copied into memory.

    Args:
        task: the task.
        sample_indices: [B] integers in [0, S), in any order, repeats allowed.

    Returns:
        x int64 [B, L] item indices, left-padded with 0, and y int64 [B] label indices.

    Raises:
        IndexError: an index outside [0, S).
    """
    rows, labels = rows_and_labels(task, sample_indices)
    return torch.from_numpy(task.sequences[rows].astype(np.int64)), torch.from_numpy(labels)


def rows_and_labels(task: TaskData, sample_indices: npt.NDArray[np.integer]) -> tuple[Indices, Indices]:
    """Row and label of some samples, int64 [B] each; IndexError outside [0, S)."""
    sample_indices = np.asarray(sample_indices)
    if len(sample_indices) and sample_indices.min() < 0:
        raise IndexError(f"sample index {sample_indices.min()}; expected 0 to {len(task.samples) - 1}")
    rows, labels = task.samples[sample_indices].T.astype(np.int64, order="C")
    return rows, labels
