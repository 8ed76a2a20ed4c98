"""Batches of a task on the device of a model: gathered from sequences resident there if they fit, else copied from pinned
memory.

A batch is made in two steps: `prepare` reads and pins, usually in a prefetch thread; `load` only queues work on the device and
never waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from teracon_fast.data.batches import fetch, rows_and_labels
from teracon_fast.data.store import TaskData
from teracon_fast.packing import real_lengths

# Share of a device's free memory that a task's sequences may take.
RESIDENT_SHARE = 0.25


class Batch(NamedTuple):
    """Some samples of a task.

    Attributes:
        x: int64 `[B, L]` item ids, left-padded with 0. y: int64 `[B]`. Both on the model's device.
        lengths: int64 `[B]` on the CPU: `packing.real_lengths(x)`.
    """

    x: Tensor
    y: Tensor
    lengths: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Prepared:
    """A batch before `load`: `x` int32 or int64 `[B, L]`, the sequences, or int64 `[B]`, their rows among the resident ones."""

    x: Tensor
    y: Tensor
    lengths: npt.NDArray[np.int64]


class BatchSource:
    """Batches of one task for one device.

    Args:
        data: the task.
        device: device of the batches.
        resident: whether all sequences, `4 * N * L` bytes, stay in the device's memory; None: if they take at most a quarter of
            what is free there now, and never on the CPU, where the files are memory-mapped already.
    """

    def __init__(self, data: TaskData, device: torch.device, resident: bool | None = None) -> None:
        self._data, self._device = data, device
        resident = _fits(data, device) if resident is None else resident
        self._sequences = torch.from_numpy(np.array(data.sequences)).to(device) if resident else None

    @property
    def resident(self) -> bool:
        """Whether all sequences are in the device's memory."""
        return self._sequences is not None

    def prepare(self, samples: npt.NDArray[np.int64]) -> Prepared:
        """The batch of samples `[B]`, as far as the CPU can prepare it.

        Raises:
            IndexError: a sample outside [0, S).
        """
        if self._sequences is None:
            x, y = fetch(self._data, samples)
            lengths = real_lengths(x)
            # Half the bytes to copy; on the CPU nothing is copied.
            x = x if self._device.type == "cpu" else x.to(torch.int32)
        else:
            rows, labels = rows_and_labels(self._data, samples)
            x, y = torch.from_numpy(rows), torch.from_numpy(labels)
            lengths = self._data.lengths[rows].astype(np.int64)
        return Prepared(self._pinned(x), self._pinned(y), lengths)

    def load(self, prepared: Prepared) -> Batch:
        """The batch on the device; the copy is queued, not awaited."""
        x, y = (tensor.to(self._device, non_blocking=True) for tensor in (prepared.x, prepared.y))
        if self._sequences is not None:
            x = self._sequences.index_select(0, x)
        return Batch(x.to(torch.int64), y, prepared.lengths)

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._device.type == "cuda" else tensor


def _fits(data: TaskData, device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return bool(data.sequences.nbytes <= RESIDENT_SHARE * free)
