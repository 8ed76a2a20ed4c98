"""TERACON: what retention keeps, which users it draws, and what its options may be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from some_batches import some_batch
from torch import Tensor

from teracon_fast.data import Batch
from teracon_fast.errors import ConfigError
from teracon_fast.methods import ParameterMasks, Sizes, StepContext, Teracon, teracon
from teracon_fast.methods.teracon import draw_users, drawing_rates
from teracon_fast.train.loop import make_optimizer, train_step

SIZES = Sizes(30, channels=16, dilations=(1, 2))
LABELS = [30, 6, 4]


def batches(count: int, labels: int, users: int = 12) -> list[Batch]:
    return [some_batch(30, labels, users, 9, seed) for seed in range(count)]


def begun(kind: type[Teracon], tasks: int, **settings: Any) -> Teracon:
    method, generator = kind(SIZES, **settings), torch.Generator().manual_seed(1)
    for task in range(tasks):
        method.start(task, LABELS[task], generator)
    return method


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
            train_step(method, optimizer, batch, StepContext(at, 3.0))
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
            train_step(method, optimizer, given, StepContext(1, 1.0))  # s near s_max, as in inference
        changes[alpha] = (answers() - wanted).square().mean().item()
    assert changes[50.0] < 0.3 * changes[0.0]


def test_the_teacher_goes_where_the_method_goes() -> None:
    method = begun(Teracon, 2).double()
    assert method.teacher is not None
    assert method.teacher.embeding.weight.dtype == torch.float64
    loss = method.loss(batches(1, 6)[0], StepContext(0, 1.0))
    assert loss.dtype == torch.float64


def test_gradients_stay_whole_for_any_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors, which only `optim.Adam` reads, are asked for only after `make_optimizer`, which makes one."""
    asked: list[bool] = []
    real = teracon.loss_of_states

    def spy(*arguments: Any) -> Any:
        asked.append(arguments[9])
        return real(*arguments)

    monkeypatch.setattr(teracon, "loss_of_states", spy)
    method, batch = begun(Teracon, 2), batches(1, 6)[0]
    groups = method.begin_phase("train")
    method.loss(batch, StepContext(0, 1.0))
    make_optimizer(method, 1e-2, groups)
    method.loss(batch, StepContext(0, 1.0))
    assert asked == [False, method.model.sparse_embedding_grad]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"c": 0.0}, "c is 0.0"),
        ({"s_max": -1.0}, "s_max is -1.0"),
        ({"mask": "other"}, "mask is 'other'"),
        ({"sampling": "none"}, "sampling is 'none'"),
        ({"student_mask": "new"}, "student_mask is 'new'"),
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


def test_drawn_users_are_different_rows_in_the_wanted_number() -> None:
    generator = torch.Generator().manual_seed(3)
    users = draw_users(1024, [0.9, 0.0025, 0.0001, 1.0], generator)
    assert [len(rows) for rows in users] == [921, 2, 1, 1024]
    for rows in users:
        assert rows.dtype == torch.int64 and len(rows.unique()) == len(rows)
        assert 0 <= rows.min() and rows.max() < 1024
    assert not torch.equal(users[0], users[3][:921]), "tasks draw independently"


def test_every_user_is_drawn_equally_often() -> None:
    generator = torch.Generator().manual_seed(5)
    counts = torch.zeros(10)
    for _ in range(2000):
        counts[draw_users(10, [0.3], generator)[0]] += 1
    assert counts.sum() == 6000
    # Standard deviation of each count is sqrt(2000 * 0.3 * 0.7) = 20.5.
    assert (counts - 600).abs().max() < 5 * 20.5


def test_drawing_rates_of_the_sampling_variants() -> None:
    assert drawing_rates([0.4, 0.1, 0.2], "adaptive") == [0.4, 0.1, 0.2]
    assert drawing_rates([0.4, 0.1, 0.2], "minimum") == [0.1, 0.1, 0.1]
    assert drawing_rates([0.4, 0.1, 0.2], "all") == [1.0, 1.0, 1.0]
