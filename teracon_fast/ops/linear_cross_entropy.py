"""Cross-entropy of a linear head, where many targets may share one row of hidden states.

`loss[n] = logsumexp_c logit[rows[n], c] - logit[rows[n], targets[n]]`, `logit = hidden @ weight.T + bias`

(Eq. 18 of the TERACON paper; task 1: every position.) The gradient needs one row of probabilities per row of hidden states,
however many targets that row has: `d_logit[r] = softmax(logit[r]) * sum_{n in r} g[n] - sum_{n in r} g[n] * onehot(targets[n])`.
The compiled kernels form logits one block of labels at a time, with a running maximum and sum of each row (online softmax,
Milakov & Gimelshein 2018, arXiv 1805.02867).
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from teracon_fast import backends
from teracon_fast.errors import ShapeError
from teracon_fast.ops import _cpu_linear_cross_entropy, _torch_linear_cross_entropy
from teracon_fast.ops._torch_linear_cross_entropy import Shape, sums_dtype


class _Implementation(Protocol):
    """What a backend's module offers: see `_torch_linear_cross_entropy` for the meaning of the arguments."""

    def kept_shapes(self, rows: int, labels: int, save: bool) -> tuple[Shape, Shape]: ...

    def forward(
        self, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, save: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...

    def backward(
        self, grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor,
        statistics: Tensor, kept: Tensor, highest: Tensor, need_hidden: bool, need_weight: bool, /,
    ) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip


Reduction = Literal["mean", "sum", "none"]
_IMPLEMENTATIONS: dict[str, _Implementation] = {"cpu": _cpu_linear_cross_entropy, "torch": _torch_linear_cross_entropy}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    rows: Tensor | None = None,
    *,
    reduction: Reduction = "mean",
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T + bias` at each target.

    Under autocast hidden states take the autocast dtype; parameters keep theirs and are rounded where they are used: nowhere
    in the `cpu` backend. That backend never holds more than 32 MiB of logits.

    Args:
        hidden: floating `[R, f]`.
        weight: `[C, f]`, of the dtype of `hidden`, or float32 where that is a half precision. bias: `[C]`, as `weight`.
        targets: int64 `[N]`, labels in 0..C-1.
        rows: int64 `[N]`, row of `hidden` that each target belongs to; None when N = R and target n belongs to row n.
        reduction: "mean" over all targets, "sum", or "none": the loss of each target.
        backend: "auto", "torch", or another that `teracon_fast.env_report()` lists as available.

    Returns:
        A scalar, or `[N]` with "none"; float32 where `hidden` is a half precision, else of its dtype. Differentiable once with
        respect to hidden, weight and bias.

    Raises:
        ShapeError: when shapes, dtypes or devices do not fit, or the reduction is unknown.
        BackendError: when an explicitly requested backend is not available for this input.
        IndexError or RuntimeError: when a target or a row number is out of range.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    _check(hidden, weight, bias, targets, rows, reduction)
    if rows is None:
        rows = torch.arange(hidden.shape[0], device=hidden.device)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, weight, bias))
    if save and reduction != "none" and targets.shape[0] and not torch.compiler.is_compiling():
        implementation, sizes = _implementation(backend, hidden), (hidden.shape[0], weight.shape[0])
        if implementation is _cpu_linear_cross_entropy and _cpu_linear_cross_entropy.rows_at_once(*sizes):
            scale = 1.0 / targets.shape[0] if reduction == "mean" else 1.0
            total: Tensor = _linear_cross_entropy_reduced(hidden, weight, bias, targets, rows, scale)[0]
            return total
    losses: Tensor = _linear_cross_entropy(hidden, weight, bias, targets, rows, backend, save)[0]
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()


def _check(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor | None, reduction: str) -> None:
    def expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or tensor.device != hidden.device:
            raise ShapeError(
                f"linear_cross_entropy: {name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, "
                f"expected {' or '.join(map(str, dtypes))} {list(shape)} on {hidden.device}"
            )

    if reduction not in ("mean", "sum", "none"):
        raise ShapeError(f"linear_cross_entropy: reduction is {reduction!r}, expected 'mean', 'sum' or 'none'")
    if hidden.dim() != 2 or weight.dim() != 2 or weight.shape[0] < 1:
        raise ShapeError(
            f"linear_cross_entropy: hidden is {list(hidden.shape)}, weight {list(weight.shape)}, expected [R, f], [C, f], "
            "C at least 1"
        )
    if not hidden.dtype.is_floating_point:
        raise ShapeError(f"linear_cross_entropy: hidden is {hidden.dtype}, expected a floating dtype")
    half = hidden.dtype in (torch.bfloat16, torch.float16)
    expect("weight", weight, (weight.shape[0], hidden.shape[1]), (hidden.dtype, torch.float32) if half else (hidden.dtype,))
    expect("bias", bias, (weight.shape[0],), (weight.dtype,))
    if rows is None:
        expect("targets", targets, (hidden.shape[0],), (torch.int64,))
        return
    if targets.dim() != 1:
        raise ShapeError(f"linear_cross_entropy: targets are {list(targets.shape)}, expected [N]")
    expect("targets", targets, (targets.shape[0],), (torch.int64,))
    expect("rows", rows, (targets.shape[0],), (torch.int64,))


def _implementation(backend: str, hidden: Tensor) -> _Implementation:
    return _IMPLEMENTATIONS[backends.resolve(backend, "linear_cross_entropy", hidden.device, hidden.dtype)]


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, backend: str, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _implementation(backend, hidden).forward(hidden, weight, bias, targets, rows, save)


def _forward_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, backend: str, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    implementation = _implementation(backend, hidden)
    kept, highest = implementation.kept_shapes(hidden.shape[0], weight.shape[0], save)
    sums = sums_dtype(hidden.dtype)
    return (
        hidden.new_empty(targets.shape[0], dtype=sums),
        hidden.new_empty(2, hidden.shape[0], dtype=sums),
        hidden.new_empty(kept, dtype=hidden.dtype if implementation is _torch_linear_cross_entropy else sums),
        hidden.new_empty(highest, dtype=sums),
    )


def _backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, statistics: Tensor,
    kept: Tensor, highest: Tensor, backend: str, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _implementation(backend, hidden).backward(
        grad, hidden, weight, bias, targets, rows, statistics, kept, highest, need_hidden, need_weight
    )


def _backward_fake(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, statistics: Tensor,
    kept: Tensor, highest: Tensor, backend: str, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        bias.new_empty(bias.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.backend, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    need = ctx.needs_input_grad
    gradients = _linear_cross_entropy_backward(grad, *ctx.saved_tensors, ctx.backend, need[0], need[1])
    return (*(g if needed else None for g, needed in zip(gradients, need[:3], strict=True)), None, None, None, None)


def _reduced(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _cpu_linear_cross_entropy.reduced(hidden, weight, bias, targets, rows, scale)


def _reduced_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_hidden, d_weight, d_bias = (t.new_empty(t.shape) for t in (hidden, weight, bias))
    return hidden.new_empty((), dtype=sums_dtype(hidden.dtype)), d_hidden, d_weight, d_bias


def _reduced_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _reduced_autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    gradients = ctx.saved_tensors
    # A loss that is not scaled further, the usual case, needs no pass over d(weight).
    if torch.compiler.is_compiling() or is_fake(grad) or float(grad) != 1.0:
        gradients = [gradient * grad.to(gradient.dtype) for gradient in gradients]
    return (*(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad[:3], strict=True)), None, None, None)


_FORWARD, _BACKWARD = "teracon_fast::linear_cross_entropy", "teracon_fast::linear_cross_entropy_backward"
_REDUCED = "teracon_fast::linear_cross_entropy_reduced"
for _name, _function, _fake in (
    (_FORWARD, _forward, _forward_fake), (_BACKWARD, _backward, _backward_fake), (_REDUCED, _reduced, _reduced_fake)
):  # fmt: skip
    # define + impl rather than custom_op, as in masked_conv.
    torch.library.define(_name, torch.library.infer_schema(_function, mutates_args=()))
    torch.library.impl(_name, "default", _function)
    torch.library.register_fake(_name, _fake)
torch.library.register_autograd(_FORWARD, _autograd, setup_context=_setup_context)
torch.library.register_autograd(_REDUCED, _reduced_autograd, setup_context=_reduced_setup)
_linear_cross_entropy = torch.ops.teracon_fast.linear_cross_entropy.default
_linear_cross_entropy_backward = torch.ops.teracon_fast.linear_cross_entropy_backward.default
_linear_cross_entropy_reduced = torch.ops.teracon_fast.linear_cross_entropy_reduced.default
