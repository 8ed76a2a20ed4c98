"""TERACON under the methods' driver: the numbers of the trainer's steps; what its state is; retention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from dense_check import ragged
from torch import Tensor

from teracon_fast import packing
from teracon_fast.data import Batch, TaskSequence, split_task
from teracon_fast.errors import ConfigError
from teracon_fast.methods import METHODS, Method, ParameterMasks, Place, Sizes, Teracon
from teracon_fast.methods.sequence import Settings, evaluate_method, learn_task
from teracon_fast.train import loop as trainer
from teracon_fast.train.loop import FIRST_RHO, continual_step, draw_users, drawing_rates, make_optimizer, t1_step

SETTINGS = Settings(lr=5e-3, batch_size=32, epochs=4, patience=3)
SIZES = Sizes(30, channels=16, dilations=(1, 2))
LABELS = [30, 6, 4]


def batches(count: int, labels: int, users: int = 12, length: int = 9) -> list[Batch]:
    generator = torch.Generator().manual_seed(labels)
    found = []
    for seed in range(count):
        x = ragged(torch.randint(0, length + 1, (users,), generator=generator).tolist(), length, seed=seed)
        y = torch.randint(0, labels, (users,), generator=generator)
        found.append(Batch(x, y, packing.real_lengths(x)))
    return found


def step(method: Method, optimizer: torch.optim.Optimizer, batch: Batch, place: Place) -> Tensor:
    """As the driver's."""
    optimizer.zero_grad(set_to_none=True)
    loss = method.loss(batch, place, {})
    loss.backward()
    method.after_backward()
    optimizer.step()
    method.after_step()
    return loss.detach()


def begun(kind: type[Teracon], tasks: int, **settings: Any) -> Teracon:
    method, generator = kind(SIZES, **settings), torch.Generator().manual_seed(1)
    for task in range(tasks):
        method.start(task, LABELS[task], generator)
    return method


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Teracon, {}),
        (Teracon, {"mask": "none", "sampling": "all", "alpha": 0.3}),
        (Teracon, {"mask": "positive_only", "sampling": "minimum", "student_mask": "current", "c": 3.0, "s_max": 20.0}),
        (ParameterMasks, {}),
    ],
)
def test_the_same_bits_as_the_trainers_steps(kind: type[Teracon], settings: dict[str, Any]) -> None:
    method = begun(kind, 1, **settings)
    s_max, alpha = settings.get("s_max", 50.0), settings.get("alpha", 0.7)
    model = copy.deepcopy(method.model)
    teacher = None
    for task in range(3):
        if task:
            method.start(task, LABELS[task], torch.Generator().manual_seed(7 + task))
            teacher = model.frozen()
            model = copy.deepcopy(method.model)  # new heads, masks and relation weights; all else is as the trainer left it:
            for name, value in teacher.state_dict().items():
                assert ".mlp" in name or torch.equal(model.state_dict()[name], value)
        draws = torch.Generator()
        draws.set_state(method.draws.get_state())
        rho = [FIRST_RHO] * task
        optimizer = make_optimizer(method, 1e-2, method.begin_phase("train"))
        other = make_optimizer(model, 1e-2)
        for at, batch in enumerate(batches(4, LABELS[task])):
            place = Place(at, 4.0)
            loss = step(method, optimizer, batch, place)
            if teacher is None:
                result = t1_step(model, other, batch.x, place.scale(s_max), lengths=batch.lengths)
                assert loss == result.class_loss
                continue
            rates = drawing_rates(rho, method.sampling)
            users = draw_users(len(batch.x), rates, draws)
            result = continual_step(
                model, teacher, other, batch.x, batch.y, users, rates, place.scale(s_max), alpha, method.student_mask,
                method.c, lengths=batch.lengths,
            )  # fmt: skip
            assert result.retention_loss is not None and result.next_rho is not None
            assert loss.item() == pytest.approx((result.class_loss + alpha * result.retention_loss).item(), rel=1e-6)
            rho = result.next_rho.tolist()
            assert method.rho == rho
        expected = model.state_dict()
        for name, value in method.model.state_dict().items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("kind", [Teracon, ParameterMasks])
def test_retention_moves_earlier_heads_and_never_the_teacher(kind: type[Teracon]) -> None:
    for alpha, moves in ((0.0, False), (0.7, True)):
        method = begun(kind, 3, alpha=alpha)
        teacher = method.teacher
        assert teacher is not None and teacher.num_tasks == 2 and not any(p.requires_grad for p in teacher.parameters())
        before = copy.deepcopy(teacher.state_dict())
        heads = [method.head(task).weight.detach().clone() for task in range(2)]
        optimizer = make_optimizer(method, 1e-2, method.begin_phase("train"))
        for at, batch in enumerate(batches(3, 4)):
            step(method, optimizer, batch, Place(at, 3.0))
        assert [not torch.equal(method.head(task).weight, head) for task, head in enumerate(heads)] == [moves, moves]
        assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("kind", [Teracon, ParameterMasks])
def test_retention_keeps_earlier_answers(kind: type[Teracon]) -> None:
    """Mean change of the earlier tasks' logits, which training a new task brings about, is smaller with it than without."""
    changes = {}
    for alpha in (0.0, 50.0):
        method = begun(kind, 2, alpha=alpha, sampling="all")
        given = batches(1, 6, users=40)[0]

        def answers(method: Teracon = method, x: Tensor = given.x) -> Tensor:
            return method.head(0)(method.encode(x, 0, 1)).detach()

        teacher = method.teacher
        assert teacher is not None
        with torch.no_grad():
            wanted = teacher.head(0)(teacher.encoder(50.0)(given.x, 0, 1))
        optimizer = make_optimizer(method, 5e-3, method.begin_phase("train"))
        for _ in range(40):
            step(method, optimizer, given, Place(1, 1.0))  # s near s_max, as in inference
        changes[alpha] = (answers() - wanted).square().mean().item()
    assert changes[50.0] < 0.3 * changes[0.0]


@pytest.mark.parametrize("kind", [Teracon, ParameterMasks])
def test_three_tasks_in_the_driver_and_back_from_the_state(kind: type[Teracon], tiny: TaskSequence, sizes: Sizes) -> None:
    splits = [split_task(data) for data in tiny.tasks]
    method = METHODS[kind.name](sizes)
    for task in range(3):
        epochs = learn_task(method, tiny, splits, task, SETTINGS)
        assert min(epoch.loss for epoch in epochs[1:]) < epochs[0].loss
    assert method.labels == [data.num_labels for data in tiny.tasks]
    state = method.state_dict()
    assert not any(name.startswith(("heads.", "_frozen")) for name in state)
    again = METHODS[kind.name](sizes)
    again.restore(method.labels, state)
    for task, data in enumerate(tiny.tasks):
        found, expected = (evaluate_method(m, data, task, splits[task].test) for m in (again, method))
        assert found == expected
    x = torch.from_numpy(tiny.tasks[0].sequences[:70].astype("int64"))
    assert isinstance(method, Teracon)
    for task in range(3):
        torch.testing.assert_close(method.encode(x, task), method.model.encoder(50.0)(x, task), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(method.encode(x[:5], task), method.encode(x, task)[:5], rtol=1e-4, atol=1e-5)


def test_the_teacher_goes_where_the_method_goes() -> None:
    method = begun(Teracon, 2).double()
    assert method.teacher is not None
    assert method.teacher.embeding.weight.dtype == torch.float64
    loss = method.loss(batches(1, 6)[0], Place(0, 1.0), {})
    assert loss.dtype == torch.float64


def test_gradients_stay_whole_for_any_optimiser(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors, which only `optim.Adam` reads, are asked for only after `make_optimizer`, which makes one."""
    asked: list[bool] = []
    real = trainer.loss_of_states

    def spy(*arguments: Any) -> Any:
        asked.append(arguments[9])
        return real(*arguments)

    monkeypatch.setattr("teracon_fast.methods.teracon.loss_of_states", spy)
    method, batch = begun(Teracon, 2), batches(1, 6)[0]
    groups = method.begin_phase("train")
    method.loss(batch, Place(0, 1.0), {})
    make_optimizer(method, 1e-2, groups)
    method.loss(batch, Place(0, 1.0), {})
    assert asked == [False, method.model.sparse_embedding_grad]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"c": 0.0}, "c is 0.0"),
        ({"s_max": -1.0}, "s_max -1.0"),
        ({"mask": "other"}, "mask variant is 'other'"),
    ],
)
def test_settings_without_meaning_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Teracon(SIZES, **settings)


def test_no_task_has_a_head_before_it_begins() -> None:
    method = Teracon(SIZES)
    assert method.labels == []
    with pytest.raises(ConfigError, match="got task 0"):
        method.head(0)
