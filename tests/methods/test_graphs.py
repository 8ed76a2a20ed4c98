"""Replayed steps against the same steps run one operation after the other: on a GPU as CUDA graphs, else by Triton's
interpreter and a recorder that calls the recorded function again, which reads and writes the same memory as a graph would."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from steps import Step, continual_step, t1_step
from torch import Tensor
from triton_here import require_triton

require_triton()

from teracon_fast import FastTCN  # noqa: E402
from teracon_fast.errors import ConfigError  # noqa: E402
from teracon_fast.methods import teracon_graphs  # noqa: E402
from teracon_fast.methods.teracon_graphs import StepGraphs  # noqa: E402
from teracon_fast.packing import buckets  # noqa: E402
from teracon_fast.train import loop  # noqa: E402
from teracon_fast.train.loop import make_optimizer  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ITEMS, LABELS, LENGTH = 25, [25, 6, 4], 6


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time for every row."""
    monkeypatch.setattr(buckets, "_SERIES", [0, 64, 2**30])
    monkeypatch.setattr(teracon_graphs, "USERS", 8)


def called_again(function: Callable[[], None]) -> Callable[[], None]:
    function()  # as recording a graph does
    return function


RECORD = None if DEVICE.type == "cuda" else called_again


def network(tasks: int) -> FastTCN:
    torch.manual_seed(tasks)
    model = FastTCN(num_items=ITEMS, channels=8, labels=LABELS[:tasks], dilations=(1,), backend="triton")
    return model.to(DEVICE)


def batch(users: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(1, ITEMS, (users, LENGTH), generator=generator)
    pads = torch.randint(0, LENGTH + 1, (users,), generator=generator)
    x = x.masked_fill(torch.arange(LENGTH) < pads[:, None], 0)
    return x, torch.randint(0, LABELS[2], (users,), generator=generator)


def numbers(step: Step) -> list[float]:
    hits = [] if step.hit is None else [step.hit]
    return [float(value) for value in (*step.result.losses.values(), *hits)] + step.next_rho


def same_weights(model: FastTCN, other: FastTCN) -> None:
    for (name, value), wanted in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("student_mask", "steps"), [("past", 2), ("current", 1)])
def test_steps_of_a_later_task(student_mask: str, steps: int) -> None:
    """Batches of other lengths and other numbers of users are served by one recording; the losses of each step stay its own."""
    plain, replayed, teacher = network(3), network(3), network(2).frozen()
    step_graphs = StepGraphs(replayed, teacher, 0.7, student_mask == "current", record=RECORD)
    optimizers = [make_optimizer(model, 1e-2) for model in (plain, replayed)]
    found: list[tuple[Step, Step]] = []
    for step, (users, rates) in enumerate([([2, 1], [0.3, 0.1]), ([1, 2], [0.5, 0.6])][:steps]):
        x, y = batch(4, step)
        drawn = [torch.randperm(4)[:count] for count in users]
        rest = (x, y, drawn, rates, 3.0 + step, 0.7, student_mask, 4.0, "fp32", None, True)
        found.append((
            continual_step(plain, teacher, optimizers[0], *rest),  # type: ignore[arg-type]
            continual_step(replayed, teacher, optimizers[1], *rest, step_graphs),  # type: ignore[arg-type]
        ))  # fmt: skip
        same_weights(replayed, plain)
    for one, other in found:
        assert numbers(other) == pytest.approx(numbers(one), rel=1e-4, abs=1e-6)
    assert step_graphs.recordings == 1


def test_steps_of_task_1_with_rows_left_behind_by_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Items that a batch lacks are left behind by Adam, and brought up to date for the next batch that has them."""
    monkeypatch.setattr(loop, "LAZY_FROM", 1)
    plain, replayed = network(1), network(1)
    step_graphs = StepGraphs(replayed, record=RECORD)
    optimizers = [make_optimizer(model, 1e-2) for model in (plain, replayed)]
    assert all(optimizer.lazy for optimizer in optimizers)
    for step in range(3):
        x, _ = batch(2, step)
        one, other = (
            t1_step(model, optimizer, x, 2.0, predictions=step == 1, graphs=used)
            for model, optimizer, used in zip((plain, replayed), optimizers, (None, step_graphs), strict=True)
        )
        assert numbers(other) == pytest.approx(numbers(one), rel=1e-4)
        same_weights(replayed, plain)
    assert step_graphs.recordings == 2, "with and without predictions"


def test_sparse_gradients_of_a_recording_and_rows_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding's gradient lies where the recording writes it, with repeats; the optimizer adds them up outside."""
    rows = importlib.import_module("teracon_fast.ops.embedding_rows.api")  # `ops` has a function of this name
    monkeypatch.setattr(rows, "_leaves_sums", lambda grad: True)  # as on a GPU
    monkeypatch.setattr(loop, "LAZY_FROM", 1)
    plain, replayed = network(1), network(1)
    step_graphs = StepGraphs(replayed, record=RECORD)
    optimizers = [make_optimizer(model, 1e-2) for model in (plain, replayed)]
    for step in range(3):
        x, _ = batch(1, step)
        for model, optimizer, used in zip((plain, replayed), optimizers, (None, step_graphs), strict=True):
            t1_step(model, optimizer, x, 2.0, graphs=used)
            gradient = model.embeding.stored.grad
            assert optimizer.lazy and gradient is not None and gradient.is_sparse and not gradient.is_coalesced()
    behind = replayed.embeding.stored.detach().clone()
    same_weights(replayed, plain)
    assert not torch.equal(behind, replayed.embeding.weight), "no row was behind, so nothing was tested"


def test_batches_of_another_size_are_recorded_too_and_the_oldest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[int] = []
    model, optimizer = network(1), None
    step_graphs = StepGraphs(model, most=2, record=RECORD)
    monkeypatch.setattr(step_graphs, "_new", lambda inputs, predictions, new=step_graphs._new: (
        recorded.append(len(inputs.x)), new(inputs, predictions))[1])  # fmt: skip
    optimizer = make_optimizer(model, 1e-2)
    for users in (1, 2, 1, 3, 2):
        t1_step(model, optimizer, batch(users, 0)[0], 2.0, graphs=step_graphs)
    assert recorded == [1, 2, 3, 2] and len(step_graphs._recorded) == 2


def test_parameters_without_a_part_in_the_loss_have_no_gradient() -> None:
    model, teacher = network(3), network(2).frozen()
    x, y = batch(4, 0)
    step_graphs = StepGraphs(model, teacher, 0.0, record=RECORD)
    found = continual_step(
        model, teacher, make_optimizer(model, 1e-2), x, y, [torch.tensor([0])] * 2, [0.2, 0.2], 2.0, 0.0, graphs=step_graphs
    )
    assert float(found.retention_loss) > 0
    assert model.head(0).weight.grad is None and model.head(2).weight.grad is not None


def test_only_models_whose_steps_can_be_recorded_are_taken() -> None:
    with pytest.raises(ConfigError, match="expected 'triton' on cuda"):
        StepGraphs(FastTCN(num_items=9, channels=4, dilations=(1,), backend="torch"), record=called_again)
    if DEVICE.type == "cpu":
        with pytest.raises(ConfigError, match="backend 'triton' on cpu"):
            StepGraphs(network(1))


def test_padded_users_are_rows_that_exist() -> None:
    model = network(2)
    streams = [teracon_graphs.Streams(torch.arange(3).numpy())]
    packed = model.pack(LENGTH, batch(3, 0)[0].ne(0).sum(1).numpy(), streams, padded=True)
    (rows,) = teracon_graphs._with_padded_users(packed, 0).outputs
    assert len(rows) == 8 and torch.equal(rows[:3], packed.outputs[0]) and not rows[3:].any()
    assert teracon_graphs._with_padded_users(packed, 1).outputs == packed.outputs
