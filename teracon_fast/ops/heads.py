"""What the operations on linear heads check and prepare alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from teracon_fast.errors import ShapeError

HALF = (torch.bfloat16, torch.float16)


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of losses and statistics: float32 for half precisions, else that of the hidden states."""
    return torch.float32 if dtype in HALF else dtype


def autocast_hidden(hidden: Tensor) -> Tensor:
    """Hidden states in the autocast dtype, where there is one."""
    if torch.is_autocast_enabled(hidden.device.type):
        return hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return hidden


def expect(
    operation: str, name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Raise ShapeError unless `tensor` has the shape, one of the dtypes, and is where `like` is."""
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or tensor.device != like.device:
        raise ShapeError(
            f"{operation}: {name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, "
            f"expected {' or '.join(map(str, dtypes))} {list(shape)} on {like.device}"
        )


def check_head(operation: str, hidden: Tensor, weight: Tensor, bias: Tensor) -> None:
    """hidden floating [R, f]; weight [C, f] of its dtype, or float32 under a half precision; bias [C] as weight."""
    if hidden.dim() != 2 or weight.dim() != 2 or weight.shape[0] < 1:
        raise ShapeError(
            f"{operation}: hidden is {list(hidden.shape)}, weight {list(weight.shape)}, expected [R, f], [C, f], C at least 1"
        )
    if not hidden.dtype.is_floating_point:
        raise ShapeError(f"{operation}: hidden is {hidden.dtype}, expected a floating dtype")
    dtypes = (hidden.dtype, torch.float32) if hidden.dtype in HALF else (hidden.dtype,)
    expect(operation, "weight", weight, (weight.shape[0], hidden.shape[1]), hidden, dtypes)
    expect(operation, "bias", bias, (weight.shape[0],), hidden, (weight.dtype,))


def check_targets(operation: str, hidden: Tensor, targets: Tensor, rows: Tensor | None) -> None:
    """targets int64 [N]; rows int64 [N], or None where N = R."""
    if rows is None:
        expect(operation, "targets", targets, (hidden.shape[0],), hidden, (torch.int64,))
        return
    if targets.dim() != 1:
        raise ShapeError(f"{operation}: targets are {list(targets.shape)}, expected [N]")
    expect(operation, "targets", targets, (targets.shape[0],), hidden, (torch.int64,))
    expect(operation, "rows", rows, (targets.shape[0],), hidden, (torch.int64,))


def require_range(operation: str, values: Tensor, limit: int, name: str) -> None:
    """Raise IndexError unless all numbers lie in 0..limit-1: indexing itself would take negative ones from the end.

    On a GPU the device is not waited for: it stops with an assertion.
    """
    if values.device.type != "cpu":
        torch._assert_async(((values >= 0) & (values < limit)).all())
    elif values.numel():
        low, high = (int(value) for value in values.aminmax())
        if low < 0 or high >= limit:
            raise IndexError(
                f"{operation}: {name} has {low if low < 0 else high}, which is out of range: expected 0 to {limit - 1}"
            )


def keep_gradients(ctx: Any, gradients: tuple[Tensor, ...]) -> None:
    """Keep gradients that were formed with a loss until `kept_gradients` asks for them. They carry no gradient themselves."""
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    # Not by save_for_backward: as long as it holds a gradient, autograd copies it into `.grad` instead of handing it on.
    ctx.gradients = gradients


_UNITS: dict[torch.device, Tensor] = {}


def unit_gradient(loss: Tensor) -> Tensor:
    """A 1 to start a backward pass from: `loss.backward(unit_gradient(loss))`.

    Operations that form gradients with their loss know it where it reaches them, and hand those on as they are. A GPU's
    numbers they cannot look at without waiting, so another gradient costs them a pass over all of theirs.
    """
    if loss.dtype != torch.float32:
        return torch.ones_like(loss)
    if loss.device not in _UNITS:
        _UNITS[loss.device] = torch.ones((), device=loss.device)
    return _UNITS[loss.device]


def _is_unit(grad: Tensor) -> bool:
    if torch.compiler.is_compiling() or is_fake(grad):
        return False
    if grad.device.type == "cpu":
        return float(grad) == 1.0
    return grad is _UNITS.get(grad.device) and grad._version == 0


def kept_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    """Those gradients, times what came down to the loss.

    Raises:
        RuntimeError: they are gone, with an earlier backward pass that did not retain the graph.
    """
    gradients: tuple[Tensor, ...] | None = ctx.gradients
    if gradients is None:
        raise RuntimeError("got a second backward pass through a loss, expected retain_graph=True in the first one")
    if not torch._C._autograd._get_current_graph_task_keep_graph():
        ctx.gradients = None
    # A loss that is not scaled further, the usual case, needs no pass over d(weight).
    if _is_unit(grad):
        return gradients
    return tuple(gradient * grad.to(gradient.dtype) for gradient in gradients)
