"""Gradients that are left as factors: the same step of Adam as with the gradient itself, and never twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from steps import continual_step
from torch import Tensor, nn

from teracon_fast import FastTCN, ops
from teracon_fast.ops import low_rank, native
from teracon_fast.ops.heads import Head
from teracon_fast.ops.retention_mse import cpu as _cpu_retention_mse
from teracon_fast.optim.adam import Adam
from teracon_fast.train.loop import make_optimizer

COMPILED = pytest.mark.skipif(not native.available(), reason="this installation has no compiled extension")


@pytest.fixture
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small weights leave factors too, and many small parts make up a step."""
    monkeypatch.setattr(_cpu_retention_mse, "_LOW_RANK_FROM", 0)
    monkeypatch.setattr(low_rank, "_ROWS", 8)


def head(labels: int = 37, channels: int = 12, users: int = 5) -> tuple[nn.Parameter, nn.Parameter, list[Tensor]]:
    weight, bias = nn.Parameter(torch.randn(labels, channels)), nn.Parameter(torch.randn(labels))
    return weight, bias, [torch.randn(users, channels), torch.randn(labels, channels), torch.randn(labels)]


@COMPILED
@pytest.mark.usefixtures("of_any_size")
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"maximize": True}, {"fused": False}, {"amsgrad": True}])
def test_steps_are_those_with_the_gradient_itself(options: dict[str, Any]) -> None:
    weight, bias, teacher = head()
    other = [nn.Parameter(value.detach().clone()) for value in (weight, bias)]
    ours, torchs = Adam([weight, bias], lr=0.1, **options), torch.optim.Adam(other, lr=0.1, **({"fused": True} | options))
    for _ in range(4):
        hidden = torch.randn(5, 12)
        for parameters, optimizer in (([weight, bias], ours), (other, torchs)):
            optimizer.zero_grad()
            loss = ops.retention_mse(hidden, *parameters, *teacher, scale=3.0, low_rank_gradients=optimizer is ours)
            (2 * loss).backward()
            optimizer.step()
        if not options:
            assert weight.grad is None and len(low_rank.parts_of(weight)) == 1, "the gradient was never formed"
    torch.testing.assert_close(weight, other[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bias, other[1], rtol=1e-4, atol=1e-5)
    state, expected = ours.state_dict()["state"][0], torchs.state_dict()["state"][0]
    assert state["step"] == expected["step"] == 4 and state.keys() == expected.keys()


@COMPILED
@pytest.mark.usefixtures("of_any_size")
def test_parts_add_up_beside_other_gradients_and_are_forgotten() -> None:
    weight, bias, teacher = head()
    hidden = torch.randn(5, 12, requires_grad=True)
    exact = torch.autograd.grad(ops.retention_mse(hidden, weight, bias, *teacher), (hidden, weight, bias))
    loss = ops.retention_mse(hidden, weight, bias, *teacher, low_rank_gradients=True)
    loss.backward(retain_graph=True)
    torch.testing.assert_close(hidden.grad, exact[0])
    torch.testing.assert_close(bias.grad, exact[2])
    (0.5 * loss).backward()
    assert weight.grad is None and len(low_rank.parts_of(weight)) == 2
    torch.testing.assert_close(low_rank.dense(low_rank.parts_of(weight)), 1.5 * exact[1], rtol=1e-4, atol=1e-7)

    optimizer = Adam([weight], lr=0.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()  # with another gradient beside them they become one
    torch.testing.assert_close(weight.grad, 1 + 1.5 * exact[1], rtol=1e-4, atol=1e-6)
    assert not low_rank.parts_of(weight)
    ops.retention_mse(hidden, weight, bias, *teacher, low_rank_gradients=True).backward()
    assert low_rank.parts_of(weight)
    optimizer.zero_grad()
    assert not low_rank.parts_of(weight) and weight.grad is None


@COMPILED
def test_only_where_it_measures_faster() -> None:
    weight, bias, teacher = head()
    ops.retention_mse(torch.randn(5, 12), weight, bias, *teacher, low_rank_gradients=True).backward()
    assert weight.grad is not None and not low_rank.parts_of(weight), "a small weight"
    large = torch.empty(40_000, 256)
    faster = _cpu_retention_mse.low_rank_is_faster
    assert faster("auto", Head(torch.empty(26, 256), large, torch.empty(0)))
    assert not faster("auto", Head(torch.empty(129, 256), large, torch.empty(0)))
    assert not faster("gram", Head(torch.empty(26, 256), large, torch.empty(0)))
    assert not faster("auto", Head(torch.empty(26, 256).bfloat16(), large.bfloat16(), torch.empty(0)))


@COMPILED
@pytest.mark.usefixtures("of_any_size")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_step_is_the_same(precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FastTCN(num_items=30, labels=[30, 7], channels=12, dilations=(1, 2))
    teacher = FastTCN(num_items=30, labels=[30], channels=12, dilations=(1, 2)).frozen()
    x, y, start = torch.randint(0, 30, (16, 10)), torch.randint(0, 7, (16,)), model.state_dict()
    ends = []
    for smallest in (0, 1 << 40):
        monkeypatch.setattr(_cpu_retention_mse, "_LOW_RANK_FROM", smallest)
        own = FastTCN(num_items=30, labels=[30, 7], channels=12, dilations=(1, 2))
        own.load_state_dict(start)
        optimizer = make_optimizer(own, 1e-2)
        for _ in range(3):
            continual_step(own, teacher, optimizer, x, y, [torch.arange(4)], [0.5], 2.0, 0.7, precision=precision)
        assert bool(low_rank.parts_of(own.head(0).weight)) == (smallest == 0)
        ends.append(own.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=2e-3, atol=2e-4 if precision == "fp32" else 2e-2)
