"""Training steps and the loop of one task: against the golden trajectory, the reference, and scripted surroundings."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from golden_vectors import relative_error
from tiny_data import write_tiny
from torch import Tensor, nn

from teracon_fast import FastTCN, packing
from teracon_fast.config import TaskConfig
from teracon_fast.data import TaskData, epoch_batches, fetch, split_task
from teracon_fast.data import device as data_device
from teracon_fast.reference import ReferenceTCN
from teracon_fast.reference import continual_step as reference_step
from teracon_fast.train import loop as trainer
from teracon_fast.train.loop import (
    FIRST_RHO,
    DivergedError,
    Losses,
    Position,
    StepRecord,
    StepResult,
    TaskTraining,
    continual_step,
    draw_users,
    drawing_rates,
    make_optimizer,
    t1_step,
    train_task,
)


def small_pair(variant: str, dtype: torch.dtype = torch.float64) -> tuple[ReferenceTCN, ReferenceTCN, FastTCN, FastTCN]:
    """A reference model of three tasks with its teacher of two, and FastTCN copies of both."""
    para = {"item_size": 30, "dilated_channels": 12, "dilations": [1, 2], "kernel_size": 3, "task_embs": [0, 2]}
    labels = [30, 7, 4]
    pairs: list[nn.Module] = []
    for tasks in (3, 2):
        published = {**para, "num_task": tasks, "target_item_size": labels[:tasks]}
        reference = ReferenceTCN(published, variant=variant).to(dtype)
        fast = FastTCN(published, mask=variant).to(dtype)
        fast.load_state_dict(reference.state_dict())
        pairs += [reference, fast]
    student, fast_student, teacher, fast_teacher = pairs
    return student, teacher, fast_student, fast_teacher  # type: ignore[return-value]


@pytest.mark.parametrize("student_mask", ["past", "current"])
@pytest.mark.parametrize("variant", ["relation", "positive_only", "none"])
def test_variants_take_the_reference_step(variant: str, student_mask: Any) -> None:
    reference, reference_teacher, model, teacher = small_pair(variant)
    x, y = torch.randint(0, 30, (9, 10)), torch.randint(0, 4, (9,))
    x[:5, :4] = 0
    users, rho = [torch.tensor([3, 1, 8]), torch.tensor([0, 2])], [0.4, 0.1]
    for _ in range(2):
        optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (reference, model)]
        expected = reference_step(
            reference, reference_teacher, optimizers[0], x, y, users, rho, 3.0, 0.8, student_mask=student_mask, c=4.0
        )
        got = continual_step(model, teacher, optimizers[1], x, y, users, rho, 3.0, 0.8, student_mask, 4.0)
        assert got.retention_loss is not None and got.next_rho is not None
        assert got.class_loss.item() == pytest.approx(expected.class_loss, rel=1e-12)
        assert got.retention_loss.item() == pytest.approx(expected.retention_loss, rel=1e-11)
        assert got.next_rho.tolist() == pytest.approx(expected.next_rho, rel=1e-9)
        for name, value in reference.state_dict().items():
            assert relative_error(model.state_dict()[name], value) < 1e-9, name


def test_bf16_steps_stay_near_fp32_and_see_the_new_weights() -> None:
    """Rounding of 2**-9 in every matrix product; master weights, losses and rho are fp32."""
    _, _, model, teacher = small_pair("relation", torch.float32)
    x, y = torch.randint(0, 30, (64, 10)), torch.randint(0, 4, (64,))
    users, start = [torch.arange(20), torch.arange(30)], model.state_dict()
    ends: list[list[float]] = []
    for precision in ("fp32", "bf16"):
        own = FastTCN(**{"num_items": 30, "labels": [30, 7, 4], "channels": 12, "dilations": (1, 2)})
        own.load_state_dict(start)
        optimizer, losses = make_optimizer(own, 1e-2), []
        for _ in range(6):
            step = continual_step(own, teacher, optimizer, x, y, users, [0.5, 0.5], 2.0, 0.7, precision=precision)
            assert step.class_loss.dtype == torch.float32 and step.retention_loss is not None
            losses += [step.class_loss.item(), step.retention_loss.item()]
        losses.append(t1_step(own, optimizer, x, 2.0, precision=precision).class_loss.item())
        assert all(parameter.dtype == torch.float32 for parameter in own.parameters())
        ends.append(losses)
    fp32, bf16 = ends
    assert bf16 != fp32 and bf16 == pytest.approx(fp32, rel=0.05, abs=1e-3)
    assert bf16[10] < bf16[0] - 0.05, "the class loss falls: later steps see the weights that earlier ones changed"


def test_a_step_leaves_the_teacher_and_clamps_the_embeddings() -> None:
    _, _, model, teacher = small_pair("relation")
    teacher = teacher.frozen()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    with torch.no_grad():
        model.residual_blocks[0].ec[2].weight.fill_(9.0)
    x, y = torch.randint(0, 30, (6, 10)), torch.randint(0, 4, (6,))
    continual_step(model, teacher, make_optimizer(model, 0.1), x, y, [torch.arange(2)] * 2, [0.5, 0.5], 2.0, 0.7)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert model.residual_blocks[0].ec[2].weight.abs().max() == 6.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_adam_is_adam(dtype: torch.dtype) -> None:
    """Ten steps on the same gradients: the fused kernel moves the weights like the plain loop over tensors."""
    start = [torch.randn(300, 40, dtype=dtype), torch.randn(17, dtype=dtype)]
    gradients = [[torch.randn_like(w) * 10.0 ** (-step) for w in start] for step in range(10)]
    ends = []
    for fused in (True, False):
        module = nn.ParameterList(w.clone() for w in start)
        optimizer = (
            make_optimizer(module, 1e-2) if fused else torch.optim.Adam(module.parameters(), lr=1e-2, foreach=False)
        )
        assert bool(optimizer.defaults["fused"]) == fused
        for gradient in gradients:
            for parameter, value in zip(module, gradient, strict=True):
                parameter.grad = value.clone()
            optimizer.step()
        ends.append([parameter.detach() for parameter in module])
    for fast, slow in zip(*ends, strict=True):
        assert relative_error(fast, slow) < 10 * torch.finfo(dtype).eps


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


class ScriptedHost:
    """Answers validations from a list and writes down what it is told."""

    def __init__(self, scores: list[float], stop_after: int | None = None) -> None:
        self.scores, self.stop_after = iter(scores), stop_after
        self.events: list[dict[str, Any]] = []
        self.valid: list[dict[str, Any]] = []
        self.best: list[int] = []
        self.checkpoints: list[tuple[int, int]] = []
        self.steps = 0

    def after_step(self, task: TaskTraining, users: int, event: dict[str, Any] | None) -> None:
        self.steps += 1
        if event is not None:
            self.events.append(event)
        if self.steps == self.stop_after:
            raise KeyboardInterrupt

    def validate(self, task: TaskTraining) -> dict[str, float]:
        score = next(self.scores)
        return {"hit@1": score, "mrr@5": 1 - score}

    def keep_best(self, task: TaskTraining, metrics: dict[str, float]) -> None:
        self.best.append(task.position.epoch)

    def log(self, event: str, task: TaskTraining, **fields: Any) -> None:
        assert event == "valid"
        self.valid.append(fields)

    def checkpoint(self, task: TaskTraining) -> None:
        self.checkpoints.append((task.position.epoch, task.position.batch))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[TaskData]:
    return write_tiny(tmp_path_factory.mktemp("data") / "tiny", tasks=2, rows=61, length=6, items=12).tasks


def tiny_training(tiny: list[TaskData], number: int, **config: Any) -> TaskTraining:
    torch.manual_seed(1)
    labels = [data.num_labels for data in tiny[:number]]
    sizes: dict[str, Any] = {"channels": 8, "dilations": (1, 2)}
    model = FastTCN(num_items=labels[0], labels=labels, **sizes)
    teacher = FastTCN(num_items=labels[0], labels=labels[:-1], **sizes).frozen() if number > 1 else None
    data, settings = tiny[number - 1], TaskConfig.model_validate({"batch_size": 16, **config})
    return TaskTraining(
        number, settings, data, split_task(data), 11, model, teacher, make_optimizer(model, settings.lr),
        torch.Generator().manual_seed(2), Position(rho=[FIRST_RHO] * (number - 1)), Losses(number), log_every=1,
    )  # fmt: skip


def test_patience_counts_validations_without_strict_improvement(tiny: list[TaskData]) -> None:
    task = tiny_training(tiny, 1, epochs=50, patience=2)
    host = ScriptedHost([0.2, 0.3, 0.3, 0.4, 0.4, 0.4, 0.9])
    train_task(task, host)
    assert host.best == [0, 1, 3], "an equal score is not better"
    assert [fields["best"] for fields in host.valid] == [True, True, False, True, False, False]
    assert task.position.best_epoch == 3 and task.position.best_score == 0.4 and task.position.epoch == 6
    assert host.checkpoints == [(epoch, 0) for epoch in range(1, 7)]


def test_epochs_are_limited_and_the_score_can_be_mrr(tiny: list[TaskData]) -> None:
    task = tiny_training(tiny, 2, epochs=3, patience=5, select="mrr@5")
    host = ScriptedHost([0.5, 0.6, 0.4])
    train_task(task, host)
    assert host.best == [0, 2] and task.position.best_score == pytest.approx(0.6)
    assert task.position.epoch == 3


def test_first_epoch_is_kept_even_with_score_zero(tiny: list[TaskData]) -> None:
    host = ScriptedHost([0.0, 0.0])
    train_task(tiny_training(tiny, 1, epochs=2), host)
    assert host.best == [0]


def test_loop_feeds_each_epoch_in_order_with_restarted_annealing(tiny: list[TaskData], monkeypatch: Any) -> None:
    task = tiny_training(tiny, 2, epochs=2, alpha=0.25, c=3.0)
    seen: list[tuple[Any, ...]] = []
    real = trainer.continual_step

    def spy(model: Any, teacher: Any, optimizer: Any, x: Tensor, y: Tensor, *rest: Any) -> StepResult:
        seen.append((x, y, *rest))
        return real(model, teacher, optimizer, x, y, *rest)

    monkeypatch.setattr(trainer, "continual_step", spy)
    host = ScriptedHost([0.1, 0.2])
    train_task(task, host)
    train = task.split.train
    per_epoch = -(-len(train) // 16)
    assert len(train) % 16 != 0, "the last batch of this test is a partial one"
    assert len(seen) == 2 * per_epoch == host.steps
    draws, rho = torch.Generator().manual_seed(2), [FIRST_RHO]
    for step, (x, y, users, rates, s, alpha, student_mask, c, precision, lengths, predictions, graphs) in enumerate(seen):
        epoch, batch = divmod(step, per_epoch)
        expected_x, expected_y = fetch(task.data, epoch_batches(train, 16, 11, epoch)[batch])
        assert torch.equal(x, expected_x) and torch.equal(y, expected_y)
        assert np.array_equal(lengths, packing.real_lengths(expected_x))
        assert s == pytest.approx((50 - 1 / 50) * batch / (len(train) / 16) + 1 / 50)
        assert rates == rho and (alpha, student_mask, c, precision) == (0.25, "past", 3.0, "fp32")
        assert torch.equal(users[0], draw_users(len(x), rho, draws)[0])
        event = host.events[step]
        assert (event["epoch"], event["batch"], event["step"], event["scale"]) == (epoch, batch, step, s)
        assert predictions and event["rho"] == rates and graphs is None
        rho = host.events[step + 1]["rho"] if step + 1 < len(seen) else rho
        assert rho != [FIRST_RHO], "rho moves after every step and is not reset by an epoch"
    valid = host.valid[0]
    sizes = [len(part[0]) for part in seen[:per_epoch]]
    losses = [event["class_loss"] for event in host.events[:per_epoch]]
    assert valid["class_loss"] == pytest.approx(sum(n * v for n, v in zip(sizes, losses, strict=True)) / sum(sizes))
    assert valid["step"] == per_epoch - 1


def test_hits_are_counted_in_steps_that_are_logged(tiny: list[TaskData], monkeypatch: Any) -> None:
    asked: list[bool] = []
    real = trainer.t1_step

    def spy(*arguments: Any) -> StepResult:
        asked.append(arguments[-2])
        return real(*arguments)

    monkeypatch.setattr(trainer, "t1_step", spy)
    task, host = tiny_training(tiny, 1, epochs=1), ScriptedHost([0.1])
    task.log_every = 2
    train_task(task, host)
    assert asked == [step % 2 == 0 for step in range(len(asked))]
    assert len(host.events) == sum(asked) and all(0 <= event["hit@1"] <= 1 for event in host.events)


def test_hit_of_a_step_is_that_of_the_model_before_it() -> None:
    """Task 1: share of real next items that come first among all; pads are learned but not counted."""
    model = FastTCN(num_items=9, channels=6, dilations=(1,))
    x = torch.tensor([[0, 0, 3, 4, 5], [1, 2, 3, 4, 5], [0, 0, 0, 0, 0]])
    scores = model(x[:, :-1], 2.0, [], 0)[0].view(3, 4, 9)
    expected = (scores.argmax(2) == x[:, 1:])[x[:, 1:] != 0].float().mean()
    step = t1_step(model, make_optimizer(model, 1e-2), x, 2.0, predictions=True)
    assert step.hit is not None and step.hit.item() == pytest.approx(expected.item())
    assert t1_step(model, make_optimizer(model, 1e-2), x * 0, 2.0, predictions=True).hit == 0
    assert t1_step(model, make_optimizer(model, 1e-2), x, 2.0).hit is None


def test_loop_goes_on_where_it_was_stopped(tiny: list[TaskData]) -> None:
    whole = tiny_training(tiny, 2, epochs=2)
    train_task(whole, ScriptedHost([0.1, 0.2]))
    stopped, before = tiny_training(tiny, 2, epochs=2), threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        train_task(stopped, ScriptedHost([], stop_after=2))
    assert (stopped.position.epoch, stopped.position.batch, stopped.position.step) == (0, 2, 2)
    assert threading.active_count() == before, "the thread that prepared batches is gone"
    host = ScriptedHost([0.1, 0.2])
    train_task(stopped, host)
    assert stopped.position == whole.position
    for name, value in whole.model.state_dict().items():
        assert torch.equal(stopped.model.state_dict()[name], value), name


def test_batches_are_prepared_in_a_thread_and_its_error_stops_the_loop_at_its_batch(
    tiny: list[TaskData], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny_training(tiny, 2, epochs=2)
    train_task(whole, ScriptedHost([0.1, 0.2]))
    calls, before, makers = 0, threading.active_count(), set()

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        makers.add(threading.current_thread() is threading.main_thread())
        calls += 1
        if calls == 3:
            raise OSError("the disk is gone")
        return fetch(*arguments)

    stopped = tiny_training(tiny, 2, epochs=2)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is gone"):
        patch.setattr(data_device, "fetch", failing)
        train_task(stopped, ScriptedHost([]))
    assert makers == {False} and threading.active_count() == before
    assert (stopped.position.batch, stopped.position.step) == (2, 2), "the batches before it have been trained on"
    train_task(stopped, ScriptedHost([0.1, 0.2]))
    assert stopped.position == whole.position
    for name, value in whole.model.state_dict().items():
        assert torch.equal(stopped.model.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("number", "broken", "part"), [(1, "embeding", "class"), (2, "task_classifier.0", "retention")]
)
def test_a_loss_that_is_not_finite_stops_with_the_place(
    tiny: list[TaskData], number: int, broken: str, part: str
) -> None:
    task = tiny_training(tiny, number)
    with torch.no_grad():
        task.model.get_submodule(broken).weight[:] = float("nan")
    with pytest.raises(DivergedError) as error:
        train_task(task, ScriptedHost([]))
    text = str(error.value)
    assert f"task {number}, epoch 0, batch 0 (step 0): the {part} loss is not finite" in text
    assert "s = 0.02" in text and ("rho = [0.9]" in text) == (number == 2)


def record(step: int, class_loss: float, retention: float) -> StepRecord:
    losses = torch.tensor(class_loss), torch.tensor(retention)
    return StepRecord(3, 0, step, step, 1.0, [0.5], StepResult(*losses))


def test_losses_are_summed_alike_however_often_they_are_read() -> None:
    values = [(0.1 * k + 0.3, 0.01 * k) for k in range(7)]
    sums = []
    for every in (1, 3, 7):
        losses, position = Losses(2), Position(rho=[0.5])
        for step, (class_loss, retention) in enumerate(values):
            losses.add(record(step, class_loss, retention))
            if step % every == 0:
                event = losses.read(position)
                assert event is not None and event["step"] == step and event["class_loss"] == pytest.approx(class_loss)
        losses.read(position)
        assert losses.read(position) is None
        sums.append((position.samples, position.class_sum, position.retention_sum))
    assert sums[0] == sums[1] == sums[2] and sums[0][0] == 21


def test_a_loss_read_late_names_the_step_that_broke() -> None:
    losses = Losses(2)
    for step, value in enumerate((1.0, float("inf"), float("nan"))):
        losses.add(record(step, value, 0.0))
    with pytest.raises(DivergedError, match=r"batch 1 \(step 1\): the class loss is not finite: got class loss inf"):
        losses.read(Position(rho=[0.5]))


def test_no_step_reads_a_loss_unless_it_is_logged(tiny: list[TaskData], monkeypatch: Any) -> None:
    """On a device where reading means waiting: only every log_every-th step and the end of an epoch read."""
    task = tiny_training(tiny, 1, epochs=1, batch_size=4)
    task.log_every = 5
    reads: list[int] = []
    real = Losses.read

    def counted(losses: Losses, position: Position) -> Any:
        reads.append(position.step)
        return real(losses, position)

    monkeypatch.setattr(Losses, "read", counted)
    monkeypatch.setattr(trainer, "waits_for_device", lambda model: True)
    host = ScriptedHost([0.5])
    train_task(task, host)
    assert reads == [0, 5, 10, task.position.step] and [event["step"] for event in host.events] == [0, 5, 10]
