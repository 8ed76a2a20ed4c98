"""What tests of Adam and of rows that it leaves behind share: gradients, a small model, comparisons by the bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from teracon_fast import FastTCN
from teracon_fast.ops import native

COMPILED = pytest.mark.skipif(not native.available(), reason="this installation has no compiled extension")
MOMENTS = ("exp_avg", "exp_avg_sq")


def by_rows(gradient: Tensor, present: Tensor) -> Tensor:
    """A gradient as `.grad` holds it: rows ascending, without the mark that they are."""
    rows = present.nonzero().T
    return torch.sparse_coo_tensor(rows, gradient[present], gradient.shape, check_invariants=True)


def random_gradients(shape: tuple[int, ...], steps: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Gradients of very different sizes and the rows that have one; the first fifth of the rows never does."""
    for step in range(steps):
        present = torch.rand(shape[0]) < (0.0 if step == 3 else 0.4)
        present[: shape[0] // 5] = False
        scale = 10.0 ** torch.randint(-6, 3, (shape[0], *[1] * (len(shape) - 1)))
        gradient = torch.randn(shape, dtype=dtype) * scale.to(dtype)
        gradient[~present] = 0
        yield gradient, present


def assert_same(got: Tensor, expected: Tensor) -> None:
    """The same bits."""
    assert got.dtype == expected.dtype and torch.equal(got.detach(), expected.detach())


def assert_same_state(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine["param_groups"] == other["param_groups"] and mine["state"].keys() == other["state"].keys()
    for index, state in other["state"].items():
        assert list(mine["state"][index]) == list(state)
        step = mine["state"][index]["step"]
        assert step.dtype == state["step"].dtype and torch.equal(step, state["step"])
        for name in MOMENTS:
            assert mine["state"][index][name].stride() == state[name].stride()
            assert_same(mine["state"][index][name], state[name])


def small_model() -> FastTCN:
    return FastTCN(num_items=30, channels=8, dilations=[1, 2])
