"""Triton's masks, their gradients and the sampling rates against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from triton_here import require_triton

require_triton()

from teracon_fast.kernels import masks as kernels
from teracon_fast.kernels.configs import Config
from teracon_fast.kernels.masks import Parameters
from teracon_fast.reference import losses
from teracon_fast.reference.masks import num_relation_weights, plain_masks, relation_mask

SITES = 5


def parameters(device: torch.device, tasks: int, channels: int, variant: str, chosen: int | None = None) -> Parameters:
    """`chosen`: number of tasks that there are weights for."""
    embeddings = torch.randn(SITES, tasks, channels, device=device)
    if variant == "none":
        return Parameters(embeddings, None, None, True)
    count = tasks if chosen is None else chosen
    weights = 0.3 * torch.randn(SITES, count, num_relation_weights(tasks, variant), device=device)
    return Parameters(embeddings, weights, 0.1 * torch.randn(SITES, count, device=device), variant == "relation")


def reference(values: Parameters, s: float, tasks: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Masks task by task and site by site, and the leaves that they depend on."""
    leaves = [value.detach().to(dtype).requires_grad_() for value in values[:3] if isinstance(value, Tensor)]
    if values.weights is None:
        return plain_masks(leaves[0][:, list(tasks)], s), leaves
    variant = "relation" if values.negated else "positive_only"
    e, w, b = leaves
    rows = [
        torch.stack([relation_mask(e[k], w[k, p], b[k, p], task, s, variant) for p, task in enumerate(tasks)])
        for k in range(e.shape[0])
    ]
    return torch.stack(rows), leaves


def require_error_of_float32(values: Parameters, s: float, tasks: tuple[int, ...]) -> None:
    """Masks and gradients: at most twice the error of the reference in float32."""
    device = values.embeddings.device
    grad = torch.randn(SITES, len(tasks), values.embeddings.shape[2], device=device)
    results = []
    for dtype in (torch.float64, torch.float32):
        masks, leaves = reference(values, s, tasks, dtype)
        gradients = torch.autograd.grad(masks, leaves, grad.to(dtype), allow_unused=True)
        gradients = [torch.zeros_like(v) if g is None else g for g, v in zip(gradients, leaves, strict=True)]
        results.append([masks.detach(), *gradients])
    mask, teacher, rho = kernels.forward(values, s, tasks)
    assert teacher.shape == (SITES, 0, values.embeddings.shape[2]) and rho.shape == (0,)
    found = [mask, *kernels.backward(grad, values, s, tasks)]
    if values.weights is None:
        assert [tuple(part.shape) for part in found[2:]] == [(0,), (0,)]
        found = found[:2]
    for got, truth, naive in zip(found, *results, strict=True):
        assert got.dtype == torch.float32 and got.shape == truth.shape
        error, allowed = (got.double() - truth).norm(), (naive.double() - truth).norm()
        assert error <= 2 * allowed + 5e-7 * truth.norm() + 1e-9


@pytest.mark.parametrize("variant", ["relation", "positive_only", "none"])
@pytest.mark.parametrize("tasks", [1, 2, 3, 6])
@pytest.mark.parametrize("s", [0.02, 50.0])
def test_error_of_masks_and_gradients_is_that_of_float32(device: torch.device, variant: str, tasks: int, s: float) -> None:
    require_error_of_float32(parameters(device, tasks, 37, variant), s, tuple(range(tasks)))


@pytest.mark.parametrize("variant", ["relation", "none"])
@pytest.mark.parametrize(("tasks", "channels"), [(1, 1), (2, 16), (5, 40)])
def test_several_tiles_of_sites_and_of_channels(
    device: torch.device, variant: str, tasks: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_TILES", Config(rows=2, columns=32, depth=16, warps=8, stages=1))
    require_error_of_float32(parameters(device, tasks, channels, variant), 2.0, tuple(range(tasks)))


@pytest.mark.parametrize("variant", ["relation", "positive_only", "none"])
@pytest.mark.parametrize("tasks", [(2,), (1, 2), (3, 0), (1, 1, 0, 1)])
def test_chosen_tasks(device: torch.device, variant: str, tasks: tuple[int, ...]) -> None:
    """One, some that follow each other, some that do not, and one several times, whose gradients add up."""
    require_error_of_float32(parameters(device, 4, 19, variant, len(tasks)), 1.5, tasks)


@pytest.mark.parametrize("s", [0.02, 50.0])
@pytest.mark.parametrize(
    ("tasks", "variant", "teacher_variant"),
    [(2, "relation", "none"), (3, "relation", "relation"), (6, "relation", "relation"), (4, "positive_only", "positive_only"),
     (3, "none", "none"), (3, "relation", "positive_only")],
)  # fmt: skip
def test_sampling_rates_and_the_teachers_masks(
    device: torch.device, tasks: int, variant: str, teacher_variant: str, s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sites in two tiles, the last of them not full."""
    monkeypatch.setattr(kernels, "_TILES", Config(rows=4, columns=64, depth=16, warps=8, stages=1))
    own, teacher = parameters(device, tasks, 37, variant), parameters(device, tasks - 1, 37, teacher_variant)
    every, past = tuple(range(tasks)), tuple(range(tasks - 1))
    for current in (tasks - 1, 0) if tasks == 3 else (tasks - 1,):
        masks, teacher_masks, rho = kernels.forward(own, s, every, teacher, 6.0, current)
        assert torch.equal(masks, kernels.forward(own, s, every)[0])
        assert torch.equal(teacher_masks, kernels.forward(teacher, s, past)[0])
        exact, its = reference(own, s, every, torch.float64)[0], reference(teacher, s, past, torch.float64)[0]
        assert rho.dtype == torch.float64
        assert rho.tolist() == pytest.approx([losses.rho(its[:, j], exact[:, current], 6.0) for j in past], abs=1e-6)


def test_a_mask_without_length_is_like_no_other(device: torch.device) -> None:
    """Masks that are zero to the last bit: the least length stands in for theirs."""
    own, teacher = (Parameters(torch.full((SITES, 1, 7), value, device=device), None, None, True) for value in (1.0, -9.0))
    teacher.embeddings[0] = 1.0
    *_, rho = kernels.forward(own, 50.0, (0,), teacher, 6.0, 0)
    expected = 1 - (torch.sigmoid(torch.tensor(6.0)).item() + 0.5 * (SITES - 1)) / SITES
    assert rho.item() == pytest.approx(expected, abs=1e-6)


def test_a_scale_in_memory_is_read_there(device: torch.device) -> None:
    """So that a replayed launch takes another one. The bits are those of the number."""
    values, grad = parameters(device, 3, 21, "relation"), torch.randn(SITES, 3, 21, device=device)
    teacher, scale = parameters(device, 2, 21, "relation"), torch.zeros((), device=device)
    for s in (0.3, 7.0):
        scale.fill_(s)
        for dtype in (torch.float32, torch.float64):
            held = scale.to(dtype)
            pairs = [
                *zip(kernels.forward(values, held, (0, 1, 2), teacher, 6.0, 2),
                     kernels.forward(values, s, (0, 1, 2), teacher, 6.0, 2), strict=True),
                *zip(kernels.backward(grad, values, held, (0, 1, 2)), kernels.backward(grad, values, s, (0, 1, 2)), strict=True),
            ]  # fmt: skip
            assert all(torch.equal(one, other) for one, other in pairs)


def test_one_launch_forward_and_one_backward_of_programs_that_share_nothing(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[tuple[str, tuple[int, ...]]] = []
    launch = kernels.launch

    def recorded(kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
        launched.append((kernel.fn.__name__, grid))
        launch(kernel, grid, *arguments, **named)

    monkeypatch.setattr(kernels, "launch", recorded)
    own, teacher = parameters(device, 3, 5, "relation"), parameters(device, 2, 5, "relation")
    runs = []
    for _ in range(2):
        forward = kernels.forward(own, 3.0, (0, 1, 2), teacher, 6.0, 2)
        runs.append([*forward, *kernels.backward(torch.ones_like(forward[0]), own, 3.0, (0, 1, 2))])
    assert launched == 2 * [("task_masks_kernel", (5,)), ("task_masks_backward_kernel", (SITES,))]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_layouts_that_are_not_contiguous_give_the_same_bits(device: torch.device) -> None:
    values, grad = parameters(device, 3, 12, "relation"), torch.randn(SITES, 3, 12, device=device)
    strided = Parameters(*(torch.stack([v, v * torch.nan], -1)[..., 0] for v in values[:3]), True)  # type: ignore[operator]
    wide = torch.randn(1, 1, 1, device=device).expand(SITES, 3, 12)
    assert torch.equal(kernels.forward(values, 3.0, (0, 1, 2))[0], kernels.forward(strided, 3.0, (0, 1, 2))[0])
    for g in (grad, wide):
        pairs = zip(
            kernels.backward(g.contiguous(), values, 3.0, (0, 1, 2)), kernels.backward(g, strided, 3.0, (0, 1, 2)), strict=True
        )
        assert all(torch.equal(one, other) for one, other in pairs)


def test_parameters_in_half_precision_meet_arithmetic_in_float32(device: torch.device) -> None:
    values = parameters(device, 3, 12, "relation")
    low = Parameters(*(part.bfloat16() for part in values[:3]), True)  # type: ignore[union-attr]
    wide = Parameters(*(part.float() for part in low[:3]), True)  # type: ignore[union-attr]
    grad = torch.randn(SITES, 3, 12, device=device)
    pairs = [
        (kernels.forward(low, 3.0, (0, 1, 2))[0], kernels.forward(wide, 3.0, (0, 1, 2))[0]),
        *zip(kernels.backward(grad, low, 3.0, (0, 1, 2)), kernels.backward(grad, wide, 3.0, (0, 1, 2)), strict=True),
    ]
    for got, exact in pairs:
        assert got.dtype == torch.bfloat16 and torch.equal(got, exact.bfloat16())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_a_number_stays_in_its_site_and_channel(device: torch.device) -> None:
    values = parameters(device, 3, 9, "relation")
    values.embeddings[1, 0, 4], values.embeddings[2, 1, 3], values.embeddings[3, 2, 8] = torch.nan, torch.inf, -torch.inf
    masks = kernels.forward(values, 2.0, (0, 1, 2))[0]
    torch.testing.assert_close(masks, reference(values, 2.0, (0, 1, 2), torch.float32)[0].detach(), equal_nan=True)
    assert masks.isnan().nonzero().tolist() == [[1, task, 4] for task in range(3)]
    plain = Parameters(values.embeddings, None, None, True)
    assert kernels.forward(plain, 2.0, (0, 1, 2))[0].isnan().nonzero().tolist() == [[1, 0, 4]]
    d_embeddings, d_weights, _ = kernels.backward(torch.ones_like(masks), values, 2.0, (0, 1, 2))
    assert d_embeddings.isnan().nonzero().tolist() == [[1, task, 4] for task in range(3)]
    assert d_weights.isnan().all(2).all(1).tolist() == [False, True, False, False, False]
    assert kernels.backward(torch.ones_like(masks), plain, 2.0, (0, 1, 2))[0].isnan().nonzero().tolist() == [[1, 0, 4]]
