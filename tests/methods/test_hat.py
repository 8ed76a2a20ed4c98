"""HAT: what it protects, how strictly, and its gradients in the dense form."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from learn import total
from some_batches import shaken, some_batch

from teracon_fast.errors import ConfigError
from teracon_fast.methods import HAT, Sizes, StepContext
from teracon_fast.reference import dense_loss, dense_states
from teracon_fast.train.loop import train_step

SIZES = Sizes(20, channels=8, dilations=(1, 2))
CONTEXT = StepContext(2, 4.0)


def begun(tasks: int, dtype: torch.dtype = torch.float64, **settings: object) -> HAT:
    """A method with the last of so many tasks in training, none of its parameters at its initial value."""
    method = HAT(SIZES, **settings).to(dtype)  # type: ignore[arg-type]
    for task in range(tasks):
        method.start(task, 20 if task == 0 else 6, torch.Generator().manual_seed(task))
    shaken(method)
    return method


def test_masks_are_drawn_from_a_normal_distribution() -> None:
    method = HAT(Sizes(20, channels=64, dilations=(1, 4) * 4))
    method.start(0, 20)
    assert method.embeddings[0].shape == (16, 64)
    assert abs(float(method.embeddings[0].detach().mean())) < 0.15 and abs(float(method.embeddings[0].detach().std()) - 1) < 0.1
    assert torch.equal(method.masks(0, 3.0), torch.sigmoid(3.0 * method.embeddings[0]))


@pytest.mark.parametrize("protection", ["strict", "as_published"])
@pytest.mark.parametrize("task", [0, 2])
def test_a_step_is_that_of_the_dense_form(protection: str, task: int) -> None:
    """Every formula once more, written out: loss, regularization, compensation, protection, clamp."""
    method = begun(task + 1, protection=protection)
    with torch.no_grad():
        # Masks between 0 and 1 at s_max too, so that shares are not all 0 or 1.
        for past in range(task):
            method.embeddings[past].mul_(0.05)
        method.embeddings[task][0, 0] = 5.99  # near the clamp
    plain = copy.deepcopy(method)
    batch = some_batch(20, 6)
    optimizer = torch.optim.SGD(method.begin_phase("train"), lr=0.1)
    loss = total(train_step(method, optimizer, batch, CONTEXT))

    s = (50 - 1 / 50) * 2 / 4 + 1 / 50
    plain.begin_phase("train")
    e = plain.embeddings[task]
    past = [torch.sigmoid(50 * plain.embeddings[i].detach()) for i in range(task)]
    used = torch.stack(past).amax(0) if past else torch.zeros_like(e)
    mask = torch.sigmoid(s * e)
    expected = dense_loss(task, plain.backbone, plain.head(task), batch, mask)
    expected = expected + 0.75 * (mask * (1 - used)).sum() / (1 - used).sum()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-12)
    expected.backward()
    with torch.no_grad():
        e.grad *= 50 / s * (torch.cosh((s * e).clamp(-50, 50)) + 1) / (torch.cosh(e) + 1)
        for site in range(4 if task else 0):
            conv, norm = plain.backbone.site(site)
            for o in range(8):
                for parameter in (conv.bias, norm.weight, norm.bias):
                    parameter.grad[o] *= 1 - used[site, o]
                for i in range(8):
                    read = used[site - 1, i] if site in (1, 3) else 1.0
                    conv.weight.grad[o, i] *= 1 - min(used[site, o], read)
        for parameter in plain.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad  # scaling plain SGD's update is scaling its gradient
        e.clamp_(-6, 6)
    moved = 0
    for (name, got), (_, wanted) in zip(method.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10, msg=name)
        moved += wanted.grad is not None
    assert moved == 16 + 3 + (task == 0)


def trained(protection: str, steps: int = 5, used: float | None = None) -> tuple[HAT, HAT]:
    """A method before and after some steps of Adam in its second task; `used`: A everywhere."""
    method = begun(2, torch.float32, protection=protection)
    if used is not None:
        with torch.no_grad():
            method.embeddings[0].fill_(math.log(used / (1 - used)) / 50)
    before = copy.deepcopy(method)
    optimizer = torch.optim.Adam(method.begin_phase("train"), lr=1e-2)
    for step in range(steps):
        train_step(method, optimizer, some_batch(20, 6, seed=step), StepContext(step, 5.0))
    return before, method


@pytest.mark.parametrize("protection", ["strict", "as_published"])
def test_no_weight_changes_where_earlier_masks_are_one(protection: str) -> None:
    before, after = trained(protection)
    used = after.used()
    assert (used == 1).any() and (used < 0.5).any()
    for site in range(4):
        (old_conv, old_norm), (conv, norm) = before.backbone.site(site), after.backbone.site(site)
        out = used[site] == 1
        read = used[site - 1] if site % 2 else torch.ones(8)
        least = torch.minimum(used[site][:, None], read)
        same = (conv.weight == old_conv.weight).all(-1).squeeze(-1)
        assert same[least == 1].all() and not same[least < 0.5].any()
        for now, was in ((conv.bias, old_conv.bias), (norm.weight, old_norm.weight), (norm.bias, old_norm.bias)):
            assert torch.equal(now[out], was[out]) and (now != was)[~out].any()


def test_only_strict_protection_holds_against_the_size_that_adam_gives_every_update() -> None:
    """A = 0.99 everywhere: an update of a hundredth, or nearly a whole one."""
    share = {}
    for protection in ("strict", "as_published"):
        before, after = trained(protection, steps=1, used=0.99)
        moved = (after.backbone.site(0)[0].weight - before.backbone.site(0)[0].weight).abs()
        share[protection] = float(moved.detach().median()) / 1e-2
    assert share["strict"] == pytest.approx(0.01, rel=0.05)
    assert share["as_published"] > 0.9


def test_items_heads_and_masks_of_earlier_tasks_stay() -> None:
    before, after = trained("strict")
    for name in ("backbone.embeding.weight", "heads.0.weight", "heads.0.bias", "embeddings.0"):
        assert torch.equal(before.get_parameter(name), after.get_parameter(name)), name
    for name in ("heads.1.weight", "heads.1.bias", "embeddings.1"):
        assert not torch.equal(before.get_parameter(name), after.get_parameter(name)), name


def test_items_move_on_request() -> None:
    method = begun(2, train_items=True)
    before = method.backbone.embeding.weight.detach().clone()
    optimizer = torch.optim.Adam(method.begin_phase("train"), lr=1e-2)
    train_step(method, optimizer, some_batch(20, 6), CONTEXT)
    assert not torch.equal(method.backbone.embeding.weight, before)


def test_regularization_of_a_network_that_is_all_used_is_zero() -> None:
    method = begun(2)
    with torch.no_grad():
        method.embeddings[0].fill_(6.0)  # sigmoid(300) is 1
    method.begin_phase("train")
    batch = some_batch(20, 6)
    plain = dense_loss(1, method.backbone, method.head(1), batch, method.masks(1, CONTEXT.scale(50.0)))
    torch.testing.assert_close(method.loss(batch, CONTEXT), plain, rtol=1e-10, atol=1e-12)


def test_embeddings_are_clamped() -> None:
    method = begun(1)
    with torch.no_grad():
        method.embeddings[0][0, :2] = torch.tensor([7.0, -7.0])
    optimizer = torch.optim.SGD(method.begin_phase("train"), lr=1e-6)
    train_step(method, optimizer, some_batch(20, 6), CONTEXT)
    assert method.embeddings[0][0, :2].tolist() == [6.0, -6.0]


def test_inference_is_under_the_largest_scale() -> None:
    """Also in the middle of an epoch, at a smaller one."""
    method = begun(2)
    optimizer = torch.optim.SGD(method.begin_phase("train"), lr=0.1)
    train_step(method, optimizer, some_batch(20, 6), CONTEXT)
    x = some_batch(20, 6).x
    for task in (0, 1):
        for drop in (0, 1):
            exact = dense_states(method.backbone, x, torch.sigmoid(50 * method.embeddings[task]))[:, -1 - drop]
            torch.testing.assert_close(method.encode(x, task, drop), exact.detach(), rtol=1e-10, atol=1e-10)


def test_an_unknown_protection_is_refused() -> None:
    with pytest.raises(ConfigError, match="'weak'.*strict"):
        HAT(SIZES, protection="weak")  # type: ignore[arg-type]
