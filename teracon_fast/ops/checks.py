"""What operations check and prepare alike."""

from __future__ import annotations

import torch
from torch import Tensor

from teracon_fast.errors import ShapeError

HALF = (torch.bfloat16, torch.float16)


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of losses, statistics and sums over rows: float32 for half precisions, else that of the activations."""
    return torch.float32 if dtype in HALF else dtype


def parameter_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Dtypes that parameters may have beside activations: float32 too under a half precision."""
    return (dtype, torch.float32) if dtype in HALF else (dtype,)


def autocast(activations: Tensor) -> Tensor:
    """Activations in the autocast dtype, if autocast is on."""
    if torch.is_autocast_enabled(activations.device.type):
        return activations.to(torch.get_autocast_dtype(activations.device.type))
    return activations


def expect(
    operation: str, name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Raise ShapeError unless `tensor` has the shape, one of the dtypes, and is where `like` is."""
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or tensor.device != like.device:
        raise ShapeError(
            f"{operation}: {name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, "
            f"expected {' or '.join(map(str, dtypes))} {list(shape)} on {like.device}"
        )


def require_range(operation: str, values: Tensor, limit: int, name: str) -> None:
    """Raise IndexError unless all numbers lie in 0..limit-1: indexing itself would take negative ones from the end.

    On a GPU an assertion on the device stops it, without a wait.
    """
    if values.device.type != "cpu":
        torch._assert_async(((values >= 0) & (values < limit)).all())
    elif values.numel():
        low, high = (int(value) for value in values.aminmax())
        if low < 0 or high >= limit:
            raise IndexError(
                f"{operation}: {name} has {low if low < 0 else high}, which is out of range: expected 0 to {limit - 1}"
            )
