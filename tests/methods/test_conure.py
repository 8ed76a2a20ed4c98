"""CONURE: what each phase trains, what is pruned, and equality with its eager dense form."""

from __future__ import annotations

import copy

import pytest
import torch
from parameters import changed, gradients, snapshot
from some_batches import some_batch

from teracon_fast.data import Batch
from teracon_fast.errors import ConfigError
from teracon_fast.methods import Conure, Sizes, StepContext
from teracon_fast.methods.conure import FREE, Block, largest
from teracon_fast.methods.preactivation import PreActivationBackbone
from teracon_fast.reference import dense_loss, dense_states
from teracon_fast.train.loop import train_step

SIZES = Sizes(23, channels=6, dilations=(1, 2))
CONTEXT = StepContext(0, 1.0)
LABELS = (23, 5, 7, 4)
BLOCKS: tuple[Block, ...] = ("post-norm", "pre-activation")


def learn(method: Conure, task: int, steps: int = 2) -> None:
    """Start a task and take some steps in each phase."""
    method.start(task, LABELS[task], torch.Generator().manual_seed(task))
    for number, phase in enumerate(method.phases()):
        run_phase(method, phase, steps, seed=10 * task + number)


def run_phase(method: Conure, phase: str, steps: int = 2, seed: int = 0) -> None:
    optimizer = torch.optim.Adam(method.begin_phase(phase), lr=1e-2)
    for step in range(steps):
        train_step(method, optimizer, a_batch(method.task, seed + step), CONTEXT)
    method.end_phase(phase)


def a_batch(task: int, seed: int = 0) -> Batch:
    return some_batch(SIZES.num_items, LABELS[task], users=14, length=12, seed=seed)


def learned(tasks: int, dtype: torch.dtype = torch.float64, **settings: object) -> Conure:
    torch.manual_seed(0)
    method = Conure(SIZES, **settings).to(dtype)  # type: ignore[arg-type]
    for task in range(tasks):
        learn(method, task)
    return method


# Equality with the eager dense form


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("task", [0, 1, 2])
@pytest.mark.parametrize("phase", ["train", "retrain"])
def test_loss_and_gradients_are_those_of_the_dense_form(block: Block, task: int, phase: str) -> None:
    method = learned(task, pruning=0.5, block=block)
    method.start(task, LABELS[task])
    if phase == "retrain":
        run_phase(method, "train")
    method.begin_phase(phase)
    method.zero_grad()
    batch = a_batch(task)
    loss = method.loss(batch, CONTEXT)
    loss.backward()
    method.after_backward()
    got = gradients(method)

    seen = FREE if phase == "train" else task
    visible = [(owner <= seen).double() for owner in method.owners]
    masked = [weight * mask for weight, mask in zip(method.convolutions, visible, strict=True)]
    expected_loss = dense_loss(
        task, method.backbone, method.head(task), batch, None, masked, block == "pre-activation"
    )
    expected_loss.backward()
    for weight, owner in zip(method.convolutions, method.owners, strict=True):
        assert weight.grad is not None
        weight.grad *= owner == seen  # earlier tasks' weights are frozen
    expected = gradients(method)

    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12)
    trained = {"backbone", "heads"} if (task, phase) == (0, "train") else {"conv", "heads"}
    assert any(float(g.abs().max()) > 0 for name, g in got.items() if "conv" in name)
    assert all(any(word in name for word in trained) for name in got)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("drop_last", [0, 1])
def test_encode_is_the_dense_form_of_weights_kept_so_far(block: Block, drop_last: int) -> None:
    method = learned(3, pruning=0.6, block=block)
    batch = a_batch(0)
    for task in range(3):
        weights = [weight * (owner <= task) for weight, owner in zip(method.convolutions, method.owners, strict=True)]
        seen = batch.x[:, : 12 - drop_last]
        expected = dense_states(method.backbone, seen, None, weights, block == "pre-activation")[:, -1].detach()
        got = method.encode(batch.x, task, drop_last, batch.lengths)
        assert not got.requires_grad
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("block", BLOCKS)
def test_many_users_at_once_are_encoded_alike(block: Block) -> None:
    """From some number of users on another way may be taken, by compiled kernels."""
    method = learned(2, torch.float32, pruning=0.5, block=block)
    batch = some_batch(SIZES.num_items, 5, users=104, length=12)
    exact = copy.deepcopy(method).double().encode(batch.x, 1)
    torch.testing.assert_close(method.encode(batch.x, 1).double(), exact, rtol=1e-4, atol=1e-5)


# Phases


def test_task_0_trains_everything_then_only_what_is_kept_and_the_head() -> None:
    method = learned(0, pruning=0.5, pruned="zero")
    method.start(0, LABELS[0])
    before = snapshot(method)
    run_phase(method, "train")
    assert changed(before, method) == set(before)
    before = snapshot(method)
    run_phase(method, "retrain")
    convolutions = {name for name in before if ".conv" in name and name.endswith("weight")}
    assert changed(before, method) == convolutions | {"heads.0.weight", "heads.0.bias"}
    for name in convolutions:
        pruned = before[name] == 0
        assert pruned.sum() == pruned.numel() // 2
        assert torch.equal(method.state_dict()[name] == 0, pruned)


@pytest.mark.parametrize("task", [1, 2])
def test_a_later_task_trains_free_weights_and_its_head(task: int) -> None:
    method = learned(task, pruning=0.5)
    method.start(task, LABELS[task])
    before, owners = snapshot(method), method.owners.clone()
    run_phase(method, "train")
    run_phase(method, "retrain")
    convolutions = {name for name in before if ".conv" in name and name.endswith("weight")}
    assert changed(before, method) == convolutions | {"owners", f"heads.{task}.weight", f"heads.{task}.bias"}
    names = [f"backbone.residual_blocks.{site // 2}.conv{site % 2 + 1}.weight" for site in range(4)]
    for name, old, new in zip(names, owners, method.owners, strict=True):
        kept = old < task
        assert kept.any() and torch.equal(method.state_dict()[name][kept], before[name][kept])
        assert torch.equal(new[kept], old[kept])


def test_the_largest_free_weights_are_kept() -> None:
    method = learned(1, pruning=0.5)
    method.start(1, LABELS[1])
    method.begin_phase("train")
    weights = [weight.detach().clone() for weight in method.convolutions]
    with torch.no_grad():
        for weight in method.convolutions:
            weight.add_(torch.randn_like(weight) * (method.owners[0] == FREE))
    weights = [weight.detach().clone() for weight in method.convolutions]
    free = method.owners == FREE
    method.end_phase("train")
    for weight, was_free, owner in zip(weights, free, method.owners, strict=True):
        taken = owner == 1
        assert not (taken & ~was_free).any()
        rest = was_free & ~taken
        assert weight.abs()[taken].min() >= weight.abs()[rest].max()


@pytest.mark.parametrize("pruning", [0.7, (0.7, 0.8, 0.9, 0.8)])
def test_numbers_of_weights_kept_are_exact(pruning: float | tuple[float, ...]) -> None:
    method = learned(4, torch.float32, pruning=pruning)
    free = method.convolutions[0].numel()
    assert free == 6 * 6 * 3
    for task in range(4):
        kept = free - round(method.ratio(task) * free)
        assert kept > 0
        for owner in method.owners:
            assert int((owner == task).sum()) == kept
        free -= kept


def test_equal_magnitudes_are_kept_by_position() -> None:
    weight = torch.tensor([2.0, -1.0, 1.0, 3.0, -1.0, 1.0, 1.0])
    free = torch.tensor([True, True, True, False, True, True, True])
    assert largest(weight, free, 0.5).tolist() == [True, True, True, False, False, False, False]
    assert largest(weight.flip(0), free.flip(0), 0.5).tolist() == [True, True, False, False, False, False, True]
    same = torch.ones(4, 25)
    assert torch.equal(largest(same, same > 0, 0.7).flatten(), torch.arange(100) < 30)


@pytest.mark.parametrize(
    ("free", "ratio", "kept"),
    [(0, 0.7, 0), (1, 0.7, 0), (1, 0.4, 1), (10, 0.9, 1), (10, 0.999, 0), (10, 0.0, 10), (100, 0.29, 71), (3, 0.5, 1)],
)
def test_number_that_remains(free: int, ratio: float, kept: int) -> None:
    allowed = torch.arange(100) < free
    found = largest(torch.randn(100), allowed, ratio)
    assert int(found.sum()) == kept and not (found & ~allowed).any()


def test_pruned_weights_take_no_part_until_a_task_trains_them() -> None:
    method = learned(2, pruning=0.5)
    x = a_batch(0).x
    before = [method.encode(x, task) for task in range(2)]
    with torch.no_grad():
        for weight, owner in zip(method.convolutions, method.owners, strict=True):
            weight[owner == FREE] = 100.0
    for task in range(2):
        assert torch.equal(method.encode(x, task), before[task])
    method.start(2, LABELS[2])
    method.begin_phase("train")
    assert not torch.equal(method.encode(x, 2), before[1]), "free weights take part while they train"


def test_pruned_weights_stay_as_they_were_where_asked_for() -> None:
    found = {}
    for pruned in ("zero", "as-is"):
        method = learned(0, pruning=0.5, pruned=pruned)
        method.start(0, LABELS[0], torch.Generator().manual_seed(0))
        optimizer = torch.optim.Adam(method.begin_phase("train"), lr=1e-2)
        train_step(method, optimizer, a_batch(0), CONTEXT)
        before = [weight.detach().clone() for weight in method.convolutions]
        method.end_phase("train")
        run_phase(method, "retrain")
        found[pruned] = method.encode(a_batch(0).x, 0)
        for weight, old, owner in zip(method.convolutions, before, method.owners, strict=True):
            free = owner == FREE
            assert torch.equal(weight[free], old[free] if pruned == "as-is" else torch.zeros_like(old[free]))
    assert torch.equal(found["zero"], found["as-is"]), "only later tasks differ"


def test_a_task_in_training_is_encoded_by_its_present_weights() -> None:
    """PyTorch's fused Adam does not count up the versions of what it writes to."""
    method = learned(1, torch.float32, pruning=0.5)
    method.start(1, LABELS[1])
    x, found = a_batch(0).x, []
    for phase in method.phases():
        optimizer = torch.optim.Adam(method.begin_phase(phase), lr=1e-2, fused=True)
        for _ in range(2):
            found.append(method.encode(x, 1))
            train_step(method, optimizer, a_batch(1), CONTEXT)
        found.append(method.encode(x, 1))
        method.end_phase(phase)
    assert torch.equal(method.encode(x, 1), found[-1])
    assert not any(torch.equal(one, other) for one, other in zip(found, found[1:], strict=False))


def test_phases_see_free_weights_only_while_they_train() -> None:
    method = learned(0, pruning=0.5)
    method.start(0, LABELS[0])
    x = a_batch(0).x
    method.begin_phase("train")
    before = method.encode(x, 0)
    method.end_phase("train")
    after = method.encode(x, 0)
    assert not torch.equal(before, after)
    method.begin_phase("retrain")
    assert torch.equal(method.encode(x, 0), after)


# Edges


def test_after_a_task_that_kept_everything_only_heads_train() -> None:
    method = learned(1, pruning=(0.0, 0.5))
    assert (method.owners == 0).all()
    method.start(1, LABELS[1])
    assert method.phases() == ("train", "retrain")
    before = snapshot(method)
    for phase in method.phases():
        run_phase(method, phase)
    assert changed(before, method) == {"heads.1.weight", "heads.1.bias"}
    assert torch.equal(method.encode(a_batch(0).x, 0), method.encode(a_batch(0).x, 1))


def test_a_task_may_keep_nothing() -> None:
    method = learned(2, pruning=(0.999, 0.5))
    assert not (method.owners == 0).any() and (method.owners == 1).any()
    assert method.encode(a_batch(0).x, 0).isfinite().all()


@pytest.mark.parametrize("pruning", [1.0, -0.1, (0.5, 1.0), (), float("nan")])
def test_ratios_out_of_range_are_refused(pruning: object) -> None:
    with pytest.raises(ConfigError, match="pruning is"):
        Conure(SIZES, pruning=pruning)  # type: ignore[arg-type]


def test_other_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="block is 'pre'"):
        Conure(SIZES, block="pre")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="pruned is 'x'"):
        Conure(SIZES, pruned="x")  # type: ignore[arg-type]
    method = learned(1, pruning=(0.5,))
    with pytest.raises(ConfigError, match="task 1 is one too many"):
        method.start(1, 5)
    assert method.task == 0 and len(method.heads) == 1
    with pytest.raises(ConfigError, match=r"expected one of \['train', 'retrain'\]"):
        method.begin_phase("prune")


def test_a_pre_activation_backbone_has_no_masks() -> None:
    backbone = PreActivationBackbone(9, 4, (1,), 3)
    with pytest.raises(ConfigError, match="got masks"):
        backbone.represent(torch.zeros(2, 5, dtype=torch.int64), backbone.no_masks())
    with pytest.raises(ConfigError, match="got convolve"):
        backbone.represent(torch.zeros(2, 5, dtype=torch.int64), convolve=backbone.convolve)


def test_ratios_of_the_paper_are_the_default() -> None:
    assert [Conure(SIZES).ratio(task) for task in range(6)] == [0.7, 0.8, 0.9, 0.8, 0.9, 0.9]
