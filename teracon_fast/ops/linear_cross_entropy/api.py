"""Cross-entropy of a linear head, where many targets may share one row of hidden states.

`loss[n] = logsumexp_c logit[rows[n], c] - logit[rows[n], targets[n]]`, `logit = hidden @ weight.T + bias`

(Eq. 18 of the TERACON paper; task 1: every position.) The gradient needs one row of probabilities per row of hidden states,
however many targets that row has: `d_logit[r] = softmax(logit[r]) * sum_{n in r} g[n] - sum_{n in r} g[n] * onehot(targets[n])`.
The compiled kernels form logits one block of labels at a time, with a running maximum and sum of each row (online softmax,
Milakov & Gimelshein 2018, arXiv 1805.02867).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from teracon_fast.errors import ShapeError
from teracon_fast.ops.checks import autocast, expect, sums_dtype
from teracon_fast.ops.heads import Head, check_head, check_targets, keep_gradients, kept_gradients
from teracon_fast.ops.registration import Gradient, flat, implementation, register


class Inputs(NamedTuple):
    """All that the operation computes from: arguments of `linear_cross_entropy`; whether backward will follow (`save`), and
    predictions are wanted."""

    head: Head
    targets: Tensor
    rows: Tensor
    filter_eps: float
    backend: str
    save: bool
    predict: bool


class Kept(NamedTuple):
    """What backward needs: each row's maximum and sum of `exp(logit - maximum)` `[2, R]`, and what a backend adds to them."""

    statistics: Tensor
    logits: Tensor
    highest: Tensor


class Results(NamedTuple):
    """Losses `[N]`; each row's best label `[R]` and each target's rank `[N]`, empty unless wanted."""

    losses: Tensor
    kept: Kept
    best: Tensor
    rank: Tensor


class Backward(NamedTuple):
    """What backward computes from; the gradient of the bias is always wanted."""

    grad: Tensor
    inputs: Inputs
    kept: Kept
    need_head_hidden: bool
    need_head_weight: bool


class Gradients(NamedTuple):
    """Empty where they are not wanted."""

    head: Head


class ReducedInputs(NamedTuple):
    """Inputs of the sum of all losses, each times its scale `[N]`."""

    head: Head
    targets: Tensor
    rows: Tensor
    scales: Tensor
    filter_eps: float
    backend: str
    predict: bool


class Reduced(NamedTuple):
    """The sum with its gradients, and predictions as in `Results`."""

    total: Tensor
    gradients: Head
    best: Tensor
    rank: Tensor


class CrossEntropy(NamedTuple):
    """A loss with predictions from the same logits.

    Attributes:
        loss: as `linear_cross_entropy` without predictions.
        argmax: int64 `[R]`, the label of each row's highest logit, the lowest of equals. No logit that is NaN.
        rank: int64 `[N]`, labels with a higher logit than the target, plus equal ones at a lower index: 0 is a hit@1. Logits that
            are NaN count as higher, so a target whose logit is NaN has rank C.
    """

    loss: Tensor
    argmax: Tensor
    rank: Tensor


Reduction = Literal["mean", "sum", "none"]


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
        target_weights: float `[N]`, such as how often each target occurs; None for 1 each. No gradient.
        reduction: "mean" (weighted: the sum divided by the sum of the weights), "sum", or "none": the loss of each target times
            its weight.
        predictions: also return each row's best label and each target's rank, from the same pass over the labels.
        filter_eps: backward skips tiles of rows and labels without a target whose probabilities are all below it. 0 (the
            default) skips nothing and is exact; 2**-24 is float32's resolution near 1, 2**-9 bfloat16's. The loss does not
            change. See docs/large_catalogues.md for measurements. The `torch` backend has no tiles and skips nothing.
        backend: "auto", "torch", or another that `teracon_fast.env_report()` lists as available.

    Returns:
        A scalar, or `[N]` with "none"; float32 where `hidden` is a half precision, else of its dtype. Differentiable once with
        respect to hidden, weight and bias. With `predictions` a `CrossEntropy`.

    Raises:
        ShapeError: when shapes, dtypes or devices do not fit, or the reduction or filter_eps is none of the above.
        BackendError: when an explicitly requested backend is not available for this input.
        IndexError or RuntimeError: when a target or a row number is out of range.
    """
    head = Head(autocast(hidden), weight, bias)
    rows = _check(head, targets, rows, target_weights, reduction, filter_eps)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in head)
    dtype, count = sums_dtype(head.hidden.dtype), targets.shape[0]
    weights = None if target_weights is None else target_weights.detach().to(dtype)
    inputs = Inputs(head, targets, rows, filter_eps, backend, save, predictions)
    if save and reduction != "none" and count and not torch.compiler.is_compiling() and _reduces(inputs):
        scales = hidden.new_ones(count, dtype=dtype) if weights is None else weights
        scales = scales / scales.sum() if reduction == "mean" else scales
        reduced = ReducedInputs(head, targets, rows, scales, filter_eps, backend, predictions)
        total, _, _, _, *found = _linear_cross_entropy_reduced(*flat(reduced))
        return CrossEntropy(total, *found) if predictions else total
    losses, _, _, _, *found = _linear_cross_entropy(*flat(inputs))
    loss: Tensor = losses if weights is None else losses * weights
    if reduction == "sum":
        loss = loss.sum()
    elif reduction == "mean":
        loss = loss.mean() if weights is None else loss.sum() / weights.sum()
    return CrossEntropy(loss, *found) if predictions else loss


def _check(
    head: Head, targets: Tensor, rows: Tensor | None, target_weights: Tensor | None, reduction: str, filter_eps: float
) -> Tensor:
    """Rows of the targets."""
    name = "linear_cross_entropy"
    if reduction not in ("mean", "sum", "none"):
        raise ShapeError(f"{name}: reduction is {reduction!r}, expected 'mean', 'sum' or 'none'")
    if not 0.0 <= filter_eps < 1.0:
        raise ShapeError(f"{name}: filter_eps is {filter_eps}, expected 0 or a probability below 1")
    check_head(name, head)
    rows = check_targets(name, head.hidden, targets, rows)
    if target_weights is not None:
        floating = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        expect(name, "target_weights", target_weights, (targets.shape[0],), head.hidden, floating)
    return rows


def _reduces(inputs: Inputs) -> bool:
    """Whether the backend has a `reduced` form, and it is faster."""
    rows_at_once = getattr(implementation("linear_cross_entropy", inputs), "rows_at_once", None)
    hidden, weight, _ = inputs.head
    return rows_at_once is not None and bool(rows_at_once(len(hidden), len(weight), hidden.dtype, weight.dtype))


def predictions_of(hidden: Tensor, targets: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    """Uninitialized best labels `[R]` and ranks `[N]`, empty unless wanted."""
    return targets.new_empty(len(hidden) if wanted else 0), targets.new_empty(len(targets) if wanted else 0)


def _forward_fake(inputs: Inputs) -> Results:
    hidden, targets = inputs.head.hidden, inputs.targets
    losses = hidden.new_empty(targets.shape[0], dtype=sums_dtype(hidden.dtype))
    kept = implementation("linear_cross_entropy", inputs).room(inputs)
    return Results(losses, kept, *predictions_of(hidden, targets, inputs.predict))


def _backward_fake(backward: Backward) -> Gradients:
    hidden, weight, bias = backward.inputs.head
    return Gradients(Head(
        hidden.new_empty(hidden.shape if backward.need_head_hidden else (0,)),
        weight.new_empty(weight.shape if backward.need_head_weight else (0,)),
        bias.new_empty(bias.shape),
    ))  # fmt: skip


def _reduced_fake(inputs: ReducedInputs) -> Reduced:
    hidden = inputs.head.hidden
    gradients = Head(*(t.new_empty(t.shape) for t in inputs.head))
    total = hidden.new_empty((), dtype=sums_dtype(hidden.dtype))
    return Reduced(total, gradients, *predictions_of(hidden, inputs.targets, inputs.predict))


_linear_cross_entropy_backward = register(
    "linear_cross_entropy_backward", Backward, Gradients, "linear_cross_entropy.backward", _backward_fake
)
_linear_cross_entropy = register(
    "linear_cross_entropy", Inputs, Results, "linear_cross_entropy.forward", _forward_fake, _linear_cross_entropy_backward
)
_linear_cross_entropy_reduced = register(
    "linear_cross_entropy_reduced", ReducedInputs, Reduced, "linear_cross_entropy.reduced", _reduced_fake,
    Gradient(
        lambda ctx, inputs, results: keep_gradients(ctx, results.gradients),
        lambda ctx, grad: dict(zip(("head_hidden", "head_weight", "head_bias"), kept_gradients(ctx, grad), strict=True)),
    ),
)  # fmt: skip
