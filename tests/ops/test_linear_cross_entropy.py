"""The cross-entropy of a linear head: exactness, gradients, shared rows, registration, inputs that must be refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import INSTRUCTION_SETS, passes_under
from torch import Tensor

from teracon_fast import env_report, ops
from teracon_fast.errors import ShapeError
from teracon_fast.ops.backends import BackendError
from teracon_fast.ops.linear_cross_entropy import cpu as _cpu_linear_cross_entropy
from teracon_fast.ops.linear_cross_entropy.api import Reduction, _linear_cross_entropy, _linear_cross_entropy_reduced

# Plain PyTorch and the compiled kernels where they are; Triton's have test_triton_backend.py and tests/kernels.
BACKENDS = [name for name in env_report()["backends"]["linear_cross_entropy"] if name != "triton"]
COMPILED = pytest.mark.skipif("cpu" not in BACKENDS, reason="this installation has no compiled extension")


def head(rows: int, labels: int, channels: int, count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """hidden, weight, bias that need gradients; targets and, unsorted, their rows: some have several targets, some none."""
    values = [torch.randn(rows, channels), torch.randn(labels, channels), torch.randn(labels)]
    numbers = [torch.randint(labels, (count,)), torch.randint(max(rows, 1), (count,))]
    return [v.to(dtype).requires_grad_() for v in values] + numbers


def naive(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(F.linear(hidden[rows], weight, bias), targets, reduction=reduction)


@pytest.fixture(params=["kept", "formed again", "with its gradients"])
def storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward with what forward kept, as with heads too large to keep anything, and a loss formed with its gradients."""
    if request.param == "with its gradients":

        def few_rows(rows: int, labels: int, hidden: torch.dtype, weight: torch.dtype) -> int | None:
            return min(rows, 32) or None if rows <= 32 or weight == torch.float32 else None

        monkeypatch.setattr(_cpu_linear_cross_entropy, "rows_at_once", few_rows)
    if request.param == "formed again":
        monkeypatch.setattr(_cpu_linear_cross_entropy, "KEPT_BYTES", -1)
        monkeypatch.setattr(_cpu_linear_cross_entropy, "rows_at_once", lambda *_: None)


# Labels: fewer than a register tile, no multiple of one, several blocks of one size and of unequal ones.
SIZES = [(1, 1, 1, 3), (5, 7, 3, 9), (33, 14, 16, 20), (70, 253, 33, 300), (300, 1000, 64, 500), (257, 3500, 20, 257)]


@pytest.mark.usefixtures("storage")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "labels", "channels", "count"), SIZES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 80.0])
def test_error_is_that_of_the_same_arithmetic_in_the_same_dtype(
    backend: str, rows: int, labels: int, channels: int, count: int, scale: float
) -> None:
    """err(op, exact) <= 2 err(naive, exact), losses and every gradient; exact is float64. The largest logits are +-`scale`."""
    hidden, weight, bias, targets, row_of = head(rows, labels, channels, count)
    with torch.no_grad():
        largest = F.linear(hidden, weight, bias).abs().max() / scale
        weight /= largest
        bias /= largest
        targets[::2] = F.linear(hidden, weight, bias).argmax(1)[row_of[::2]]  # losses near zero too
    low = [hidden, weight, bias]
    grad = torch.randn(count)

    def results(values: list[Tensor], by_op: bool) -> list[Tensor]:
        if by_op:
            losses = ops.linear_cross_entropy(*values, targets, row_of, reduction="none", backend=backend)
        else:
            losses = naive(*values, targets, row_of, "none")
        mean = losses.mean().detach()
        return [losses.detach(), mean, *torch.autograd.grad(losses, values, grad.to(losses.dtype))]

    exact = results([v.detach().double().requires_grad_() for v in low], by_op=False)
    by_op, by_naive = results(low, by_op=True), results(low, by_op=False)
    for got, plain, truth in zip(by_op, by_naive, exact, strict=True):
        assert got.dtype == torch.float32
        error, allowed = (got.double() - truth).norm(), (plain.double() - truth).norm()
        assert error <= 2 * allowed + 3e-7 * truth.norm() + 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_and_one_target_per_row(backend: str, reduction: Reduction) -> None:
    hidden, weight, bias, targets, _ = head(40, 90, 12, 40)
    every = torch.arange(40)
    expected = naive(hidden, weight, bias, targets, every, reduction)
    got = ops.linear_cross_entropy(hidden, weight, bias, targets, reduction=reduction, backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    inputs = (hidden, weight, bias)
    pairs = zip(torch.autograd.grad(got.sum() * 3, inputs), torch.autograd.grad(expected.sum() * 3, inputs), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradcheck() -> None:
    *values, targets, rows = head(5, 11, 4, 7, torch.float64)
    for reduction in ("mean", "sum", "none"):
        torch.autograd.gradcheck(lambda *v: ops.linear_cross_entropy(*v, targets, rows, reduction=reduction), values)  # noqa: B023


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_that_are_asked_for(backend: str, needed: tuple[bool, ...]) -> None:
    *values, targets, rows = head(20, 30, 6, 25)
    expected = torch.autograd.grad(naive(*values, targets, rows), values)[needed.index(True)]
    values = [v.detach().requires_grad_(n) for v, n in zip(values, needed, strict=True)]
    ops.linear_cross_entropy(*values, targets, rows, backend=backend).backward()
    torch.testing.assert_close(values[needed.index(True)].grad, expected, rtol=1e-4, atol=1e-6)
    assert [v.grad is not None for v in values] == list(needed)


def low_precision(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
    """Eager PyTorch in the dtype of `hidden`: the losses."""
    logits = F.linear(hidden, weight.to(hidden.dtype), bias.to(hidden.dtype))[rows]
    return F.cross_entropy(logits.float(), targets, reduction="none")


@pytest.mark.usefixtures("storage")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "labels", "channels", "count"), SIZES)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_error_in_bfloat16_is_that_of_eager_bfloat16(
    backend: str, rows: int, labels: int, channels: int, count: int, weights: torch.dtype
) -> None:
    """err(op, exact) <= 2 err(eager in bfloat16, exact), with float32 master weights and with bfloat16 ones."""
    hidden, weight, bias, targets, row_of = head(rows, labels, channels, count)
    low = hidden.detach().bfloat16().requires_grad_()
    values = [low, *(v.detach().to(weights).requires_grad_() for v in (weight, bias))]
    grad = torch.rand(count)
    losses = ops.linear_cross_entropy(*values, targets, row_of, reduction="sum", target_weights=grad, backend=backend)
    got = [losses, *torch.autograd.grad(losses, values)]
    assert [g.dtype for g in got] == [torch.float32, torch.bfloat16, weights, weights]
    plain = (low_precision(*values, targets, row_of) * grad).sum()
    eager = [plain, *torch.autograd.grad(plain, values)]
    wide = [v.detach().double().requires_grad_() for v in values]
    truth = (naive(*wide, targets, row_of, "none") * grad).sum()
    for g, e, t in zip(got, eager, [truth, *torch.autograd.grad(truth, wide)], strict=True):
        assert (g.double() - t).norm() <= 2 * (e.double() - t).norm() + 4e-3 * t.norm() + 1e-2 / rows


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_rounds_hidden_states_and_not_the_masters(backend: str) -> None:
    hidden, weight, bias, targets, rows = head(40, 90, 12, 60)
    low = hidden.detach().bfloat16()
    expected = ops.linear_cross_entropy(low, weight, bias, targets, rows, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ops.linear_cross_entropy(hidden, weight, bias, targets, rows, backend=backend)
    assert torch.equal(loss, expected)
    assert [g.dtype for g in torch.autograd.grad(loss, (hidden, weight, bias))] == [torch.float32] * 3


@pytest.mark.usefixtures("storage")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_weight_is_the_target_that_often(backend: str, reduction: Reduction) -> None:
    """Task 1's equal rows: one row with counts gives what a row for each gives."""
    *values, targets, rows = head(70, 200, 12, 90)
    counts = torch.randint(1, 5, (90,))
    once = ops.linear_cross_entropy(*values, targets, rows, target_weights=counts.float(), reduction=reduction, backend=backend)
    often = naive(*values, targets.repeat_interleave(counts), rows.repeat_interleave(counts), reduction)
    if reduction == "none":
        often = often.new_zeros(90).index_add(0, torch.arange(90).repeat_interleave(counts), often)
    torch.testing.assert_close(once, often, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(once.sum(), values), torch.autograd.grad(often.sum(), values), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("storage")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
def test_predictions_with_many_ties(backend: str, dtype: torch.dtype, threads: int) -> None:
    """Small whole numbers, so that all logits are exact and many are equal."""
    hidden, weight = torch.randint(-1, 2, (90, 3)).to(dtype).requires_grad_(), torch.randint(-1, 2, (300, 3)).float()
    bias, targets, rows = torch.zeros(300), torch.randint(300, (200,)), torch.randint(90, (200,))
    order = F.linear(hidden.float(), weight).sort(dim=1, descending=True, stable=True).indices
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = ops.linear_cross_entropy(hidden, weight, bias, targets, rows, predictions=True, backend=backend)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found.argmax, order[:, 0])
    assert torch.equal(found.rank, (order[rows] == targets[:, None]).nonzero()[:, 1])
    assert torch.equal(found.loss, ops.linear_cross_entropy(hidden, weight, bias, targets, rows, backend=backend))
    found.loss.backward()  # predictions carry no gradient and disturb none
    assert hidden.grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_predictions_of_logits_that_are_not_numbers(backend: str) -> None:
    hidden, weight, bias = torch.ones(2, 1), torch.arange(4.0)[:, None], torch.zeros(4)
    bias[3] = torch.nan
    found = ops.linear_cross_entropy(hidden, weight, bias, torch.tensor([2, 3]), predictions=True, backend=backend)
    assert found.argmax.tolist() == [2, 2]
    assert found.rank.tolist() == [1, 4]
    bias[3] = torch.inf
    found = ops.linear_cross_entropy(hidden, weight, bias, torch.tensor([2, 3]), predictions=True, backend=backend)
    assert (found.argmax.tolist(), found.rank.tolist()) == ([3, 3], [1, 0])


@COMPILED
@pytest.mark.usefixtures("storage")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_filtering_leaves_out_what_is_below_and_nothing_else(dtype: torch.dtype) -> None:
    """A far label has no probability: with it filtered, gradients hardly change; near ones are untouched; a target never is."""
    hidden, weight, bias, _, rows = head(64, 600, 16, 100)
    low = hidden.detach().to(dtype).requires_grad_()
    with torch.no_grad():
        bias[252:504] = -60.0  # two whole blocks, where probabilities are about 1e-26
    targets = torch.cat([torch.randint(252, (99,)), torch.tensor([300])])
    values = [low, weight, bias]

    def gradients(eps: float) -> tuple[Tensor, ...]:
        loss = ops.linear_cross_entropy(*values, targets, rows, filter_eps=eps, backend="cpu")
        return loss, *torch.autograd.grad(loss, values)

    exact, filtered = gradients(0.0), gradients(2.0**-24)
    assert torch.equal(exact[0], filtered[0])
    for a, b in zip(exact[1:], filtered[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    tile = torch.zeros(600, dtype=torch.bool)
    tile[290:320] = True  # whatever the tile's size, it holds label 300
    assert not filtered[2][252:504][~tile[252:504]].any() and not filtered[3][252:504][~tile[252:504]].any()
    assert exact[3][252:504].count_nonzero() > 200
    assert filtered[3][300] == exact[3][300]
    assert all(torch.equal(a, b) for a, b in zip(exact[2][:252], filtered[2][:252], strict=True))


@COMPILED
def test_rows_times_labels_beyond_the_range_of_32_bits() -> None:
    """One channel keeps the memory small: 300 rows by 7.2 million labels are 2.16e9 logits, none of which is stored."""
    labels = 7_200_000
    hidden, weight = torch.ones(300, 1), torch.zeros(labels, 1)
    bias = torch.zeros(labels)
    bias[-1] = 20.0
    targets = torch.arange(labels - 300, labels)
    assert hidden.shape[0] * labels > 2**31
    values = [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = ops.linear_cross_entropy(*values, targets, reduction="none", predictions=True, backend="cpu")
        d_bias = torch.autograd.grad(found.loss.sum(), bias)[0]
    finally:
        torch.set_num_threads(before)
    total = torch.tensor(labels - 1.0).double() + torch.tensor(20.0).double().exp()
    torch.testing.assert_close(found.loss[:-1].double(), total.log().expand(299), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.loss[-1].double(), total.log() - 20, rtol=1e-4, atol=0)
    assert found.argmax.eq(labels - 1).all()
    assert torch.equal(found.rank[:-1], targets[:-1] + 1) and found.rank[-1] == 0
    best = torch.tensor(20.0).double().exp() / total
    torch.testing.assert_close(d_bias[-1].double(), 300 * best - 1, rtol=1e-5, atol=0)
    torch.testing.assert_close(d_bias[-2].double(), 300 / total - 1, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_that_are_not_contiguous_give_the_same_result(backend: str) -> None:
    *values, targets, rows = head(20, 30, 6, 25)
    expected = torch.autograd.grad(ops.linear_cross_entropy(*values, targets, rows, backend=backend), values)
    strided = [torch.stack([v, -v], -1)[..., 0].detach().requires_grad_() for v in values]
    numbers = [torch.stack([n, n * 0 - 1], -1)[:, 0] for n in (targets, rows)]
    assert not strided[0].is_contiguous() and not numbers[0].is_contiguous()
    for g, e in zip(torch.autograd.grad(ops.linear_cross_entropy(*strided, *numbers, backend=backend), strided), expected,
                    strict=True):  # fmt: skip
        torch.testing.assert_close(g, e)
    one = values[0].detach()[:1].expand(20, 6)
    got = ops.linear_cross_entropy(one, *values[1:], targets, rows, backend=backend)
    torch.testing.assert_close(got, naive(one, *values[1:], targets, rows))


@pytest.mark.usefixtures("storage")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_same_bits_from_run_to_run(backend: str, threads: int) -> None:
    *values, targets, rows = head(150, 400, 24, 300)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = []
        for _ in range(2):
            loss = ops.linear_cross_entropy(*values, targets, rows, backend=backend)
            runs.append([loss, *torch.autograd.grad(loss, values)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    torch.testing.assert_close(runs[0][0], naive(*values, targets, rows))


@COMPILED
def test_backward_need_not_have_as_many_threads_as_forward() -> None:
    *values, targets, rows = head(150, 400, 24, 300)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        loss = ops.linear_cross_entropy(*values, targets, rows, backend="cpu")
        torch.set_num_threads(3)
        got = torch.autograd.grad(loss, values)
    finally:
        torch.set_num_threads(before)
    for g, e in zip(got, torch.autograd.grad(naive(*values, targets, rows), values), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("storage")
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_and_no_targets(backend: str) -> None:
    *values, targets, rows = head(0, 30, 6, 0)
    losses = ops.linear_cross_entropy(*values, targets, reduction="none", backend=backend)
    assert losses.shape == (0,)
    assert all(not g.any() and g.isfinite().all() for g in torch.autograd.grad(losses.sum(), values))
    *values, _, _ = head(9, 30, 6, 0)
    assert ops.linear_cross_entropy(*values, targets, rows, backend=backend).isnan()
    losses = ops.linear_cross_entropy(*values, targets, rows, reduction="none", backend=backend)
    assert all(not g.any() for g in torch.autograd.grad(losses.sum(), values))


@pytest.mark.usefixtures("storage")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["a row", "a label", "the target", "all labels"])
def test_logits_that_are_not_finite_give_what_dense_logits_give(backend: str, value: float, where: str) -> None:
    *values, targets, rows = head(40, 200, 6, 40)
    rows = torch.arange(40)
    with torch.no_grad():
        if where == "a row":
            values[0][3] = value
        else:
            labels = {"a label": [150], "the target": targets[:1].tolist(), "all labels": list(range(200))}[where]
            targets[5] = 0
            values[2][labels] = value
    got = ops.linear_cross_entropy(*values, targets, rows, reduction="none", backend=backend)
    expected = naive(*values, targets, rows, "none")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    for g, e in zip(torch.autograd.grad(got.sum(), values), torch.autograd.grad(expected.sum(), values), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5, equal_nan=True)


@COMPILED
def test_what_is_held_between_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exponentials of all logits up to a limit, rows rounded up to 32; nothing without gradients or beyond the limit."""
    *values, targets, rows = head(40, 200, 6, 50)

    def kept(save: bool) -> int:
        return sum(t.numel() for t in _linear_cross_entropy(*values, targets, rows, 0.0, "cpu", save, False)[2:])

    assert kept(False) == 0
    assert kept(True) == 200 * 64 + 15 * 64
    assert 4 * kept(True) < _cpu_linear_cross_entropy.KEPT_BYTES
    monkeypatch.setattr(_cpu_linear_cross_entropy, "KEPT_BYTES", 4 * 200 * 64 - 1)
    assert kept(True) == 0


@COMPILED
def test_when_a_loss_is_formed_with_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all exponentials are too many to keep, but those of enough rows are not; a loss that is scaled scales them."""
    single, half = torch.float32, torch.bfloat16
    at_once = _cpu_linear_cross_entropy.rows_at_once
    assert at_once(1600, 20_000, single, single) == at_once(1600, 20_000, half, single) == 416
    assert at_once(400, 20_000, single, single) is None, "all exponentials may be kept"
    assert at_once(1600, 100_000, single, single) == 384
    assert at_once(1600, 300_000, single, single) == 128 and at_once(1600, 300_000, half, single) is None
    assert at_once(1600, 640_000, single, single) is None, "too few rows at once"
    assert at_once(26, 640_000, half, half) == 26 and at_once(1600, 20_000, half, half) is None, "one turn adds nothing"
    *values, targets, rows = head(70, 30, 6, 100)
    expected = torch.autograd.grad(2.5 * naive(*values, targets, rows), values)
    monkeypatch.setattr(_cpu_linear_cross_entropy, "rows_at_once", lambda *_: 32)
    for g, e in zip(torch.autograd.grad(2.5 * ops.linear_cross_entropy(*values, targets, rows), values), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-6)
    values[1].requires_grad_(False)
    ops.linear_cross_entropy(*values, targets, rows).backward()
    assert values[1].grad is None and values[0].grad is not None
    torch.library.opcheck(_linear_cross_entropy_reduced, (*values, targets, rows, torch.rand(100), 0.0, "cpu", True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    *values, targets, rows = head(5, 11, 4, 7)
    torch.library.opcheck(_linear_cross_entropy, (*values, targets, rows, 0.0, backend, True, True))
    torch.library.opcheck(_linear_cross_entropy, (*(v.detach() for v in values), targets, rows, 0.0, backend, False, False))
    torch.library.opcheck(_linear_cross_entropy, (values[0].bfloat16(), *values[1:], targets, rows, 0.0, backend, True, True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend: str) -> None:
    *values, targets, rows = head(5, 11, 4, 7)

    def step(*v: Tensor) -> Tensor:
        return ops.linear_cross_entropy(*v, targets, rows, backend=backend) * 2

    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*values), values)
    for g, e in zip(got, torch.autograd.grad(step(*values), values), strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@COMPILED
def test_every_instruction_set_that_this_machine_has(isa: str) -> None:
    """The whole of this file again, in a process that is told which kernels to use."""
    passes_under(isa, __file__, "not instruction_set and not gradcheck and not opcheck and not compiles and not torch and not 32")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("far", [-1, 30, 2**40, -(2**62)])
def test_numbers_out_of_range_are_never_read(backend: str, far: int) -> None:
    *values, targets, rows = head(20, 30, 6, 25)
    for name in ("targets", "rows"):
        numbers = {"targets": targets, "rows": rows}
        numbers[name] = numbers[name].index_fill(0, torch.tensor([7]), far)
        with pytest.raises((IndexError, RuntimeError), match=f"{name} has {far}, which is out of range: expected 0 to"):
            ops.linear_cross_entropy(*values, **numbers, backend=backend)


def test_inputs_that_do_not_fit_are_refused() -> None:
    hidden, weight, bias, targets, rows = (t.detach() for t in head(5, 11, 4, 7))

    def refused(message: str, **changes: object) -> None:
        arguments = {"hidden": hidden, "weight": weight, "bias": bias, "targets": targets, "rows": rows}
        with pytest.raises(ShapeError, match=message):
            ops.linear_cross_entropy(**arguments | changes)  # type: ignore[arg-type]

    refused("weight is torch.float32 \\[11, 4\\].*expected torch.float32 \\[11, 3\\]", hidden=hidden[:, 1:])
    refused("expected \\[R, f\\], \\[C, f\\], C at least 1", hidden=hidden[0])
    refused("C at least 1", weight=weight[:0], bias=bias[:0])
    refused("hidden is torch.int64, expected a floating", hidden=hidden.long())
    refused("weight is torch.float64", weight=weight.double())
    refused("weight is .* on meta", weight=weight.to("meta"))
    refused("bias is torch.float32 \\[10\\]", bias=bias[1:])
    refused("bias is torch.bfloat16", hidden=hidden.bfloat16(), bias=bias.bfloat16())
    refused("targets is torch.int32", targets=targets.int())
    refused("targets is torch.int64 \\[7\\].*expected torch.int64 \\[5\\]", rows=None)
    refused("targets are \\[7, 1\\], expected \\[N\\]", targets=targets[:, None])
    refused("rows is torch.int64 \\[6\\]", rows=rows[1:])
    refused("reduction is 'median'", reduction="median")
    refused("filter_eps is -1.0", filter_eps=-1.0)
    refused("target_weights is torch.float32 \\[6\\]", target_weights=torch.ones(6))
    refused("target_weights is torch.int64", target_weights=rows)
    with pytest.raises(BackendError, match="'nonsense' cannot run linear_cross_entropy"):
        ops.linear_cross_entropy(hidden, weight, bias, targets, rows, backend="nonsense")


@COMPILED
def test_an_explicit_backend_is_used_or_refused() -> None:
    with pytest.raises(BackendError, match="it runs torch.float32 and torch.bfloat16 on cpu, not torch.float64 on cpu"):
        ops.linear_cross_entropy(*head(5, 11, 4, 7, torch.float64), backend="cpu")
