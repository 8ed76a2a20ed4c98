"""PeterRec: patches beside a frozen network, against the dense form; what is frozen."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from dense_check import assert_close, gradients, ragged
from torch import Tensor

from teracon_fast import packing
from teracon_fast.data import Batch
from teracon_fast.errors import ConfigError
from teracon_fast.methods import PeterRec, Sizes, StepContext
from teracon_fast.methods.peterrec import Patches
from teracon_fast.reference import dense_states, patch_addend

LENGTHS = [0, 2, 9, 5, 9, 1]


def begun(tasks: int, sizes: Sizes | None = None, **settings: float) -> PeterRec:
    """A method of so many tasks in float64 whose last has begun, all parameters moved off their initial values."""
    sizes = Sizes(30, channels=8, dilations=(1, 2)) if sizes is None else sizes
    method = PeterRec(sizes, **settings).double()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    for task in range(tasks):
        method.start(task, sizes.num_items if task == 0 else 3 + task, generator)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    method.begin_phase("train")
    return method


def batch(labels: int) -> Batch:
    x = ragged(LENGTHS, 9)
    y = torch.randint(0, labels, (len(x),), generator=torch.Generator().manual_seed(5))
    return Batch(x, y, packing.real_lengths(x))


def dense_hidden(method: PeterRec, x: Tensor, task: int) -> Tensor:
    """Eagerly: every patch added to its convolution's output."""
    if task == 0:
        return dense_states(method.backbone, x)
    down, up = zip(*((patch.down, patch.up) for patch in method.patches[task - 1].patches), strict=True)  # type: ignore[union-attr]
    return dense_states(method.backbone, x, addend=patch_addend(down, up, method.slope))


@pytest.mark.parametrize("kernel_size", [2, 3])
@pytest.mark.parametrize("task", [0, 1, 2])
def test_loss_and_gradients_are_those_of_the_dense_form(task: int, kernel_size: int) -> None:
    method = begun(task + 1, Sizes(30, channels=8, dilations=(1, 2), kernel_size=kernel_size), slope=0.2)
    given = batch(3 + task)
    loss = method.loss(given, StepContext(0, 1.0))
    loss.backward()
    got = gradients(method)
    method.zero_grad()
    head = method.head(task)
    if task == 0:
        hidden, targets = dense_hidden(method, given.x[:, :-1], 0).flatten(0, 1), given.x[:, 1:].flatten()
    else:
        hidden, targets = dense_hidden(method, given.x, task)[:, -1], given.y
    expected = F.cross_entropy(hidden @ head.weight.T + head.bias, targets)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert_close(got, gradients(method), 1e-10)
    trained = {f"patches.{task - 1}." if task else "backbone.", f"heads.{task}."}
    assert {name[: len(prefix)] for name in got for prefix in trained if name.startswith(prefix)} == trained
    assert all(name.startswith(tuple(trained)) for name in got)


def test_float32_kernels_give_the_gradients_of_float64() -> None:
    exact = begun(2, Sizes(30, channels=24, dilations=(1, 2)))
    single = copy.deepcopy(exact).float()
    given = batch(4)
    found = {}
    for method in (exact, single):
        method.loss(given, StepContext(0, 1.0)).backward()
        found[method] = {name: gradient.double() for name, gradient in gradients(method).items()}
    assert_close(found[single], found[exact], 1e-4)


@pytest.mark.parametrize("drop_last", [0, 1])
@pytest.mark.parametrize("task", [0, 1, 2])
def test_encode_gives_the_dense_states_of_any_task_so_far(task: int, drop_last: int) -> None:
    method, x = begun(3), ragged(LENGTHS, 9)
    expected = dense_hidden(method, x, task)[:, -1 - drop_last]
    torch.testing.assert_close(method.encode(x, task, drop_last), expected.detach(), rtol=1e-10, atol=1e-12)


def test_a_new_task_starts_as_the_frozen_network_and_moves_from_there() -> None:
    method, x = begun(1), ragged(LENGTHS, 9)
    method.start(1, 4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(method.encode(x, 1), method.encode(x, 0), rtol=1e-12, atol=1e-12)
    optimizer = torch.optim.Adam(method.begin_phase("train"), lr=1e-2)
    names = dict(method.named_parameters())
    start = {name: value.detach().clone() for name, value in names.items()}
    for _ in range(2):  # the first step moves `up`, which is zeros, and so the second `down`
        optimizer.zero_grad()
        method.loss(batch(4), StepContext(0, 1.0)).backward()
        optimizer.step()
    moved = {name for name, value in names.items() if not torch.equal(value, start[name])}
    assert moved == {name for name in names if name.startswith(("patches.0.", "heads.1."))}
    assert (method.encode(x, 1) - method.encode(x, 0)).abs().max() > 1e-3


def test_number_of_patch_parameters() -> None:
    for patches in begun(3).patches:
        assert sum(parameter.numel() for parameter in patches.parameters()) == 4 * (8 * 2 + 2 + 2 * 8 + 8)
    paper = Patches(sites=16, channels=256, bottleneck=64, slope=0.01)
    assert sum(parameter.numel() for parameter in paper.parameters()) == 529_408


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reduction": 0}, "reduction is 0, expected 1 to 8"),
        ({"reduction": 9}, "reduction is 9"),
        ({"slope": 1.0}, "slope is 1.0"),
    ],
)
def test_settings_that_make_no_patch_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PeterRec(Sizes(30, channels=8), **settings)  # type: ignore[arg-type]
