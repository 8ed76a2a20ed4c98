"""Piggyback: what trains, the straight-through gradient, bits, and equality with the dense form."""

from __future__ import annotations

import pytest
import torch
from parameters import changed, gradients, snapshot
from some_batches import some_batch
from torch import Tensor

from teracon_fast.data import Batch
from teracon_fast.errors import ConfigError
from teracon_fast.methods import Piggyback, Sizes, StepContext
from teracon_fast.methods.piggyback import pack_bits, unpack_bits
from teracon_fast.reference import dense_loss, dense_states
from teracon_fast.train.loop import train_step

SIZES = Sizes(23, channels=5, dilations=(1, 2))  # 5 * 5 * 3 weights: no whole number of bytes
CONTEXT = StepContext(0, 1.0)
LABELS = (23, 5, 7)


def a_batch(task: int, seed: int = 0) -> Batch:
    return some_batch(SIZES.num_items, LABELS[task], users=14, length=12, seed=seed)


def run(method: Piggyback, steps: int = 3) -> None:
    """The phase of a task that has been started, with r moving far enough for some to cross the threshold."""
    optimizer = torch.optim.Adam(method.begin_phase("train"), lr=1e-2)
    for step in range(steps):
        train_step(method, optimizer, a_batch(method.task, step), CONTEXT)
    method.end_phase("train")


def learned(tasks: int, dtype: torch.dtype = torch.float64, mask_lr: float = 3e-3) -> Piggyback:
    method = Piggyback(SIZES, mask_lr=mask_lr).to(dtype)
    for task in range(tasks):
        method.start(task, LABELS[task], torch.Generator().manual_seed(task))
        run(method)
    return method


def test_loss_and_gradients_of_task_0_are_those_of_the_dense_form() -> None:
    method = learned(0)
    method.start(0, LABELS[0])
    method.begin_phase("train")
    loss = method.loss(a_batch(0), CONTEXT)
    loss.backward()
    got = gradients(method)
    expected_loss = dense_loss(0, method.backbone, method.head(0), a_batch(0))
    expected_loss.backward()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    for name, value in gradients(method).items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("task", [1, 2])
def test_loss_and_gradients_are_those_of_the_dense_form(task: int) -> None:
    """The gradient of r is that of the binary mask, also where the mask is 0."""
    method = learned(task)
    method.start(task, LABELS[task])
    groups = method.begin_phase("train")
    method.zero_grad()
    with torch.no_grad():
        for real in method.reals:
            real.copy_(5e-3 + 5e-3 * torch.randn_like(real))
    loss = method.loss(a_batch(task), CONTEXT)
    loss.backward()
    got = gradients(method)

    masks = [(real > 5e-3).double().requires_grad_() for real in method.reals]
    assert all(0 < int((mask != 0).sum()) < mask.numel() for mask in masks)
    masked = [weight.detach() * mask for weight, mask in zip(method.convolutions, masks, strict=True)]
    expected_loss = dense_loss(task, method.backbone, method.head(task), a_batch(task), None, masked)
    expected_loss.backward()
    expected = gradients(method)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    for site, mask in enumerate(masks):
        assert mask.grad is not None and float(mask.grad[mask == 0].abs().max()) > 0
        expected[f"reals.{site}"] = mask.grad
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12)
    assert len(groups) == 2 and groups[0]["params"] == list(method.reals)


def test_encode_is_the_dense_form_of_each_tasks_mask() -> None:
    method = learned(3)
    x = a_batch(0).x
    for task in range(3):
        masks: list[Tensor] | None = method.masks(task) if task else None
        weights = [w * m for w, m in zip(method.convolutions, masks, strict=True)] if masks else list(method.convolutions)
        for drop_last in (0, 1):
            expected = dense_states(method.backbone, x[:, : 12 - drop_last], None, weights)[:, -1].detach()
            torch.testing.assert_close(method.encode(x, task, drop_last), expected, rtol=1e-10, atol=1e-12)
    assert not torch.equal(method.encode(x, 1), method.encode(x, 2))


@pytest.mark.parametrize("task", [1, 2])
def test_a_later_task_trains_its_mask_and_its_head_alone(task: int) -> None:
    method = learned(task)
    method.start(task, LABELS[task])
    before = snapshot(method)
    run(method)
    assert changed(before, method) == {f"bits{task}", f"heads.{task}.weight", f"heads.{task}.bias"}


def test_real_masks_start_at_their_initial_value_with_a_learning_rate_of_their_own() -> None:
    method = learned(1, mask_lr=1e-4)
    method.start(1, LABELS[1])
    reals, heads = method.begin_phase("train")
    assert Piggyback(SIZES).mask_lr == reals["lr"] == 1e-4 and "lr" not in heads
    assert all(torch.equal(real, torch.full_like(real, 1e-2)) for real in method.reals)
    x = a_batch(0).x
    assert torch.equal(method.encode(x, 1), method.encode(x, 0)), "at first every weight counts"
    optimizer = torch.optim.Adam([reals, heads], lr=1.0)
    train_step(method, optimizer, a_batch(1), CONTEXT)
    assert all(float((real.detach() - 1e-2).abs().max()) == pytest.approx(1e-4, rel=1e-3) for real in method.reals)


def test_masks_are_kept_as_bits() -> None:
    method = learned(1)
    method.start(1, LABELS[1])
    optimizer = torch.optim.Adam(method.begin_phase("train"), lr=1e-2)
    for step in range(3):
        train_step(method, optimizer, a_batch(1, step), CONTEXT)
    expected, state = [real > 5e-3 for real in method.reals], method.encode(a_batch(0).x, 1)
    assert any(not mask.all() for mask in expected)
    method.end_phase("train")
    assert not any(name.startswith("reals") for name in method.state_dict())
    assert all(torch.equal(got, mask) for got, mask in zip(method.masks(1), expected, strict=True))
    assert torch.equal(method.encode(a_batch(0).x, 1), state)
    assert method.bits(1).dtype == torch.uint8
    assert method.bits(1).numel() == 4 * 10  # 75 weights in each of 4 convolutions


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 75])
def test_bits_come_back(count: int) -> None:
    flags = torch.rand(count) < 0.5
    packed = pack_bits(flags)
    assert packed.dtype == torch.uint8 and packed.shape == (-(-count // 8),)
    assert torch.equal(unpack_bits(packed, count), flags)


def test_bits_are_counted_from_the_lowest() -> None:
    assert pack_bits(torch.tensor([True, False, True] + [False] * 5 + [True])).tolist() == [5, 1]


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="mask_lr is 0"):
        Piggyback(SIZES, mask_lr=0)
    with pytest.raises(ConfigError, match="init is nan"):
        Piggyback(SIZES, init=float("nan"))
    with pytest.raises(ConfigError, match="task 0 has no masks"):
        learned(1).masks(0)
