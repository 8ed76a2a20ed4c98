"""SinMo, FineAll and MTL: a network for every task."""

from __future__ import annotations

import copy

import pytest
import torch
from learn import total
from parameters import snapshot
from some_batches import shaken, some_batch

from teracon_fast.data import Batch
from teracon_fast.methods import MTL, FineAll, SinMo, Sizes, StepContext
from teracon_fast.reference import dense_loss, dense_states
from teracon_fast.train.loop import train_step

SIZES = Sizes(20, channels=8, dilations=(1, 2))
LABELS = (20, 6, 3)
KINDS: list[type[SinMo]] = [SinMo, FineAll, MTL]


def begun(kind: type[SinMo], tasks: int, dtype: torch.dtype = torch.float64) -> SinMo:
    """A method with the last of so many tasks in training."""
    method = kind(SIZES).to(dtype)
    for task in range(tasks):
        method.start(task, LABELS[task], torch.Generator().manual_seed(task))
    return method


def context(first: Batch) -> StepContext:
    return StepContext(1, 4.0, companions={0: first})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", [0, 1])
def test_a_step_is_that_of_the_dense_form(kind: type[SinMo], task: int) -> None:
    method = begun(kind, task + 1)
    shaken(method)
    plain = copy.deepcopy(method)
    batch = some_batch(20, LABELS[task])
    first = some_batch(20, 20, users=5, seed=1)
    optimizer = torch.optim.SGD(method.begin_phase("train"), lr=0.1)
    loss = total(train_step(method, optimizer, batch, context(first)))

    plain.begin_phase("train")
    expected = dense_loss(task, plain.backbone(task), plain.head(task), batch)
    if kind is MTL and task:
        expected = expected + dense_loss(0, plain.backbone(task), plain.first_head[0], first)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-12)
    expected.backward()
    reached = 0
    for (name, got), (_, was) in zip(method.named_parameters(), plain.named_parameters(), strict=True):
        change = torch.zeros_like(was) if was.grad is None else was.grad
        torch.testing.assert_close(got, was - 0.1 * change, rtol=1e-9, atol=1e-11, msg=name)
        reached += int(bool(change.any()))
    assert reached == len(list(plain.backbone(task).parameters())) + (4 if kind is MTL and task else 2)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_in_training_stays_bit_by_bit(kind: type[SinMo]) -> None:
    method = begun(kind, 2, torch.float32)
    before = snapshot(method)
    optimizer = torch.optim.Adam(method.begin_phase("train"), lr=1e-2)
    train_step(method, optimizer, some_batch(20, 6), context(some_batch(20, 20)))
    for name, value in method.state_dict().items():
        own = name.startswith(("backbones.1.", "heads.1.", "first_head."))
        assert torch.equal(value, before[name]) != own, name


def test_single_networks_are_not_alike_and_fine_tuned_ones_begin_alike() -> None:
    for kind in KINDS:
        method = begun(kind, 3)
        for name, value in method.backbone(0).named_parameters():
            if "conv" not in name and "embeding" not in name:
                continue
            for later in (1, 2):
                same = torch.equal(value, method.backbone(later).get_parameter(name))
                assert same == (kind is FineAll), (kind, name)


def test_fine_tuning_begins_with_the_weights_of_the_first_task_not_of_the_last() -> None:
    method = begun(FineAll, 1)
    shaken(method)
    method.start(1, 6)
    with torch.no_grad():
        for parameter in method.backbone(1).parameters():
            parameter.add_(1.0)
    method.start(2, 3)
    for name, value in method.backbone(0).named_parameters():
        assert torch.equal(value, method.backbone(2).get_parameter(name)), name
        assert value.data_ptr() != method.backbone(2).get_parameter(name).data_ptr()


def test_multi_task_asks_for_the_first_task_and_sees_both_losses() -> None:
    method = begun(MTL, 1)
    assert method.companions() == ()
    method.start(1, 6)
    assert method.companions() == (0,)
    method.begin_phase("train")
    shaken(method)
    batch, first = some_batch(20, 6), some_batch(20, 20, seed=1)
    both = method.loss(batch, context(first))
    both.backward()
    both = both.detach()
    assert method.first_head[0].weight.grad.any() and method.head(1).weight.grad.any()
    assert method.head(0).weight.grad is None
    own = dense_loss(1, method.backbone(1), method.head(1), batch)
    other = dense_loss(0, method.backbone(1), method.first_head[0], first)
    torch.testing.assert_close(both, (own + other).detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_representations_are_those_of_the_dense_form(kind: type[SinMo]) -> None:
    """Also of so many users that the compiled encoder takes them."""
    method = begun(kind, 2, torch.float32)
    shaken(method)
    for users in (12, 100):
        x = some_batch(20, 6, users).x
        for task in (0, 1):
            exact = dense_states(method.backbone(task).double(), x)
            method.float()
            for drop in (0, 1):
                torch.testing.assert_close(
                    method.encode(x, task, drop).double(), exact[:, -1 - drop].detach(), rtol=1e-4, atol=1e-4
                )
