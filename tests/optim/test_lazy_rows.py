"""Embedding rows that Adam leaves behind: nobody sees one, and they end with the bits of PyTorch's Adam."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from adam_checks import COMPILED, assert_same, assert_same_state, by_rows, small_model
from steps import t1_step
from torch import Tensor, nn

from teracon_fast import FastTCN, Request, ops
from teracon_fast.optim import lazy_rows
from teracon_fast.optim.adam import Adam
from teracon_fast.optim.lazy_rows import LazyRows
from teracon_fast.train import loop
from teracon_fast.train.loop import make_optimizer


def lazy_adam(model: FastTCN, monkeypatch: pytest.MonkeyPatch) -> Adam:
    """The optimizer of a model whose embedding counts as large."""
    monkeypatch.setattr(loop, "LAZY_FROM", 1)
    optimizer = make_optimizer(model, 1e-2)
    assert optimizer.lazy
    return optimizer


def batches(steps: int) -> list[Tensor]:
    """Few of the 30 items in each, so that rows are left behind."""
    return [torch.randint(1, 30, (2, 5)) for _ in range(steps)]


def trained(monkeypatch: pytest.MonkeyPatch) -> tuple[FastTCN, Adam, FastTCN]:
    """A model with rows that are behind, its optimizer, and the model that it must be."""
    model, data = small_model(), batches(12)
    plain = copy.deepcopy(model)
    optimizer, dense = lazy_adam(model, monkeypatch), make_optimizer(plain, 1e-2)
    dense.lazy = False
    for x in data:
        t1_step(model, optimizer, x, 3.0)
        t1_step(plain, dense, x, 3.0)
    assert not torch.equal(model.embeding.stored, plain.embeding.weight), "no row is behind, so nothing is tested"
    return model, optimizer, plain


READERS: dict[str, Callable[[FastTCN], Tensor]] = {
    "weight": lambda model: model.embeding.weight,
    "module": lambda model: model.embeding(torch.arange(30)),
    "rows": lambda model: model.embeding.rows(torch.arange(30)),
    "parameters": lambda model: next(p for p in model.parameters() if p.shape == (30, 8) and p is model.embeding.stored),
    "named_parameters of what holds it": lambda model: dict(nn.ModuleList([model]).named_parameters())["0.embeding.weight"],
    "state_dict": lambda model: model.state_dict()["embeding.weight"],
    "state_dict of what holds it": lambda model: nn.ModuleList([model]).state_dict()["0.embeding.weight"],
    "deepcopy": lambda model: copy.deepcopy(model).embeding.stored,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)).embeding.stored,
    "frozen": lambda model: model.frozen().embeding.stored,
    "extended": lambda model: model.extended(4).embeding.stored,
    "double": lambda model: model.double().embeding.stored.float(),
    "gradients turned dense": lambda model: setattr(model, "sparse_embedding_grad", False) or model.embeding.stored,
}


@COMPILED
@pytest.mark.parametrize("reader", READERS)
def test_no_reader_of_a_model_sees_a_row_that_is_behind(reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, expected = trained(monkeypatch)
    assert torch.equal(READERS[reader](model), expected.embeding.weight)


@COMPILED
@pytest.mark.parametrize("users", [3, 80])
def test_encoding_brings_up_to_date_what_it_reads(users: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, expected = trained(monkeypatch)
    x = torch.randint(0, 9, (users, 7))
    with torch.no_grad():
        assert torch.equal(model.encode(x, [Request(0)])[0], expected.encode(x, [Request(0)])[0])
    assert torch.equal(model.encoder()(x + 3, 0), expected.encoder()(x + 3, 0))
    assert not torch.equal(model.embeding.stored, expected.embeding.weight), "only the rows that are read"


@COMPILED
def test_a_training_step_takes_no_row_that_it_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, expected = trained(monkeypatch)
    took = []
    monkeypatch.setattr(LazyRows, "catch_up", lambda self, parameter, items=None: took.append(items))
    t1_step(model, optimizer, torch.full((2, 5), 3), 3.0)
    assert took and all(items is not None and bool((items == 3).all()) for items in took)


@COMPILED
def test_training_that_was_interrupted_goes_on_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, _ = trained(monkeypatch)
    saved = pickle.dumps((model.state_dict(), optimizer.state_dict()))
    again, rest = small_model(), batches(6)
    other = lazy_adam(again, monkeypatch)
    state, moments = pickle.loads(saved)
    again.load_state_dict(state)
    other.load_state_dict(moments)
    for x in rest:
        t1_step(model, optimizer, x, 3.0)
        t1_step(again, other, x, 3.0)
    assert_same_state(optimizer, other)
    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert_same(mine, theirs)


@COMPILED
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.3, 0.9), (0.9, 0.0), (0.99, 0.5)])
def test_updates_that_come_back_to_life(betas: tuple[float, float]) -> None:
    """A learning rate too small to change anything, then a large one, then none, and constants that change."""
    mine, other = nn.Parameter(torch.randn(20, 40)), nn.Parameter(torch.zeros(20, 40))
    other.data.copy_(mine.data)
    ours = Adam([mine], betas=betas, fused=True, lazy=True)
    theirs = torch.optim.Adam([other], betas=betas, fused=True)
    for step in range(60):
        for group in (ours.param_groups[0], theirs.param_groups[0]):
            group["lr"] = 1e-9 if step < 20 else 1.0 if step % 20 == 5 else 0.0 if step < 30 else 1e-3
            if step == 45:
                group["betas"], group["eps"] = (0.8, 0.95), 1e-6
        present = torch.rand(20) < 0.05
        gradient = torch.randn(20, 40) * present[:, None]
        mine.grad, other.grad = by_rows(gradient, present), gradient
        ours.step()
        theirs.step()
    assert_same_state(ours, theirs)
    assert_same(mine, other)


@COMPILED
def test_more_steps_than_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_rows, "_MOST_STEPS", 7)
    mine, other = nn.Parameter(torch.randn(20, 40)), nn.Parameter(torch.zeros(20, 40))
    other.data.copy_(mine.data)
    ours, theirs = Adam([mine], fused=True, lazy=True), torch.optim.Adam([other], fused=True)
    for _ in range(40):
        present = torch.rand(20) < 0.1
        gradient = torch.randn(20, 40) * present[:, None]
        mine.grad, other.grad = by_rows(gradient, present), gradient
        ours.step()
        theirs.step()
    assert_same_state(ours, theirs)
    assert_same(mine, other)


@COMPILED
def test_a_copied_optimizer_and_a_lost_one() -> None:
    weight = nn.Parameter(torch.ones(4, 3))
    optimizer = Adam([weight], lr=0.1, lazy=True)
    for row in (0, 1, 2):
        weight.grad = by_rows(torch.ones(4, 3), torch.arange(4) == row)
        optimizer.step()
    copied = pickle.loads(pickle.dumps(optimizer))
    assert copied.lazy and torch.equal(copied.param_groups[0]["params"][0], weight)
    weight.grad = by_rows(torch.ones(4, 3), torch.arange(4) == 3)
    optimizer.step()
    before = weight.detach().clone()
    del optimizer
    ops.embedding_rows(weight, torch.tensor([0, 0, 3]))
    assert not torch.equal(weight[0], before[0]) and torch.equal(weight[1:], before[1:])
    ops.embedding_rows(weight, torch.arange(4))
    assert not torch.equal(weight[1], before[1]) and not torch.equal(weight[2], before[2])


@COMPILED
@pytest.mark.parametrize("last", [[-2, 0], [2, 0], [0, 2**31 - 1]])
def test_the_kernels_refuse_rows_that_have_taken_steps_that_are_none(last: list[int]) -> None:
    tensors = [torch.ones(2, 4) for _ in range(3)]
    steps, growing = torch.ones(1, 4), torch.zeros(0, dtype=torch.int64)
    counts = torch.tensor(last, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="adam_catch_up: last has a row"):
        torch.ops.teracon_fast.adam_catch_up(*tensors, counts, growing, True, steps, growing, 0.9, 0.99, 1e-8, 1)
    with pytest.raises(RuntimeError, match="adam_deferred: last has a row"):
        rows = torch.tensor([0, 1])
        torch.ops.teracon_fast.adam_deferred(
            *tensors, counts, rows, torch.ones(2, 4), steps, growing, 0.9, 0.99, 1e-8, 0, 1
        )
    with pytest.raises(RuntimeError, match="adam_deferred: expected the numbers of the step"):
        torch.ops.teracon_fast.adam_deferred(
            *tensors, counts, rows, torch.ones(2, 4), steps[:0], growing, 0.9, 0.99, 1e-8, 0, 1
        )
    for at in (-1, 1):
        with pytest.raises(RuntimeError, match="adam_step: expected steps"):
            torch.ops.teracon_fast.adam_step(steps, at, 1.0, 1.0)
    assert all(torch.equal(t, torch.ones(2, 4)) for t in (*tensors, steps[[0, 0]]))


@COMPILED
def test_products_that_stand_for_a_division_are_proven() -> None:
    """All significands of dividends by the roots of some steps, and those roots for which products fail found out."""
    mantissas = torch.arange(1 << 23, 1 << 24).float()
    steps = torch.empty(400, 4)
    for t in range(400):
        torch.ops.teracon_fast.adam_step(steps, t, 1.0, (1 - 0.999 ** (t + 1)) ** 0.5)
    proven = ~steps[:, 3].isnan()
    assert 300 < int(proven.sum())
    for t in (*proven.nonzero()[::60, 0].tolist(), *(~proven).nonzero()[:4, 0].tolist()):
        root, high = steps[t, 1], steps[t, 2]
        low = (1 / root.double() - high.double()).float()
        # A fused multiply-add: products of floats are exact in float64, and its sum is rounded to odd before it becomes a float.
        product, addend = mantissas.double() * high.double(), (mantissas * low).double()
        total = product + addend
        error = addend - (total - product)
        bits = total.view(torch.int64)
        total = torch.where((error != 0) & (bits & 1 == 0), bits + torch.where(error > 0, 1, -1), bits).view(torch.float64)
        assert bool((total.float() == mantissas / root).all()) == bool(proven[t])
