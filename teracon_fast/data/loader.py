"""Batches of a task where a model is: out of the device's own memory where the sequences fit, else by way of pinned memory.

A batch is made in two parts: `prepare` reads and pins, and may run in a thread ahead of the training; `load` only queues what
the device has to do, and waits for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from teracon_fast.data.batches import fetch
from teracon_fast.data.store import TaskData
from teracon_fast.packing import real_lengths

# Of the memory that is free on a device, the share that a task's sequences may take.
RESIDENT_SHARE = 0.25


class Batch(NamedTuple):
    """Some samples of a task.

    Attributes:
        x: int64 `[B, L]` item ids, left-padded with 0. y: int64 `[B]`. Both on the model's device.
        lengths: int64 `[B]` on the host: `packing.real_lengths(x)`.
    """

    x: Tensor
    y: Tensor
    lengths: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Prepared:
    """A batch on its way. `rows`: int64 `[B]`, rows of the resident sequences; else `x` has the sequences, int32 or int64."""

    x: Tensor | None
    rows: Tensor | None
    y: Tensor
    lengths: npt.NDArray[np.int64]


class BatchSource:
    """Batches of one task for one device.

    Args:
        data: the task.
        device: where batches are wanted.
        resident: whether the device keeps all sequences, `4 * N * L` bytes; None: if they take at most a quarter of the memory
            that is free there now. Never on the CPU, unless asked for: the files are mapped into its memory already.
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
        """The batch of samples `[B]`, as far as the host can make it.

        Raises:
            IndexError: a sample outside [0, S).
        """
        if self._sequences is None:
            x, y = fetch(self._data, samples)
            lengths = real_lengths(x)
            # Half the bytes to carry; on the CPU nothing is carried.
            x = x if self._device.type == "cpu" else x.to(torch.int32)
            return Prepared(self._pinned(x), None, self._pinned(y), lengths)
        if len(samples) and samples.min() < 0:
            raise IndexError(f"sample index {samples.min()}; expected 0 to {len(self._data.samples) - 1}")
        pairs = self._data.samples[samples].astype(np.int64)
        lengths = self._data.lengths[pairs[:, 0]].astype(np.int64)
        rows, y = (torch.from_numpy(np.ascontiguousarray(column)) for column in pairs.T)
        return Prepared(None, self._pinned(rows), self._pinned(y), lengths)

    def load(self, prepared: Prepared) -> Batch:
        """The batch on the device, queued there."""
        y = self._moved(prepared.y)
        if self._sequences is not None and prepared.rows is not None:
            x = self._sequences.index_select(0, self._moved(prepared.rows))
        else:
            assert prepared.x is not None
            x = self._moved(prepared.x)
        return Batch(x.to(torch.int64), y, prepared.lengths)

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._device.type == "cuda" else tensor

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)


def _fits(data: TaskData, device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return bool(data.sequences.nbytes <= RESIDENT_SHARE * free)
