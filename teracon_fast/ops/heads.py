"""What the operations on linear heads share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from teracon_fast.errors import ShapeError
from teracon_fast.ops.checks import expect, parameter_dtypes


class Head(NamedTuple):
    """Hidden states `[R, f]`, weight `[C, f]` and bias `[C]`; or their gradients."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


def check_head(operation: str, head: Head) -> None:
    """hidden floating [R, f]; weight [C, f] of its dtype, or float32 under a half precision; bias [C] as weight."""
    hidden, weight, bias = head
    if hidden.dim() != 2 or weight.dim() != 2 or weight.shape[0] < 1:
        raise ShapeError(
            f"{operation}: hidden is {list(hidden.shape)}, weight {list(weight.shape)}, expected [R, f], [C, f], C at least 1"
        )
    if not hidden.dtype.is_floating_point:
        raise ShapeError(f"{operation}: hidden is {hidden.dtype}, expected a floating dtype")
    expect(operation, "weight", weight, (weight.shape[0], hidden.shape[1]), hidden, parameter_dtypes(hidden.dtype))
    expect(operation, "bias", bias, (weight.shape[0],), hidden, (weight.dtype,))


def check_targets(operation: str, hidden: Tensor, targets: Tensor, rows: Tensor | None) -> Tensor:
    """targets int64 [N]; rows int64 [N], or None where N = R. Returns the rows."""
    if rows is None:
        expect(operation, "targets", targets, (hidden.shape[0],), hidden, (torch.int64,))
        return torch.arange(hidden.shape[0], device=hidden.device)
    if targets.dim() != 1:
        raise ShapeError(f"{operation}: targets are {list(targets.shape)}, expected [N]")
    expect(operation, "targets", targets, (targets.shape[0],), hidden, (torch.int64,))
    expect(operation, "rows", rows, (targets.shape[0],), hidden, (torch.int64,))
    return rows


def keep_gradients(ctx: Any, gradients: tuple[Tensor, ...]) -> None:
    """Keep gradients that were computed with a loss for `kept_gradients`. They carry no gradient themselves."""
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    # Not by save_for_backward: while it holds a gradient, autograd copies it into `.grad` instead of moving it.
    ctx.gradients = gradients


_UNITS: dict[torch.device, Tensor] = {}


def unit_gradient(loss: Tensor) -> Tensor:
    """A 1 to start a backward pass from: `loss.backward(unit_gradient(loss))`.

    Operations that compute gradients with their loss recognize it, and return those unscaled. On a GPU, where reading a number
    means waiting, any other gradient costs a pass over all of them.
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
    """Those gradients, times the upstream gradient of the loss.

    Raises:
        RuntimeError: an earlier backward pass that did not retain the graph has freed them.
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


# Labels in a block of the compiled C++ kernels: a multiple of what every register tile covers. Their weights, two copies, fit a
# second-level cache.
_TILE, _BLOCK = 14, 126
# As many blocks as this, where there are labels enough, give many threads nearly equal shares.
_FEWEST_BLOCKS = 24


def block_of(labels: int) -> int:
    """Labels in a block. Never depends on the number of threads: forward and backward need not run with the same one."""
    return min(_BLOCK, -(-labels // (_FEWEST_BLOCKS * _TILE)) * _TILE)


def schedule(labels: int) -> tuple[int, int]:
    """Labels in a block, and threads."""
    return block_of(labels), torch.get_num_threads()


def dense_head(head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """As the compiled kernels take it: hidden and weight in the dtypes they have, the bias in float32."""
    return head.hidden.contiguous(), head.weight.contiguous(), head.bias.float().contiguous()
