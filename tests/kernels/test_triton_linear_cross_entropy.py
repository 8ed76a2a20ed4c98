"""Triton's cross-entropy of a linear head against float64: losses, predictions, gradients, edges."""

from __future__ import annotations

import mmap

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_here import require_triton

from teracon_fast.ops.heads import Head
from teracon_fast.ops.linear_cross_entropy import torch as plain
from teracon_fast.ops.linear_cross_entropy.api import Backward, Inputs

require_triton()

from teracon_fast.kernels import linear_cross_entropy as kernels
from teracon_fast.kernels.configs import config

# Smaller than a tile, no multiple of one, several shares of labels and of rows, several tiles of channels.
SIZES = [(1, 1, 1, 3), (5, 7, 3, 9), (33, 40, 16, 20), (37, 101, 40, 60), (50, 230, 70, 120)]


def head(
    device: torch.device, rows: int, labels: int, channels: int, count: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """hidden, weight, bias; targets and, unsorted, their rows: some have several targets, some none."""
    values = [torch.randn(rows, channels).to(dtype), torch.randn(labels, channels), torch.randn(labels)]
    numbers = [torch.randint(labels, (count,)), torch.randint(max(rows, 1), (count,))]
    return [tensor.to(device) for tensor in values + numbers]


def naive(dtype: torch.dtype, values: list[Tensor], targets: Tensor, rows: Tensor, grad: Tensor) -> list[Tensor]:
    """Losses and gradients by plain operations of a dtype."""
    leaves = [value.to(dtype).requires_grad_() for value in values]
    losses = F.cross_entropy(F.linear(*leaves)[rows], targets, reduction="none")
    return [losses.detach(), *torch.autograd.grad(losses, leaves, grad.to(dtype))]


def assert_as_exact(got: list[Tensor], by_naive: list[Tensor], exact: list[Tensor]) -> None:
    for value, simple, truth in zip(got, by_naive, exact, strict=True):
        error, allowed = (value.double() - truth).norm(), (simple.double() - truth).norm()
        assert error <= 2 * allowed + 3e-7 * truth.norm() + 1e-9


@pytest.mark.parametrize(("rows", "labels", "channels", "count"), SIZES)
def test_error_is_that_of_the_same_arithmetic_in_the_same_dtype(
    device: torch.device, rows: int, labels: int, channels: int, count: int
) -> None:
    *values, targets, row_of = head(device, rows, labels, channels, count)
    grad = torch.randn(count, device=device)
    losses, statistics, argmax, rank = kernels.forward(*values, targets, row_of, True)
    gradients = kernels.backward(grad, *values, targets, row_of, statistics, True, True, 0.0)
    exact = naive(torch.float64, values, targets, row_of, grad)
    assert_as_exact([losses, *gradients], naive(torch.float32, values, targets, row_of, grad), exact)
    logits = F.linear(*(value.double() for value in values))
    torch.testing.assert_close(statistics[0], logits.amax(1).float())
    torch.testing.assert_close(statistics[1], (logits - logits.amax(1, keepdim=True)).exp().sum(1).float())
    assert torch.equal(argmax, logits.argmax(1))
    assert torch.equal(rank, (logits[row_of] > logits[row_of, targets][:, None]).sum(1))
    again = kernels.forward(*values, targets, row_of, False)
    assert torch.equal(again[0], losses) and torch.equal(again[1], statistics)
    assert again[2].shape == again[3].shape == (0,)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_bfloat16_rounds_weights_where_they_are_used(device: torch.device, weights: torch.dtype) -> None:
    *values, targets, rows = head(device, 20, 75, 40, 30, torch.bfloat16)
    values[1:] = [value.to(weights) for value in values[1:]]
    grad = torch.randn(30, device=device)
    losses, statistics, *_ = kernels.forward(*values, targets, rows, False)
    gradients = kernels.backward(grad, *values, targets, rows, statistics, True, True, 0.0)
    assert [t.dtype for t in (losses, statistics)] == [torch.float32, torch.float32]
    assert [g.dtype for g in gradients] == [torch.bfloat16, weights, weights]
    rounded = [value.bfloat16() if value.dim() == 2 else value for value in values]
    exact = naive(torch.float64, rounded, targets, rows, grad)
    assert_as_exact([losses, *gradients], naive(torch.bfloat16, rounded, targets, rows, grad), exact)
    assert (losses.double() - exact[0]).abs().max() < 1e-4


def test_ties_go_to_the_lower_label_and_many_targets_may_share_a_row(device: torch.device) -> None:
    hidden = torch.randint(-1, 2, (19, 3), device=device).float()
    weight, bias = torch.randint(-1, 2, (90, 3), device=device).float(), torch.zeros(90, device=device)
    targets, rows = torch.randint(90, (80,), device=device), torch.randint(19, (80,), device=device) // 6 * 6
    order = F.linear(hidden, weight, bias).sort(dim=1, descending=True, stable=True).indices
    losses, _, argmax, rank = kernels.forward(hidden, weight, bias, targets, rows, True)
    assert torch.equal(argmax, order[:, 0])
    assert torch.equal(rank, (order[rows] == targets[:, None]).nonzero()[:, 1])
    torch.testing.assert_close(losses, F.cross_entropy(F.linear(hidden, weight, bias)[rows], targets, reduction="none"))


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, True), (False, False, True)])
def test_only_the_gradients_that_are_asked_for(device: torch.device, needed: tuple[bool, bool, bool]) -> None:
    *values, targets, rows = head(device, 20, 45, 6, 25)
    grad = torch.randn(25, device=device)
    statistics = kernels.forward(*values, targets, rows, False)[1]
    known = (grad, *values, targets, rows, statistics)
    gradients = kernels.backward(*known, needed[0], needed[1], 0.0, need_bias=needed[2])
    for one, expected, wanted in zip(gradients, kernels.backward(*known, True, True, 0.0), needed, strict=True):
        assert torch.equal(one, expected) if wanted else one.shape == (0,)


def test_layouts_that_are_not_contiguous_give_the_same_bits(device: torch.device) -> None:
    *values, targets, rows = head(device, 20, 45, 20, 25)
    grad = torch.randn(25, device=device)
    strided = [
        values[0].t().contiguous().t(),
        torch.cat([values[1], values[1] * torch.nan], 1)[:, :20],
        torch.stack([values[2], values[2] * torch.nan], 1)[:, 0],
    ]
    numbers = [torch.stack([number, number - 10**6], 1)[:, 0] for number in (targets, rows)]
    assert not any(tensor.is_contiguous() for tensor in strided + numbers)
    results = []
    for tensors in ([*values, targets, rows], [*strided, *numbers]):
        losses, statistics, *predicted = kernels.forward(*tensors, True)
        spread = torch.stack([statistics, statistics], -1)[..., 0]
        thin = torch.stack([grad, grad], -1)[:, 0]
        results.append([losses, *predicted, *kernels.backward(thin, *tensors, spread, True, True, 0.0)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    one = values[0][:1].expand(20, 20)
    losses, *_ = kernels.forward(one, *values[1:], targets, rows, False)
    torch.testing.assert_close(losses, F.cross_entropy(F.linear(one, *values[1:])[rows], targets, reduction="none"))


@pytest.mark.parametrize(("rows", "count"), [(0, 0), (18, 0)])
def test_no_rows_and_no_targets(device: torch.device, rows: int, count: int) -> None:
    *values, targets, row_of = head(device, rows, 35, 5, count)
    losses, statistics, argmax, rank = kernels.forward(*values, targets, row_of, True)
    assert losses.shape == rank.shape == (0,) and statistics.shape == (2, rows)
    assert torch.equal(argmax, F.linear(*values).argmax(1))
    gradients = kernels.backward(losses, *values, targets, row_of, statistics, True, True, 0.0)
    for gradient, value in zip(gradients, values, strict=True):
        assert torch.equal(gradient, torch.zeros_like(value))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_is_as_in_plain_pytorch(device: torch.device) -> None:
    """A row with NaN, with +inf, with -inf at its target, elsewhere, everywhere, and an ordinary one.

    One row at a time: an infinite bias reaches every row.
    """
    logits = torch.randn(6, 45, device=device)
    logits[0, 3], logits[1, 40], logits[2, 7], logits[3, 8], logits[4] = torch.nan, torch.inf, -torch.inf, -torch.inf, -torch.inf
    hidden, weight = torch.ones(6, 1, device=device), torch.zeros(45, 1, device=device)
    targets, rows = torch.full((6,), 7, device=device), torch.arange(6, device=device)
    for row in range(6):
        values = (hidden[row : row + 1], weight, logits[row])
        known = (targets[:1], rows[:1])
        losses, statistics, _, rank = kernels.forward(*values, *known, True)
        inputs = Inputs(Head(*values), *known, 0.0, "torch", True, False)
        expected, kept, *_ = plain.forward(inputs)
        torch.testing.assert_close(losses, expected, equal_nan=True)
        before = (logits[row] > logits[row, 7]).sum() + (logits[row, :7] == logits[row, 7]).sum()
        assert int(rank[0]) == (45 if row == 0 else int(before))
        grad = torch.ones(1, device=device)
        got = kernels.backward(grad, *values, *known, statistics, True, True, 0.0)
        filtered = kernels.backward(grad, *values, *known, statistics, True, True, 1e-9)
        truth = plain.backward(Backward(grad, inputs, kept, True, True)).head
        for one, other, by_plain in zip(got, filtered, truth, strict=True):
            torch.testing.assert_close(one, by_plain, equal_nan=True, rtol=1e-4, atol=1e-6)
            assert one.isnan().equal(other.isnan()), "what is not a number must not be filtered out"


def test_same_bits_from_run_to_run(device: torch.device) -> None:
    *values, targets, rows = head(device, 50, 150, 24, 120)
    grad = torch.randn(120, device=device)
    runs = []
    for _ in range(2):
        losses, statistics, *predicted = kernels.forward(*values, targets, rows, True)
        gradients = kernels.backward(grad, *values, targets, rows, statistics, True, True, 0.0)
        runs.append([losses, statistics, *predicted, *gradients])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_filter_leaves_out_tiles_of_small_probabilities_without_a_target(device: torch.device) -> None:
    """Against float64, with exactly the tiles that should be left out set to zero."""
    *values, targets, rows = head(device, 40, 150, 24, 30)
    values[1] *= 3.0
    eps, grad = 0.02, torch.randn(30, device=device)
    statistics = kernels.forward(*values, targets, rows, False)[1]
    hidden, weight, bias = (value.double() for value in values)
    probabilities = F.linear(hidden, weight, bias).softmax(1)
    onehot = torch.zeros_like(probabilities)
    onehot.index_put_((rows, targets), -grad.double(), accumulate=True)
    d_logits = probabilities * -onehot.sum(1, keepdim=True) + onehot
    got = kernels.backward(grad, *values, targets, rows, statistics, True, True, eps)
    torch.testing.assert_close(got[2].double(), d_logits.sum(0), rtol=1e-4, atol=1e-5)
    holds = torch.zeros_like(probabilities, dtype=torch.bool)
    holds[rows, targets] = True
    for gradient, operation, times in ((got[0], "hidden", lambda d: d @ weight), (got[1], "weight", lambda d: d.t() @ hidden)):
        sizes = config(operation, device, torch.float32, 150)
        kept = torch.zeros_like(holds)
        for row in range(0, 40, sizes.rows):
            for label in range(0, 150, sizes.columns):
                tile = (slice(row, row + sizes.rows), slice(label, label + sizes.columns))
                kept[tile] = bool((probabilities[tile] >= eps).any() | holds[tile].any())
        if device.type == "cpu":  # a GPU's tiles are larger
            assert not kept.all()
        torch.testing.assert_close(gradient.double(), times(d_logits * kept), rtol=1e-4, atol=1e-5)
    exact = kernels.backward(grad, *values, targets, rows, statistics, True, True, 0.0)
    tiny = kernels.backward(grad, *values, targets, rows, statistics, True, True, 1e-30)
    assert all(torch.equal(one, other) for one, other in zip(exact, tiny, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="addresses that hold nothing are the CPU's")
def test_rows_of_operands_may_lie_more_than_two_to_the_31_elements_apart(device: torch.device) -> None:
    """Address space without memory: only the pages that the few rows lie in are ever filled."""
    *values, targets, rows = head(device, 3, 3, 5, 6)
    apart = 2**30 + 3
    try:
        space = mmap.mmap(-1, 4 * (4 * apart), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
    except OSError as error:
        pytest.skip(f"no address space: {error}")
    whole = torch.frombuffer(space, dtype=torch.float32)
    far = [whole.as_strided((3, 5), (apart, 1), offset).copy_(v) for offset, v in zip((0, 100), values[:2], strict=True)]
    grad = torch.randn(6)
    statistics = kernels.forward(*values, targets, rows, False)[1]
    expected = kernels.backward(grad, *values, targets, rows, statistics, True, True, 0.0)
    losses, statistics, *_ = kernels.forward(*far, values[2], targets, rows, True)
    assert torch.equal(losses, kernels.forward(*values, targets, rows, True)[0])
    got = kernels.backward(grad, *far, values[2], targets, rows, statistics, True, True, 0.0)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
