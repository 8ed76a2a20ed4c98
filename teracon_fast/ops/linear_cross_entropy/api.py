"""Cross-entropy of a linear head, where many targets may share one row of hidden states.

`loss[n] = logsumexp_c logit[rows[n], c] - logit[rows[n], targets[n]]`, `logit = hidden @ weight.T + bias`

(Eq. 18 of the TERACON paper; task 1: every position.) The gradient needs one row of probabilities per row of hidden states,
however many targets that row has: `d_logit[r] = softmax(logit[r]) * sum_{n in r} g[n] - sum_{n in r} g[n] * onehot(targets[n])`.
The compiled kernels form logits one block of labels at a time, with a running maximum and sum of each row (online softmax,
Milakov & Gimelshein 2018, arXiv 1805.02867).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol, overload

import torch
from torch import Tensor

from teracon_fast.errors import ShapeError
from teracon_fast.ops import backends
from teracon_fast.ops.heads import (
    autocast_hidden,
    check_head,
    check_targets,
    expect,
    keep_gradients,
    kept_gradients,
    sums_dtype,
)
from teracon_fast.ops.linear_cross_entropy import cpu as _cpu_linear_cross_entropy
from teracon_fast.ops.linear_cross_entropy import torch as _torch_linear_cross_entropy
from teracon_fast.ops.linear_cross_entropy import triton as _triton_linear_cross_entropy
from teracon_fast.ops.linear_cross_entropy.torch import Forward, Shape


class _Implementation(Protocol):
    """What a backend's module offers: see `_torch_linear_cross_entropy` for the meaning of the arguments."""

    def kept_shapes(self, rows: int, labels: int, save: bool) -> tuple[Shape, Shape]: ...

    def forward(
        self, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, save: bool, predict: bool
    ) -> Forward: ...

    def backward(
        self, grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor,
        statistics: Tensor, kept: Tensor, highest: Tensor, filter_eps: float, need_hidden: bool, need_weight: bool, /,
    ) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip


class CrossEntropy(NamedTuple):
    """A loss with what its logits say of the labels.

    Attributes:
        loss: as without predictions.
        argmax: int64 `[R]`, the label of each row's highest logit, the lowest of equals. No logit that is NaN.
        rank: int64 `[N]`, labels with a higher logit than the target, plus equal ones at a lower index: 0 is a hit@1. Logits that
            are NaN count as higher, so a target whose logit is NaN has rank C.
    """

    loss: Tensor
    argmax: Tensor
    rank: Tensor


Reduction = Literal["mean", "sum", "none"]
_IMPLEMENTATIONS: dict[str, _Implementation] = {
    "cpu": _cpu_linear_cross_entropy,
    "torch": _torch_linear_cross_entropy,
    "triton": _triton_linear_cross_entropy,
}


@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor | None = None, *,
    target_weights: Tensor | None = None, reduction: Reduction = "mean", predictions: Literal[False] = False,
    filter_eps: float = 0.0, backend: str = "auto",
) -> Tensor: ...  # fmt: skip


@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor | None = None, *,
    target_weights: Tensor | None = None, reduction: Reduction = "mean", predictions: Literal[True],
    filter_eps: float = 0.0, backend: str = "auto",
) -> CrossEntropy: ...  # fmt: skip


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor | None = None, *,
    target_weights: Tensor | None = None, reduction: Reduction = "mean", predictions: bool = False,
    filter_eps: float = 0.0, backend: str = "auto",
) -> Tensor | CrossEntropy:  # fmt: skip
    """Cross-entropy of `hidden @ weight.T + bias` at each target.

    Under autocast hidden states take the autocast dtype; parameters keep theirs and are rounded where they are used. The `cpu`
    and `triton` backends never hold all logits: `cpu` keeps at most 160 MiB of them at a time, `triton` tiles.

    Args:
        hidden: floating `[R, f]`.
        weight: `[C, f]`, of the dtype of `hidden`, or float32 where that is a half precision. bias: `[C]`, as `weight`.
        targets: int64 `[N]`, labels in 0..C-1.
        rows: int64 `[N]`, row of `hidden` that each target belongs to, any number of targets per row in any order; None when
            N = R and target n belongs to row n.
        target_weights: float `[N]`, what each target counts for, such as how often it occurs; None for 1 each. No gradient.
        reduction: "mean" (weighted: the sum divided by the sum of the weights), "sum", or "none": the loss of each target, times
            its weight.
        predictions: also return each row's best label and each target's rank, from the same pass over the labels.
        filter_eps: probabilities below it are treated as zero by the gradient, where a whole tile of rows and labels has nothing
            larger and no target: its products are skipped. 0 (the default) skips nothing and is exact; 2**-24 is float32's
            resolution beside 1, 2**-9 bfloat16's. The loss does not change. docs/large_catalogues.md has what it measures. The
            `torch` backend has no tiles and skips nothing.
        backend: "auto", "torch", or another that `teracon_fast.env_report()` lists as available.

    Returns:
        A scalar, or `[N]` with "none"; float32 where `hidden` is a half precision, else of its dtype. Differentiable once with
        respect to hidden, weight and bias. With `predictions` a `CrossEntropy`.

    Raises:
        ShapeError: when shapes, dtypes or devices do not fit, or the reduction or filter_eps is none of the above.
        BackendError: when an explicitly requested backend is not available for this input.
        IndexError or RuntimeError: when a target or a row number is out of range.
    """
    hidden = autocast_hidden(hidden)
    _check(hidden, weight, bias, targets, rows, target_weights, reduction, filter_eps)
    if rows is None:
        rows = torch.arange(hidden.shape[0], device=hidden.device)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, weight, bias))
    dtype, count = sums_dtype(hidden.dtype), targets.shape[0]
    weights = None if target_weights is None else target_weights.detach().to(dtype)
    if save and reduction != "none" and count and not torch.compiler.is_compiling():
        size = hidden.shape[0], weight.shape[0], hidden.dtype, weight.dtype
        if _implementation(backend, hidden) is _cpu_linear_cross_entropy and _cpu_linear_cross_entropy.rows_at_once(*size):
            scales = hidden.new_ones(count, dtype=dtype) if weights is None else weights
            scales = scales / scales.sum() if reduction == "mean" else scales
            total, _, _, _, *found = _linear_cross_entropy_reduced(
                hidden, weight, bias, targets, rows, scales, filter_eps, predictions
            )
            return CrossEntropy(total, *found) if predictions else total
    losses, _, _, _, *found = _linear_cross_entropy(hidden, weight, bias, targets, rows, filter_eps, backend, save, predictions)
    loss: Tensor = losses if weights is None else losses * weights
    if reduction == "sum":
        loss = loss.sum()
    elif reduction == "mean":
        loss = loss.mean() if weights is None else loss.sum() / weights.sum()
    return CrossEntropy(loss, *found) if predictions else loss


def _check(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor | None, target_weights: Tensor | None,
    reduction: str, filter_eps: float,
) -> None:  # fmt: skip
    name = "linear_cross_entropy"
    if reduction not in ("mean", "sum", "none"):
        raise ShapeError(f"{name}: reduction is {reduction!r}, expected 'mean', 'sum' or 'none'")
    if not 0.0 <= filter_eps < 1.0:
        raise ShapeError(f"{name}: filter_eps is {filter_eps}, expected 0 or a probability below 1")
    check_head(name, hidden, weight, bias)
    check_targets(name, hidden, targets, rows)
    if target_weights is not None:
        floating = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        expect(name, "target_weights", target_weights, (targets.shape[0],), hidden, floating)


def _implementation(backend: str, hidden: Tensor) -> _Implementation:
    return _IMPLEMENTATIONS[backends.resolve(backend, "linear_cross_entropy", hidden.device, hidden.dtype)]


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, filter_eps: float, backend: str, save: bool,
    predict: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _implementation(backend, hidden).forward(hidden, weight, bias, targets, rows, save, predict)


def _forward_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, filter_eps: float, backend: str, save: bool,
    predict: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    implementation = _implementation(backend, hidden)
    kept, highest = implementation.kept_shapes(hidden.shape[0], weight.shape[0], save)
    sums = sums_dtype(hidden.dtype)
    return (
        hidden.new_empty(targets.shape[0], dtype=sums),
        hidden.new_empty(2, hidden.shape[0], dtype=sums),
        hidden.new_empty(kept, dtype=hidden.dtype if implementation is _torch_linear_cross_entropy else sums),
        hidden.new_empty(highest, dtype=sums),
        targets.new_empty(hidden.shape[0] if predict else 0),
        targets.new_empty(targets.shape[0] if predict else 0),
    )


def _backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, statistics: Tensor,
    kept: Tensor, highest: Tensor, filter_eps: float, backend: str, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _implementation(backend, hidden).backward(
        grad, hidden, weight, bias, targets, rows, statistics, kept, highest, filter_eps, need_hidden, need_weight
    )


def _backward_fake(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, statistics: Tensor,
    kept: Tensor, highest: Tensor, filter_eps: float, backend: str, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        bias.new_empty(bias.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.filter_eps, ctx.backend, _, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:4])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    need = ctx.needs_input_grad
    gradients = _linear_cross_entropy_backward(grad, *ctx.saved_tensors, ctx.filter_eps, ctx.backend, need[0], need[1])
    return (*(g if needed else None for g, needed in zip(gradients, need[:3], strict=True)), *(None,) * 6)


def _reduced(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, scales: Tensor, filter_eps: float,
    predict: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _cpu_linear_cross_entropy.reduced(hidden, weight, bias, targets, rows, scales, filter_eps, predict)


def _reduced_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, scales: Tensor, filter_eps: float,
    predict: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_hidden, d_weight, d_bias = (t.new_empty(t.shape) for t in (hidden, weight, bias))
    best, rank = (targets.new_empty(t.shape[0] if predict else 0) for t in (hidden, targets))
    return hidden.new_empty((), dtype=sums_dtype(hidden.dtype)), d_hidden, d_weight, d_bias, best, rank


def _reduced_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    keep_gradients(ctx, output[1:4])


def _reduced_autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    gradients = kept_gradients(ctx, grad)
    return (*(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad[:3], strict=True)), *(None,) * 5)


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
