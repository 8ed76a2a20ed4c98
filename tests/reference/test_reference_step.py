"""Drawing users, the training steps, and the choices that the paper studies."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from teracon_fast.errors import ConfigError, ShapeError
from teracon_fast.reference import ReferenceTCN, clamp_task_embeddings, continual_step, draw_users, rho, sample_counts
from teracon_fast.reference.step import continual_loss, frozen_copy, next_item_loss, sampling_ratios, t1_step

LABELS = [9, 4, 3]
PARA = {
    "item_size": 9, "dilated_channels": 6, "dilations": [1, 2], "kernel_size": 3, "task_embs": [-1, 1],
}  # fmt: skip
X = torch.tensor([[0, 0, 3, 1, 7], [1, 2, 2, 4, 8], [0, 5, 1, 1, 6], [0, 0, 0, 0, 2]])
Y = torch.tensor([1, 0, 2, 2])
USERS = [torch.tensor([2, 0]), torch.tensor([1, 2, 3])]
S = 1.5


def network(labels: list[int]) -> ReferenceTCN:
    model = ReferenceTCN({**PARA, "num_task": len(labels), "target_item_size": labels}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@pytest.fixture
def student_and_teacher() -> tuple[ReferenceTCN, ReferenceTCN]:
    return network(LABELS), frozen_copy(network(LABELS[:2]))


def test_counts_follow_rho_and_are_never_zero() -> None:
    assert sample_counts(1024, [0.9, 0.0025, 0.0005]) == [921, 2, 1]
    assert sample_counts(8, [0.0025]) == [1]


def test_sampling_variants() -> None:
    rho = [0.3, 0.1, 0.2]
    assert sampling_ratios(rho, "adaptive") == rho
    assert sampling_ratios(rho, "minimum") == [0.1, 0.1, 0.1]
    assert sampling_ratios(rho, "all") == [1.0, 1.0, 1.0]
    assert sample_counts(50, rho, "minimum") == [5, 5, 5]
    assert sample_counts(50, rho, "all") == [50, 50, 50]
    with pytest.raises(ConfigError, match="'most', expected adaptive, minimum or all"):
        sample_counts(50, rho, "most")


def test_drawn_users_are_different_rows_and_independent_between_tasks() -> None:
    users = draw_users(100, [0.5, 0.5, 0.031])
    assert [len(u) for u in users] == [50, 50, 3]
    for drawn in users:
        assert drawn.dtype == torch.int64 and len(set(drawn.tolist())) == len(drawn)
        assert 0 <= min(drawn.tolist()) and max(drawn.tolist()) < 100
    assert set(users[0].tolist()) != set(users[1].tolist())


def test_drawing_is_uniform_over_the_batch() -> None:
    counts = torch.zeros(10)
    for _ in range(2000):
        counts[draw_users(10, [0.3])[0]] += 1
    # 600 expected for each row with standard deviation 20.5; six of those never happen by chance.
    assert (counts - 600).abs().max() < 123


def test_drawing_depends_only_on_the_generator() -> None:
    first, second = (draw_users(64, [0.4, 0.2], generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_clamp_touches_task_embeddings_alone() -> None:
    model = network(LABELS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.5)
        model.residual_blocks[0].ec[1].weight.fill_(-9.0)
    clamp_task_embeddings(model)
    for name, parameter in model.named_parameters():
        expected = (-6.0 if name == "residual_blocks.0.ec.1.weight" else 6.0) if ".ec." in name else 7.5
        assert torch.equal(parameter, torch.full_like(parameter, expected)), name


def test_t1_step_leaves_task_embeddings_clamped() -> None:
    model = ReferenceTCN(PARA)
    with torch.no_grad():
        model.residual_blocks[1].ec[0].weight.fill_(40.0)
    t1_step(model, torch.optim.Adam(model.parameters(), lr=1e-3), X, S)
    assert (model.residual_blocks[1].ec[0].weight == 6.0).all()


def test_continual_step_leaves_task_embeddings_clamped(
    student_and_teacher: tuple[ReferenceTCN, ReferenceTCN],
) -> None:
    model, teacher = student_and_teacher
    with torch.no_grad():
        model.residual_blocks[1].ec[0].weight.fill_(-40.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    continual_step(model, teacher, optimizer, X, Y, USERS, [0.5, 0.5], S, 0.7)
    assert (model.residual_blocks[1].ec[0].weight == -6.0).all()


def test_t1_step_is_one_adam_update_of_the_next_item_loss() -> None:
    stepped = ReferenceTCN(PARA).double()
    by_hand = copy.deepcopy(stepped)
    loss = t1_step(stepped, torch.optim.Adam(stepped.parameters(), lr=0.01), X, S)
    expected = next_item_loss(by_hand, X, S)
    expected.backward()
    torch.optim.Adam(by_hand.parameters(), lr=0.01).step()
    assert loss == expected.item()
    assert all(torch.equal(a, b) for a, b in zip(stepped.parameters(), by_hand.parameters(), strict=True))


def published_retention(model: ReferenceTCN, teacher: ReferenceTCN, ratios: list[float]) -> Tensor:
    """Through the published call, as the authors' training loop does it."""
    total = torch.zeros((), dtype=torch.float64)
    for j, users in enumerate(USERS):
        x = X[users, :-1] if j == 0 else X[users]
        student = model(x, S, [], j, None, onecall=True, backward=True, new_task=2)[0]
        pseudo = teacher(x, S, [], j, None, onecall=True, new_task=2)[0]
        total = total + ratios[j] / sum(ratios) * F.mse_loss(student, pseudo)
    return total


def test_losses_are_those_of_the_published_calls(student_and_teacher: tuple[ReferenceTCN, ReferenceTCN]) -> None:
    model, teacher = student_and_teacher
    class_loss, retention = continual_loss(model, teacher, X, Y, USERS, [0.4, 0.1], S)
    assert class_loss.item() == F.cross_entropy(model(X, S, [], 2, None, onecall=True)[0], Y).item()
    assert retention.item() == pytest.approx(published_retention(model, teacher, [0.4, 0.1]).item(), rel=1e-13)


def test_teacher_of_one_task_uses_the_plain_mask() -> None:
    """Task 2: the teacher's side is the network of task 1, whichever form holds it."""
    model, single = network(LABELS[:2]), ReferenceTCN(PARA).double()
    several = network(LABELS[:1])
    several.load_state_dict(single.state_dict(), strict=False)
    losses = [
        continual_loss(model, frozen_copy(teacher), X, Y, USERS[:1], [0.9], S)[1].item()
        for teacher in (single, several)
    ]
    pseudo = single(X[USERS[0], :-1], S, [], 0, onecall=True)[0]
    student = model(X[USERS[0], :-1], S, [], 0, onecall=True, backward=True, new_task=1)[0]
    assert losses[0] == losses[1] == pytest.approx(F.mse_loss(student, pseudo).item(), rel=1e-13)


def test_student_mask_current_is_equation_16_as_printed(
    student_and_teacher: tuple[ReferenceTCN, ReferenceTCN],
) -> None:
    """The student sees past tasks through the mask of the current task; teacher and class loss do not change."""
    model, teacher = student_and_teacher
    past = continual_loss(model, teacher, X, Y, USERS, [0.4, 0.1], S, "past")
    current = continual_loss(model, teacher, X, Y, USERS, [0.4, 0.1], S, "current")
    terms = []
    for j, users in enumerate(USERS):
        x = X[users, :-1] if j == 0 else X[users]
        student = model.task_classifier[j](model.hidden(x, model.all_masks(S)[:, 2])[:, -1])
        terms.append(F.mse_loss(student, teacher(x, S, [], j, onecall=True)[0]))
    assert current[0].item() == past[0].item()
    assert current[1].item() == pytest.approx((0.8 * terms[0] + 0.2 * terms[1]).item(), rel=1e-13)
    assert abs(current[1].item() - past[1].item()) > 1e-3 * past[1].item()


def test_retention_of_task_1_does_not_see_the_last_item(
    student_and_teacher: tuple[ReferenceTCN, ReferenceTCN],
) -> None:
    model, teacher = student_and_teacher
    changed = X.clone()
    changed[:, -1] = 1
    for ratios, sees_it in (([1.0, 0.0], False), ([0.0, 1.0], True)):
        before, after = (continual_loss(model, teacher, x, Y, USERS, ratios, S)[1].item() for x in (X, changed))
        assert (before != after) == sees_it


def test_step_moves_the_student_and_not_the_teacher(student_and_teacher: tuple[ReferenceTCN, ReferenceTCN]) -> None:
    model, teacher = student_and_teacher
    before, kept = copy.deepcopy(model), copy.deepcopy(teacher)
    result = continual_step(model, teacher, torch.optim.SGD(model.parameters(), 0.1), X, Y, USERS, [0.4, 0.1], S, 0.7)
    class_loss, retention = continual_loss(before, kept, X, Y, USERS, [0.4, 0.1], S)
    assert (result.class_loss, result.retention_loss) == (class_loss.item(), retention.item())
    (class_loss + 0.7 * retention).backward()
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        assert torch.allclose(new, old - 0.1 * old.grad, rtol=1e-12, atol=1e-15)  # type: ignore[operator]
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), kept.parameters(), strict=True))
    assert all(p.grad is None for p in teacher.parameters())


def test_next_rho_compares_the_masks_of_before_the_update(
    student_and_teacher: tuple[ReferenceTCN, ReferenceTCN],
) -> None:
    model, teacher = student_and_teacher
    expected = [rho(teacher.all_masks(S)[:, j], model.all_masks(S)[:, 2], 4.0) for j in range(2)]
    optimizer = torch.optim.SGD(model.parameters(), 5.0)
    result = continual_step(model, teacher, optimizer, X, Y, USERS, [0.4, 0.1], S, 0.7, c=4.0)
    assert result.next_rho == expected
    assert [rho(teacher.all_masks(S)[:, j], model.all_masks(S)[:, 2], 4.0) for j in range(2)] != expected


def test_equal_ratios_weigh_past_tasks_equally(student_and_teacher: tuple[ReferenceTCN, ReferenceTCN]) -> None:
    """What "minimum" and "all" give: only the drawn users differ between them."""
    model, teacher = student_and_teacher
    minimum, every = (
        continual_loss(model, teacher, X, Y, USERS, sampling_ratios([0.3, 0.1], sampling), S)[1].item()
        for sampling in ("minimum", "all")
    )
    assert minimum == pytest.approx(every, rel=1e-14)
    assert minimum == pytest.approx(published_retention(model, teacher, [1.0, 1.0]).item(), rel=1e-13)


def test_bad_calls_are_named(student_and_teacher: tuple[ReferenceTCN, ReferenceTCN]) -> None:
    model, teacher = student_and_teacher
    with pytest.raises(ConfigError, match="'future', expected past or current"):
        continual_loss(model, teacher, X, Y, USERS, [0.4, 0.1], S, "future")
    with pytest.raises(ShapeError, match="model of 3 tasks, a teacher of 2, 1 user lists and 2 ratios"):
        continual_loss(model, teacher, X, Y, USERS[:1], [0.4, 0.1], S)
    with pytest.raises(ShapeError, match="a teacher of 3"):
        continual_loss(model, model, X, Y, USERS, [0.4, 0.1], S)
