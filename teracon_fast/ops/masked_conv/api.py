"""Masked dilated causal convolution on packed rows, with LayerNorm, ReLU, output mask and residual in one operation.

`y[r] = mask[q(r)] * relu(LayerNorm(bias + sum_k W[:, :, k] @ x[taps[r, k]] (+ addend[r]))) (+ residual[residual_rows[r]])`

(Eq. 1 to 3 and 7 of the TERACON paper, on gathered rows; indirect convolution after Dukhan 2019, arXiv 1907.02129.)
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from teracon_fast.errors import ShapeError
from teracon_fast.ops import backends
from teracon_fast.ops.masked_conv import cpu as _cpu_masked_conv
from teracon_fast.ops.masked_conv import torch as _torch_masked_conv
from teracon_fast.ops.masked_conv import triton as _triton_masked_conv
from teracon_fast.packing import ResidualTable, TapTable


class _Implementation(Protocol):
    """What a backend's module offers: see `_torch_masked_conv` for the meaning of the arguments."""

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor, ln_weight: Tensor, ln_bias: Tensor, mask: Tensor, taps: Tensor,
        readers: Tensor, bags: int, rows_per_request: list[int], row_ends: Tensor, residual: Tensor | None,
        residual_rows: Tensor | None, eps: float, algorithm: str, save: bool, addend: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...  # fmt: skip

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, ln_weight: Tensor, ln_bias: Tensor, mask: Tensor, taps: Tensor,
        readers: Tensor, bag_rows: Tensor, bag_offsets: Tensor, rows_per_request: list[int], row_ends: Tensor,
        residual_readers: Tensor | None, conv: Tensor, mean: Tensor, rstd: Tensor, eps: float,
        algorithm: str, need_input: bool, need_weight: bool, need_addend: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]: ...  # fmt: skip


ALGORITHMS = ("auto", "direct", "winograd")
_IMPLEMENTATIONS: dict[str, _Implementation] = {
    "cpu": _cpu_masked_conv, "torch": _torch_masked_conv, "triton": _triton_masked_conv
}  # fmt: skip


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
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        residual = None if residual is None else residual.to(dtype)
        addend = None if addend is None else addend.to(dtype)
    _check(x, weight, bias, ln_weight, ln_bias, mask, table, residual, residual_table, addend)
    _check_algorithm(algorithm, backend, weight.shape[2], x)
    floating = (x, weight, bias, ln_weight, ln_bias, mask)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (*floating, residual, addend) if t is not None)
    rows, back = (None, None) if residual_table is None else residual_table
    output: Tensor = _masked_conv(
        x.contiguous(), weight, bias, ln_weight, ln_bias, mask, table.taps, table.readers, table.bag_rows,
        table.bag_offsets, list(table.rows_per_request), table.row_ends, residual, rows, back, eps, backend, algorithm, save,
        addend,
    )[0]  # fmt: skip
    return output


def _check(
    x: Tensor, weight: Tensor, bias: Tensor, ln_weight: Tensor, ln_bias: Tensor, mask: Tensor, table: TapTable,
    residual: Tensor | None, residual_table: ResidualTable | None, addend: Tensor | None,
) -> None:  # fmt: skip
    def expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or tensor.device != x.device:
            raise ShapeError(
                f"masked_conv: {name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, "
                f"expected {' or '.join(map(str, dtypes))} {list(shape)} on {x.device}"
            )

    if weight.dim() != 3:
        raise ShapeError(f"masked_conv: weight is {list(weight.shape)}, expected [f_out, f_in, K]")
    f_out, f_in, kernel_size = weight.shape
    if not x.dtype.is_floating_point:
        raise ShapeError(f"masked_conv: x is {x.dtype}, expected a floating dtype")
    same = (x.dtype,)
    low_precision = x.dtype in (torch.bfloat16, torch.float16)
    wide = (x.dtype, torch.float32) if low_precision else same
    rows_out = table.taps.shape[0]
    expect("x", x, (table.rows_in, f_in), same)
    expect("weight", weight, (f_out, f_in, kernel_size), wide)
    expect("bias", bias, (f_out,), (weight.dtype,))
    expect("ln_weight", ln_weight, (f_out,), wide)
    expect("ln_bias", ln_bias, (f_out,), (ln_weight.dtype,))
    expect("mask", mask, (len(table.rows_per_request), f_out), wide)
    expect("table.taps", table.taps, (rows_out, kernel_size), (torch.int32,))
    expect("table.readers", table.readers, (table.rows_in, kernel_size), (torch.int32,))
    expect("table.row_ends", table.row_ends, (len(table.rows_per_request),), (torch.int32,))
    if sum(table.rows_per_request) != rows_out:
        raise ShapeError(f"masked_conv: rows_per_request sums to {sum(table.rows_per_request)}, expected {rows_out} rows")
    if addend is not None:
        expect("addend", addend, (rows_out, f_out), same)
    if (residual is None) != (residual_table is None):
        raise ShapeError("masked_conv: residual and residual_table go together: one is given, the other is not")
    if residual is not None and residual_table is not None:
        expect("residual", residual, (residual_table.readers.shape[0], f_out), same)
        expect("residual_table.rows", residual_table.rows, (rows_out,), (torch.int32,))


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


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, ln_weight: Tensor, ln_bias: Tensor, mask: Tensor, taps: Tensor,
    readers: Tensor, bag_rows: Tensor, bag_offsets: Tensor, rows_per_request: list[int], row_ends: Tensor,
    residual: Tensor | None, residual_rows: Tensor | None, residual_readers: Tensor | None, eps: float, backend: str,
    algorithm: str, save: bool, addend: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    implementation = _IMPLEMENTATIONS[backends.resolve(backend, "masked_conv", x.device, x.dtype)]
    return implementation.forward(
        x, weight, bias, ln_weight, ln_bias, mask, taps, readers, bag_offsets.shape[0] - 1, rows_per_request, row_ends,
        residual, residual_rows, eps, algorithm, save, addend,
    )  # fmt: skip


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor, ln_weight: Tensor, ln_bias: Tensor, mask: Tensor, taps: Tensor,
    readers: Tensor, bag_rows: Tensor, bag_offsets: Tensor, rows_per_request: list[int], row_ends: Tensor,
    residual: Tensor | None, residual_rows: Tensor | None, residual_readers: Tensor | None, eps: float, backend: str,
    algorithm: str, save: bool, addend: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows, f_out = taps.shape[0], weight.shape[0]
    kept = rows if save else 0
    statistics = _torch_masked_conv.statistics_dtype(x.dtype)
    return (
        x.new_empty(rows, f_out),
        x.new_empty(kept, f_out),
        x.new_empty(kept, 1, dtype=statistics),
        x.new_empty(kept, 1, dtype=statistics),
    )


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, ln_weight: Tensor, ln_bias: Tensor, mask: Tensor, taps: Tensor,
    readers: Tensor, bag_rows: Tensor, bag_offsets: Tensor, rows_per_request: list[int], row_ends: Tensor,
    residual_readers: Tensor | None, conv: Tensor, mean: Tensor, rstd: Tensor, eps: float, backend: str, algorithm: str,
    need_input: bool, need_weight: bool, need_addend: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    implementation = _IMPLEMENTATIONS[backends.resolve(backend, "masked_conv", x.device, x.dtype)]
    return implementation.backward(
        grad, x, weight, ln_weight, ln_bias, mask, taps, readers, bag_rows, bag_offsets, rows_per_request,
        row_ends, residual_readers, conv, mean, rstd, eps, algorithm, need_input, need_weight, need_addend,
    )  # fmt: skip


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, ln_weight: Tensor, ln_bias: Tensor, mask: Tensor, taps: Tensor,
    readers: Tensor, bag_rows: Tensor, bag_offsets: Tensor, rows_per_request: list[int], row_ends: Tensor,
    residual_readers: Tensor | None, conv: Tensor, mean: Tensor, rstd: Tensor, eps: float, backend: str, algorithm: str,
    need_input: bool, need_weight: bool, need_addend: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    residual_shape = (0,) if residual_readers is None else (residual_readers.shape[0], weight.shape[0])
    return (
        x.new_empty(x.shape if need_input else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(weight.shape[0]),
        torch.empty_like(ln_weight),
        torch.empty_like(ln_bias),
        torch.empty_like(mask),
        grad.new_empty(residual_shape),
        grad.new_empty(grad.shape if need_addend else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (x, weight, _, ln_weight, ln_bias, mask, taps, readers, bag_rows, bag_offsets,
     rows_per_request, row_ends, _, _, residual_readers, eps, backend, algorithm, _, _) = inputs  # fmt: skip
    _, conv, mean, rstd = output
    ctx.save_for_backward(
        x, weight, ln_weight, ln_bias, mask, taps, readers, bag_rows, bag_offsets, row_ends, residual_readers, conv, mean, rstd
    )
    ctx.rows_per_request, ctx.eps, ctx.backend, ctx.algorithm = rows_per_request, eps, backend, algorithm
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 20
    (x, weight, ln_weight, ln_bias, mask, taps, readers, bag_rows, bag_offsets, row_ends,
     residual_readers, conv, mean, rstd) = ctx.saved_tensors  # fmt: skip
    need = ctx.needs_input_grad
    d_x, d_weight, d_bias, d_ln_weight, d_ln_bias, d_mask, d_residual, d_addend = _masked_conv_backward(
        grad.contiguous(), x, weight, ln_weight, ln_bias, mask, taps, readers, bag_rows, bag_offsets,
        ctx.rows_per_request, row_ends, residual_readers if need[12] else None, conv, mean, rstd, ctx.eps, ctx.backend,
        ctx.algorithm, need[0], need[1], need[19],
    )  # fmt: skip
    gradients: list[Tensor | None] = [d_x, d_weight, d_bias, d_ln_weight, d_ln_bias, d_mask]
    gradients = [g if needed else None for g, needed in zip(gradients, need[:6], strict=True)]
    tables, rest = (None,) * 6, (None,) * 6
    return (*gradients, *tables, d_residual if need[12] else None, *rest, d_addend if need[19] else None)


_FORWARD, _BACKWARD = "teracon_fast::masked_conv", "teracon_fast::masked_conv_backward"
for _name, _function, _fake in ((_FORWARD, _forward, _forward_fake), (_BACKWARD, _backward, _backward_fake)):
    # define + impl rather than custom_op: the latter imports the whole compiler at the first call, some seconds.
    torch.library.define(_name, torch.library.infer_schema(_function, mutates_args=()))
    torch.library.impl(_name, "default", _function)
    torch.library.register_fake(_name, _fake)
torch.library.register_autograd(_FORWARD, _autograd, setup_context=_setup_context)
_masked_conv = torch.ops.teracon_fast.masked_conv.default
_masked_conv_backward = torch.ops.teracon_fast.masked_conv_backward.default
