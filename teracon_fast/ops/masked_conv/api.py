"""Masked dilated causal convolution on packed rows, with LayerNorm, ReLU, output mask and residual in one operation.

`y[r] = mask[q(r)] * relu(LayerNorm(bias + sum_k W[:, :, k] @ x[taps[r, k]] (+ addend[r]))) (+ residual[residual_rows[r]])`

(Eq. 1 to 3 and 7 of the TERACON paper, on gathered rows; indirect convolution after Dukhan 2019, arXiv 1907.02129.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from teracon_fast.errors import ShapeError
from teracon_fast.ops import backends
from teracon_fast.ops.checks import autocast, expect, parameter_dtypes, sums_dtype
from teracon_fast.ops.registration import flat, register
from teracon_fast.ops.rows import check_convolution
from teracon_fast.packing import ResidualTable, TapTable

ALGORITHMS = ("auto", "direct", "winograd")


class Parameters(NamedTuple):
    """Of the convolution, its LayerNorm and the masks; or their gradients."""

    weight: Tensor
    bias: Tensor
    ln_weight: Tensor
    ln_bias: Tensor
    mask: Tensor


class Tables(NamedTuple):
    """See `packing.TapTable` and `packing.ResidualTable`."""

    taps: Tensor
    readers: Tensor
    bag_rows: Tensor
    bag_offsets: Tensor
    row_ends: Tensor
    rows_per_request: list[int]
    residual_rows: Tensor | None
    residual_readers: Tensor | None


class Inputs(NamedTuple):
    """All that the operation computes from; arguments of `masked_conv`, and whether backward will follow (`save`)."""

    x: Tensor
    parameters: Parameters
    tables: Tables
    residual: Tensor | None
    addend: Tensor | None
    eps: float
    backend: str
    algorithm: str
    save: bool


class Kept(NamedTuple):
    """What backward needs, empty unless `save`: LayerNorm's input `[rows, f_out]`, its mean and 1/std `[rows, 1]`."""

    conv: Tensor
    mean: Tensor
    rstd: Tensor


class Results(NamedTuple):
    """The output `[rows, f_out]`, and what is kept."""

    out: Tensor
    kept: Kept


class Backward(NamedTuple):
    """What backward computes from; `inputs` without residual and addend. Some gradients are formed only if needed."""

    grad: Tensor
    inputs: Inputs
    kept: Kept
    need_x: bool
    need_parameters_weight: bool
    need_residual: bool
    need_addend: bool


class Gradients(NamedTuple):
    """Empty where they are not wanted."""

    x: Tensor
    parameters: Parameters
    residual: Tensor
    addend: Tensor


def masked_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    mask: Tensor,
    table: TapTable,
    *,
    residual: Tensor | None = None,
    residual_table: ResidualTable | None = None,
    addend: Tensor | None = None,
    eps: float = 1e-8,
    backend: str = "auto",
    algorithm: str = "auto",
) -> Tensor:
    """One convolution of the network over packed rows.

    Under autocast activations take the autocast dtype; parameters and masks keep theirs and are rounded where they are used.

    Args:
        x: floating `[table.rows_in, f_in]`. In half precision every other floating argument may be float32.
        weight: `[f_out, f_in, K]` (the layout of `nn.Conv1d`). bias: `[f_out]`.
        ln_weight, ln_bias: `[f_out]`, LayerNorm over channels.
        mask: `[requests, f_out]`; row `q` multiplies the `table.rows_per_request[q]` consecutive output rows of request q.
        table: which rows each output row reads (see `teracon_fast.packing`).
        residual: `[rows, f_out]` added after the mask through `residual_table`; both or none.
        addend: `[rows_out, f_out]` added to the convolution, before LayerNorm: what is trained beside a frozen convolution. A
            weight that needs no gradient costs none.
        eps: added to the variance.
        backend: "auto", "torch", or another that `teracon_fast.env_report()` lists as available.
        algorithm: "direct": one product per tap; "winograd": two outputs one dilation apart from four products instead of six,
            by minimal filtering F(2,3) (Lavin & Gray 2015, arXiv 1509.09308), outputs without a partner directly, only with
            K = 3 and the `cpu` backend; "auto": what measures faster. The rounding error of "winograd" is about 1.5 times that
            of "direct".

    Returns:
        `[rows_out, f_out]`, differentiable with respect to every floating argument.

    Raises:
        ShapeError: when shapes, dtypes or devices do not fit.
        BackendError: when an explicitly requested backend is not available for this input.
    """
    x, residual, addend = autocast(x), *(None if part is None else autocast(part) for part in (residual, addend))
    parameters = Parameters(weight, bias, ln_weight, ln_bias, mask)
    _check(x, parameters, table, residual, residual_table, addend)
    _check_algorithm(algorithm, backend, weight.shape[2], x)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters, residual, addend) if t is not None)
    rows, readers = (None, None) if residual_table is None else residual_table
    tables = Tables(*table.tensors, list(table.rows_per_request), rows, readers)
    inputs = Inputs(x.contiguous(), parameters, tables, residual, addend, eps, backend, algorithm, save)
    output: Tensor = _masked_conv(*flat(inputs))[0]
    return output


def _check(
    x: Tensor, parameters: Parameters, table: TapTable, residual: Tensor | None, residual_table: ResidualTable | None,
    addend: Tensor | None,
) -> None:  # fmt: skip
    name, (weight, bias, ln_weight, ln_bias, mask) = "masked_conv", parameters
    check_convolution(name, x, weight, bias, table, residual, residual_table)
    f_out, requests, wide = weight.shape[0], len(table.rows_per_request), parameter_dtypes(x.dtype)
    expect(name, "ln_weight", ln_weight, (f_out,), x, wide)
    expect(name, "ln_bias", ln_bias, (f_out,), x, (ln_weight.dtype,))
    expect(name, "mask", mask, (requests, f_out), x, wide)
    expect(name, "table.row_ends", table.row_ends, (requests,), x, (torch.int32,))
    if addend is not None:
        expect(name, "addend", addend, (table.taps.shape[0], f_out), x, (x.dtype,))


def _check_algorithm(algorithm: str, backend: str, kernel_size: int, x: Tensor) -> None:
    if algorithm not in ALGORITHMS:
        raise ShapeError(f"masked_conv: algorithm is {algorithm!r}, expected one of {list(ALGORITHMS)}")
    if algorithm != "winograd":
        return
    if kernel_size != 3:
        raise ShapeError(f"masked_conv: algorithm 'winograd' needs K = 3, got {kernel_size}")
    chosen = backends.resolve(backend, "masked_conv", x.device, x.dtype)
    if chosen != "cpu":
        raise backends.BackendError(f"masked_conv: algorithm 'winograd' needs backend 'cpu', got {chosen!r}")


def room(inputs: Inputs) -> Results:
    """Uninitialized results."""
    x, f_out, rows = inputs.x, inputs.parameters.weight.shape[0], inputs.tables.taps.shape[0]
    kept, statistics = rows if inputs.save else 0, sums_dtype(x.dtype)
    mean, rstd = (x.new_empty(kept, 1, dtype=statistics) for _ in range(2))
    return Results(x.new_empty(rows, f_out), Kept(x.new_empty(kept, f_out), mean, rstd))


def _backward_fake(backward: Backward) -> Gradients:
    grad, inputs, *_ = backward
    x, (weight, _, *others), readers = inputs.x, inputs.parameters, inputs.tables.residual_readers
    return Gradients(
        x.new_empty(x.shape if backward.need_x else (0,)),
        Parameters(
            weight.new_empty(weight.shape if backward.need_parameters_weight else (0,)), weight.new_empty(weight.shape[0]),
            *(torch.empty_like(other) for other in others),
        ),
        grad.new_empty((len(readers), len(weight)) if backward.need_residual and readers is not None else (0,)),
        grad.new_empty(grad.shape if backward.need_addend else (0,)),
    )  # fmt: skip


_masked_conv_backward = register("masked_conv_backward", Backward, Gradients, "masked_conv.backward", _backward_fake)
_masked_conv = register(
    "masked_conv", Inputs, Results, "masked_conv.forward", room, _masked_conv_backward, ("residual", "addend")
)
