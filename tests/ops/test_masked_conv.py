"""The masked convolution by itself: exactness, gradients, registration, autocast, inputs that must be refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from instruction_sets import INSTRUCTION_SETS, passes_under
from torch import Tensor

from teracon_fast import env_report, ops, packing
from teracon_fast.errors import ShapeError
from teracon_fast.ops.backends import BackendError
from teracon_fast.ops.masked_conv.api import Inputs, Parameters, Tables, _masked_conv
from teracon_fast.ops.registration import flat
from teracon_fast.packing import ResidualTable, Streams, TapTable


def tables(lengths: list[int], length: int = 9, layer: int = 1, every: bool = False) -> tuple[TapTable, ResidualTable]:
    geometry = packing.geometry(length, (1, 2), 3, every)
    users = np.arange(len(lengths))
    packed = ops.pack(np.array(lengths), [Streams(users), Streams(users[:2])], geometry)
    return packed.convolutions[layer], packed.residuals[layer // 2]


def inputs(
    table: TapTable, back: ResidualTable, f_in: int = 5, f_out: int = 5, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    torch.manual_seed(1)
    shapes = [(table.rows_in, f_in), (f_out, f_in, 3), (f_out,), (f_out,), (f_out,)]
    shapes += [(2, f_out), (back.readers.shape[0], f_out)]
    values = [torch.randn(shape, dtype=dtype) for shape in shapes]
    values[5] = torch.sigmoid(values[5])
    return [value.requires_grad_() for value in values]


def naive(
    x: Tensor, weight: Tensor, bias: Tensor, ln_weight: Tensor, ln_bias: Tensor, mask: Tensor, residual: Tensor,
    table: TapTable, back: ResidualTable,
) -> Tensor:  # fmt: skip
    """The formula in the module's docstring, by plain indexing."""
    padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
    z = bias + torch.einsum("rki,oik->ro", padded[table.taps.long()], weight)
    per_row = mask.repeat_interleave(torch.tensor(table.rows_per_request), 0)
    return per_row * F.layer_norm(z, z.shape[1:], ln_weight, ln_bias, 1e-8).relu() + residual[back.rows.long()]


def run(
    values: list[Tensor], table: TapTable, back: ResidualTable, backend: str = "auto", algorithm: str = "auto"
) -> Tensor:
    return ops.masked_conv(
        *values[:6], table, residual=values[6], residual_table=back, backend=backend, algorithm=algorithm
    )


# Plain PyTorch and the compiled kernels where they are; Triton's have test_triton_conv_backend.py and tests/kernels.
BACKENDS = [name for name in env_report()["backends"]["masked_conv"] if name != "triton"]
# (backend, algorithm), dtype, channels
WAYS = [("torch", "auto"), *([("cpu", "direct"), ("cpu", "winograd")] if "cpu" in BACKENDS else [])]
SIZES = [(way, torch.float32, channels) for way in WAYS for channels in (5, 16, 48, 80)]
SIZES += [(way, torch.bfloat16, 48) for way in WAYS] + [(way, torch.bfloat16, 5) for way in WAYS if way[0] == "cpu"]


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("layer", [1, 3])
def test_gradcheck(every: bool, layer: int) -> None:
    table, back = tables([0, 3, 9], layer=layer, every=every)
    values = inputs(table, back, 3, 3)
    torch.autograd.gradcheck(lambda *v: run(list(v), table, back), values)


@pytest.mark.parametrize(("way", "dtype", "channels"), SIZES)
def test_error_is_that_of_the_same_arithmetic_in_the_same_dtype(
    way: tuple[str, str], dtype: torch.dtype, channels: int
) -> None:
    """err(op, exact) <= 2 err(naive, exact), outputs and every gradient; exact is float64 on the same rounded inputs."""
    table, back = tables([0, 4, 9, 9, 7, 1] * 20, every=True)
    low = [v.detach().requires_grad_() for v in inputs(table, back, channels, channels, torch.float32)]
    low = [v.detach().to(dtype).requires_grad_() for v in low]
    grad = torch.randn(table.taps.shape[0], channels).to(dtype)

    def results(values: list[Tensor], by_op: bool) -> list[Tensor]:
        out = run(values, table, back, *way) if by_op else naive(*values, table, back)
        return [out.detach(), *torch.autograd.grad(out, values, grad.to(out.dtype))]

    exact = results([v.detach().double().requires_grad_() for v in low], by_op=False)
    by_op, by_naive = results(low, by_op=True), results(low, by_op=False)
    for got, plain, truth in zip(by_op, by_naive, exact, strict=True):
        error, allowed = (got.double() - truth).norm(), (plain.double() - truth).norm()
        assert error <= 2 * allowed + 1e-6 * truth.norm()


def test_mask_of_exactly_zero_has_its_gradient() -> None:
    """d(out)/d(mask) = relu(...) also where a mask has underflown to 0."""
    table, back = tables([2, 9])
    values = inputs(table, back)
    with torch.no_grad():
        values[5][0] = 0.0
    got = torch.autograd.grad(run(values, table, back).sum(), values)
    expected = torch.autograd.grad(naive(*values, table, back).sum(), values)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-10)


def test_opcheck() -> None:
    table, back = tables([2, 9, 5])
    v = inputs(table, back)
    addend = torch.randn(table.taps.shape[0], 5, dtype=torch.float64, requires_grad=True)
    given = Tables(*table.tensors, list(table.rows_per_request), *back)
    for values in (v, [value.detach() for value in v]):
        for added in (None, addend):
            save = added is not None or values is v
            arguments = Inputs(values[0], Parameters(*values[1:6]), given, values[6], added, 1e-8, "torch", "auto", save)
            torch.library.opcheck(_masked_conv, tuple(flat(arguments)))


def test_compiles_as_one_graph() -> None:
    table, back = tables([2, 9, 5])
    values = inputs(table, back, dtype=torch.float32)

    def step(*v: Tensor) -> Tensor:
        return run(list(v), table, back).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*values), values)
    expected = torch.autograd.grad(step(*values), values)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


def test_autocast_takes_the_low_precision_and_keeps_float32_parameters() -> None:
    table, back = tables([2, 9, 5])
    values = inputs(table, back, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(values, table, back)
    assert out.dtype == torch.bfloat16
    exact = run(values, table, back)
    assert (out.float() - exact).norm() < 0.03 * exact.norm()
    for gradient, value in zip(torch.autograd.grad(out.float().sum(), values), values, strict=True):
        assert gradient.dtype == value.dtype == torch.float32


def test_layouts_that_are_not_contiguous_give_the_same_result() -> None:
    table, back = tables([2, 9, 5])
    values = inputs(table, back)
    expected = torch.autograd.grad(run(values, table, back).sum(), values)
    strided = [torch.stack([v, -v], -1)[..., 0].detach().requires_grad_() for v in values]
    assert not strided[0].is_contiguous()
    # .sum() sends back a gradient of stride 0.
    for g, e in zip(torch.autograd.grad(run(strided, table, back).sum(), strided), expected, strict=True):
        torch.testing.assert_close(g, e)
    shared = values[3][:1].expand(5)
    a = ops.masked_conv(*values[:3], shared, shared, values[5], table)
    b = ops.masked_conv(*values[:3], shared.contiguous(), shared.contiguous(), values[5], table)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_bits_from_run_to_run(backend: str, threads: int) -> None:
    table, back = tables([0, 4, 9, 9, 7, 1] * 50)
    values = inputs(table, back, 24, 24, torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = (torch.autograd.grad(run(values, table, back, backend).square().sum(), values) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_and_rows_that_read_only_zeros(backend: str) -> None:
    table, back = tables([3, 9], every=True)
    values = inputs(table, back, dtype=torch.float32)
    empty = replace(table, taps=table.taps[:0], rows_per_request=(0, 0), row_ends=table.row_ends * 0, bag_rows=table.bag_rows[:0],
                    bag_offsets=table.bag_offsets[:1], readers=torch.full_like(table.readers, -1))  # fmt: skip
    out = ops.masked_conv(*values[:6], empty, backend=backend)
    assert out.shape == (0, 5)
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), values[:6]))
    zeros = replace(table, taps=torch.full_like(table.taps, -1))
    got = ops.masked_conv(*values[:6], zeros, backend=backend)
    expected = naive(*values[:6], torch.zeros_like(values[6]), zeros, back)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel_size", [2, 4])
def test_other_numbers_of_taps(kernel_size: int) -> None:
    geometry = packing.geometry(11, (1, 2), kernel_size, True)
    table = ops.pack(np.array([11, 4, 7]), [Streams(np.arange(3))], geometry).convolutions[2]
    shapes = [(table.rows_in, 20), (20, 20, kernel_size), (20,), (20,), (20,), (1, 20)]
    values = [torch.randn(shape).requires_grad_() for shape in shapes]
    padded = torch.cat([values[0], values[0].new_zeros(1, 20)])
    z = values[2] + torch.einsum("rki,oik->ro", padded[table.taps.long()], values[1])
    expected = values[5] * F.layer_norm(z, (20,), values[3], values[4], 1e-8).relu()
    got = ops.masked_conv(*values, table)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(got)
    for g, e in zip(torch.autograd.grad(got, values, grad), torch.autograd.grad(expected, values, grad), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-3, atol=1e-4)
    with pytest.raises(ShapeError, match=f"needs K = 3, got {kernel_size}"):
        ops.masked_conv(*values, table, algorithm="winograd")


@pytest.mark.skipif("cpu" not in BACKENDS, reason="this installation has no compiled extension")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_repeat_to_the_bit(dtype: torch.dtype) -> None:
    """On one and on several threads; what no sum over rows enters does not depend on their number either."""
    table, back = tables([0, 4, 9, 9, 7, 1] * 40, every=True)
    values = [v.detach().to(dtype).requires_grad_() for v in inputs(table, back, 40, 40, torch.float32)]
    grad = torch.randn(table.taps.shape[0], 40).to(dtype)

    def results() -> list[Tensor]:
        out = run(values, table, back, "cpu", "winograd")
        return [out.detach(), *torch.autograd.grad(out, values, grad)]

    before = torch.get_num_threads()
    found = {}
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found[threads] = results()
            assert all(torch.equal(a, b) for a, b in zip(found[threads], results(), strict=True))
    finally:
        torch.set_num_threads(before)
    for place in (0, 1, 7):  # out, d(x), d(residual)
        assert torch.equal(found[1][place], found[3][place])


def test_tables_that_no_packer_makes() -> None:
    """Rows read and shared at random: pairs are only those that read as pairs, whatever `readers` says."""
    torch.manual_seed(4)
    taps = torch.randint(-1, 6, (40, 3), dtype=torch.int32)
    table = TapTable(taps, torch.randint(-1, 40, (6, 3), dtype=torch.int32), torch.zeros(0, dtype=torch.int32),
                     torch.zeros(1, dtype=torch.int32), (40,), torch.tensor([40], dtype=torch.int32), 6)  # fmt: skip
    values = [torch.randn(shape) for shape in ((6, 16), (16, 16, 3), (16,), (16,), (16,), (1, 16))]
    for way in WAYS:
        got = ops.masked_conv(*values, table, backend=way[0], algorithm=way[1])
        padded = torch.cat([values[0], torch.zeros(1, 16)])
        z = values[2] + torch.einsum("rki,oik->ro", padded[taps.long()], values[1])
        expected = values[5] * F.layer_norm(z, (16,), values[3], values[4], 1e-8).relu()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_an_algorithm_is_used_or_refused() -> None:
    table, back = tables([2, 9, 5])
    with pytest.raises(ShapeError, match="algorithm is 'fft', expected one of"):
        run(inputs(table, back), table, back, "auto", "fft")
    with pytest.raises(BackendError, match="'winograd' needs backend 'cpu', got 'torch'"):
        run(inputs(table, back), table, back, "auto", "winograd")


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set_that_this_machine_has(isa: str) -> None:
    """The whole of this file again, in a process that is told which kernels to use."""
    if "cpu" not in BACKENDS:
        pytest.skip("this installation has no compiled extension")
    passes_under(isa, __file__, "not instruction_set and not gradcheck")


def test_nan_stays_where_it_belongs() -> None:
    """A NaN in one user's item must reach that user's rows and no other's."""
    table, _ = tables([9, 9], layer=0, every=True)
    x = torch.randn(table.rows_in, 5)
    clean = ops.masked_conv(x, *[v.float() for v in inputs(*tables([9, 9], layer=0, every=True))[1:6]], table)
    x[0] = torch.nan
    dirty = ops.masked_conv(x, *[v.float() for v in inputs(*tables([9, 9], layer=0, every=True))[1:6]], table)
    reached = (table.taps == 0).any(1)
    assert dirty[reached].isnan().all()
    assert torch.equal(dirty[~reached], clean[~reached])


def test_inputs_that_do_not_fit_are_refused() -> None:
    table, back = tables([2, 9, 5])
    v = [t.detach() for t in inputs(table, back)]

    def refused(message: str, *changes: tuple[int, Tensor], table: TapTable = table, **options: object) -> None:
        changed = list(v)
        for index, value in changes:
            changed[index] = value
        with pytest.raises(ShapeError, match=message):
            ops.masked_conv(*changed[:6], table, **{"residual": changed[6], "residual_table": back, **options})  # type: ignore[arg-type]

    refused("x is torch.float64", (0, v[0][1:]))
    refused("x is torch.int64, expected a floating", (0, v[0].long()))
    refused("weight is torch.float32", (1, v[1].float()))
    refused("bias is torch.bfloat16", (0, v[0].bfloat16()), *((i, v[i].float()) for i in (1, 3, 4, 5)), (2, v[2].bfloat16()))
    refused("weight is .*expected \\[f_out, f_in, K\\]", (1, v[1][:, :, None]))
    refused("bias is", (2, v[2][1:]))
    refused("mask is", (5, v[5][:1]))
    refused("mask is .* on meta", (5, v[5].to("meta")))
    refused("table.taps is", table=replace(table, taps=table.taps.long()))
    refused("rows_per_request sums to", table=replace(table, rows_per_request=(1, 1)))
    refused("go together", residual_table=None)
    refused("residual is", (6, v[6][1:]))
    with pytest.raises(BackendError, match="'nonsense' cannot run masked_conv"):
        ops.masked_conv(*v[:6], table, backend="nonsense")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", ["taps", "readers", "bag_rows", "bag_offsets", "residual"])
def test_row_numbers_out_of_range_are_never_read(backend: str, change: str) -> None:
    table, back = tables([0, 2, 9, 5])
    values = inputs(table, back, dtype=torch.float32)
    far = 2**30
    if change == "residual":
        back = back._replace(rows=back.rows + far)
    else:
        broken = getattr(table, change).clone()
        broken.view(-1)[-1] = far
        table = replace(table, **{change: broken})
    with pytest.raises((IndexError, RuntimeError), match=r"out of|out_of|[Ii]ndex|offsets"):
        run(values, table, back, backend).sum().backward()


@pytest.mark.skipif("cpu" not in BACKENDS, reason="this installation has no compiled extension")
def test_an_explicit_backend_is_used_or_refused() -> None:
    table, back = tables([2, 9, 5])
    with pytest.raises(BackendError, match="it runs torch.float32 and torch.bfloat16 on cpu, not torch.float64 on cpu"):
        run(inputs(table, back), table, back, "cpu")


# Not bfloat16 by minimal filtering: which ReLUs its rounding opens is chance, and moves gradients by more than the factor.
@pytest.mark.parametrize(
    ("way", "dtype", "channels"), [size for size in SIZES if size[0][1] != "winograd" or size[1] is torch.float32]
)
def test_an_addend_beside_a_frozen_weight(way: tuple[str, str], dtype: torch.dtype, channels: int) -> None:
    """It is added before LayerNorm; err(op, exact) <= 2 err(naive, exact) of the output and every gradient that there is."""
    table, back = tables([0, 4, 9, 9, 7, 1] * 20, every=True)
    low = [v.detach().to(dtype).requires_grad_() for v in inputs(table, back, channels, channels, torch.float32)]
    low.append(torch.randn(table.taps.shape[0], channels).to(dtype).requires_grad_())
    grad = torch.randn(table.taps.shape[0], channels).to(dtype)

    def results(values: list[Tensor], by_op: bool) -> list[Tensor]:
        x, weight, bias, ln_weight, ln_bias, mask, residual, addend = values
        weight = weight.detach()
        if by_op:
            out = ops.masked_conv(
                x, weight, bias, ln_weight, ln_bias, mask, table, residual=residual, residual_table=back, addend=addend,
                backend=way[0], algorithm=way[1],
            )  # fmt: skip
        else:
            padded = torch.cat([x, x.new_zeros(1, channels)])
            z = bias + torch.einsum("rki,oik->ro", padded[table.taps.long()], weight) + addend
            per_row = mask.repeat_interleave(torch.tensor(table.rows_per_request), 0)
            out = per_row * F.layer_norm(z, (channels,), ln_weight, ln_bias, 1e-8).relu() + residual[back.rows.long()]
        trained = [x, bias, ln_weight, ln_bias, mask, residual, addend]
        return [out.detach(), *torch.autograd.grad(out, trained, grad.to(out.dtype))]

    exact = results([v.detach().double().requires_grad_() for v in low], by_op=False)
    by_op, by_naive = results(low, by_op=True), results(low, by_op=False)
    for got, plain, truth in zip(by_op, by_naive, exact, strict=True):
        error, allowed = (got.double() - truth).norm(), (plain.double() - truth).norm()
        assert error <= 2 * allowed + 1e-6 * truth.norm()


@pytest.mark.parametrize("way", WAYS)
def test_a_weight_without_gradient_changes_no_other_bits(way: tuple[str, str]) -> None:
    table, back = tables([0, 4, 9, 9, 7, 1] * 20, every=True)
    values = inputs(table, back, 26, 18, torch.float32)
    expected = torch.autograd.grad(run(values, table, back, *way).square().sum(), [values[0], *values[2:]])
    values[1].requires_grad_(False)
    got = torch.autograd.grad(run(values, table, back, *way).square().sum(), [values[0], *values[2:]])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_an_addend_that_does_not_fit_is_refused() -> None:
    table, back = tables([2, 9])
    values = inputs(table, back)
    rows = table.taps.shape[0]
    for addend in (torch.zeros(rows, 4).double(), torch.zeros(rows, 5), torch.zeros(rows + 1, 5).double()):
        with pytest.raises(ShapeError, match=r"addend is .*, expected torch.float64 \[\d+, 5\]"):
            ops.masked_conv(*values[:6], table, addend=addend)
