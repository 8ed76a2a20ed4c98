"""Masks on weights: the network against a dense one with multiplied weights, and how many parameters a task costs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dense_check import assert_close, gradients, ragged
from torch import Tensor

from teracon_fast import FastTCN, packing
from teracon_fast.data import Batch
from teracon_fast.methods import ParameterMasks, Sizes, StepContext
from teracon_fast.methods.parameter_masks import WeightMaskedTCN
from teracon_fast.model.fast_tcn import Request
from teracon_fast.reference import dense_states
from teracon_fast.reference.masks import plain_masks, relation_mask

LENGTHS = [0, 2, 9, 5, 9, 1]


def moved(network: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def dense_weights(model: FastTCN, task: int, s: float) -> list[Tensor]:
    """Masked weights of all convolutions, by the reference's formula for one site at a time."""
    weights = []
    for number in range(model.num_sites):
        block, row = model.blocks[number // 2], number % 2
        embeddings = torch.stack([embedding[row] for embedding in block.task_embeddings])
        if model.num_tasks == 1:
            mask = plain_masks(embeddings[task], s)
        else:
            linear = block.relation_weights(task)[row]
            mask = relation_mask(embeddings, linear.weight[0], linear.bias[0], task, s, model.mask_variant)
        weight = model.site(number)[0].weight
        weights.append(weight * mask.reshape(weight.shape))
    return weights


def dense_last(model: FastTCN, x: Tensor, task: int, s: float, drop_last: int = 0) -> Tensor:
    return dense_states(model, x, weights=dense_weights(model, task, s))[:, -1 - drop_last]


def begun(tasks: int) -> ParameterMasks:
    method = ParameterMasks(Sizes(30, channels=6, dilations=(1, 2))).double()
    generator = torch.Generator().manual_seed(3)
    for task in range(tasks):
        method.start(task, 30 if task == 0 else 3 + task, generator)
        moved(method.model, task)
    method.begin_phase("train")
    return method


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_loss_and_gradients_are_those_of_the_dense_form(tasks: int) -> None:
    method, context, task = begun(tasks), StepContext(1, 30.0), tasks - 1
    s, model, teacher = context.scale(50.0), method.model, method.teacher
    x = ragged(LENGTHS, 9)
    batch = Batch(x, torch.tensor([0, 1, 2, 0, 1, 2]), packing.real_lengths(x))
    state = method.draws.get_state()
    loss = method.loss(batch, context)
    loss.backward()
    got = gradients(method)
    method.zero_grad()
    if teacher is None:
        hidden = dense_states(model, x[:, :-1], weights=dense_weights(model, 0, s)).flatten(0, 1)
        expected = F.cross_entropy(model.head(0)(hidden), x[:, 1:].flatten())
    else:
        expected = F.cross_entropy(model.head(task)(dense_last(model, x, task, s)), batch.y)
        draws = torch.Generator()
        draws.set_state(state)
        for past in range(task):
            users = torch.randperm(len(x), generator=draws)[: int(0.9 * len(x))]
            drop = int(past == 0)
            student = model.head(past)(dense_last(model, x[users], past, s, drop))
            wanted = teacher.head(past)(dense_last(teacher, x[users], past, s, drop)).detach()
            expected = expected + 0.7 / task * (student - wanted).square().mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-11)
    assert_close(got, gradients(method), 1e-9)


def test_rho_compares_masks_of_weights() -> None:
    """Eq. 15 over vectors of all weights of a convolution."""
    method, s = begun(2), StepContext(1, 30.0).scale(50.0)
    model, teacher = method.model, method.teacher
    assert teacher is not None
    x = ragged(LENGTHS, 9)
    method.loss(Batch(x, torch.zeros(6, dtype=torch.int64), packing.real_lengths(x)), StepContext(1, 30.0))

    def divided(network: FastTCN, task: int) -> list[Tensor]:
        weights = [network.site(number)[0].weight for number in range(network.num_sites)]
        return [(m / w).flatten() for m, w in zip(dense_weights(network, task, s), weights, strict=True)]

    cosines = [
        torch.cosine_similarity(a, b, dim=0) for a, b in zip(divided(teacher, 0), divided(model, 1), strict=True)
    ]
    expected = 1 - torch.sigmoid(6.0 * torch.stack(cosines)).mean()
    assert method.rho == pytest.approx([expected.item()], rel=1e-9)


def test_a_task_has_one_mask_a_weight() -> None:
    model = begun(3).model
    weights = sum(model.site(number)[0].weight.numel() for number in range(model.num_sites))
    for task in range(3):
        assert sum(block.task_embeddings[task].numel() for block in model.blocks) == weights
    masks = model.masks(4.0)
    assert masks.shape == (4, 3, 6 * 6 * 3)
    assert masks.numel() == 3 * weights


def test_masks_of_ones_are_no_masks_and_outputs_are_not_masked() -> None:
    method, x = begun(1), ragged(LENGTHS, 9)
    with torch.no_grad():
        for block in method.model.blocks:
            for embedding in block.task_embeddings:
                embedding.fill_(6.0)
    expected = dense_states(method.model, x)[:, -1].detach()
    torch.testing.assert_close(method.encode(x, 0), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("known", [True, False])
def test_requests_of_some_users_and_the_published_call(known: bool) -> None:
    model, x = begun(3).model, ragged(LENGTHS, 9)
    users = torch.tensor([4, 0, 2])
    lengths = packing.real_lengths(x) if known else None
    found = model.encode(x, [Request(2), Request(0, users, 1), Request(1, users)], 3.0, lengths=lengths)
    expected = [dense_last(model, x, 2, 3.0), dense_last(model, x[users], 0, 3.0, 1), dense_last(model, x[users], 1, 3.0)]
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    every = dense_states(model, x, weights=dense_weights(model, 1, 3.0))
    for onecall, states in ((True, every[:, -1]), (False, every.flatten(0, 1))):
        logits, masks = model(x, 3.0, None, 1, onecall=onecall)
        torch.testing.assert_close(logits, model.head(1)(states), rtol=1e-10, atol=1e-12)
        assert len(masks) == 4


def test_a_model_with_one_more_task_keeps_the_old_ones() -> None:
    model = begun(2).model
    more = model.extended(7, torch.Generator().manual_seed(0))
    assert isinstance(more, WeightMaskedTCN) and more.labels == [30, 4, 7]
    assert more.masks(2.0).shape == (4, 3, 108)
    for mine, its in zip(more.blocks, model.blocks, strict=True):
        for task in range(2):
            assert torch.equal(mine.task_embeddings[task], its.task_embeddings[task])
