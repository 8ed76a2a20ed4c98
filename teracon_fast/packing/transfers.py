"""Asynchronous copies from the host to a GPU through pinned memory; many arrays in one copy.

PyTorch's pinned allocator reuses a block only after the copies queued from it have finished.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Bytes that arrays in a shared buffer are aligned to, as kernels assume of separate tensors.
ALIGNMENT = 16
_DTYPES: dict[np.dtype[Any], torch.dtype] = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64}


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; from the host to a GPU without waiting for the GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def together(arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Dense copies of int32 and int64 arrays on a device: aligned views of one buffer, sent in one copy."""
    places, size = [], 0
    for array in arrays:
        places.append(size)
        size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    host = torch.empty(size // 8, dtype=torch.int64, pin_memory=device.type == "cuda")
    memory = host.numpy().view(np.uint8)
    for place, array in zip(places, arrays, strict=True):
        memory[place : place + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
    buffer = host.to(device, non_blocking=True)
    views = {dtype: buffer.view(dtype) for dtype in _DTYPES.values()}
    return [
        dense(views[_DTYPES[array.dtype]], array.shape, place // array.itemsize)
        for place, array in zip(places, arrays, strict=True)
    ]


def dense(memory: Tensor, shape: Sequence[int], start: int) -> Tensor:
    """The elements of a flat tensor from `start` on as a dense tensor of a shape of one or two dimensions."""
    return memory.as_strided(shape, (1,) if len(shape) == 1 else (shape[1], 1), memory.storage_offset() + start)


class HostCopy:
    """A small tensor on its way to the host: reading it waits for what was queued before it, not for later work."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            # The copy's own stream, which is not the current device's where the tensor is on another.
            self._event.record(torch.cuda.current_stream(tensor.device))
        else:
            self._values = tensor

    def tolist(self) -> list[float]:
        """The values as floats."""
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._values.tolist()
        return values
