"""Training steps and the loop of one task: against the golden trajectory, the reference, and scripted surroundings."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from golden_vectors import Golden, load, relative_error
from tiny_data import write_tiny
from torch import Tensor, nn

from teracon_fast import FastTCN, packing, trainer
from teracon_fast.config import TaskConfig
from teracon_fast.data import TaskData, epoch_batches, fetch, split_task
from teracon_fast.masks import annealed_scale
from teracon_fast.reference import ReferenceTCN
from teracon_fast.reference import continual_step as reference_step
from teracon_fast.trainer import (
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

Trajectory = dict[str, Tensor]


def published_para(given: Golden, task: int) -> dict[str, Any]:
    """The published constructor dict of the network of task `task` (from 1)."""
    meta = given.meta
    para = {"item_size": meta["items"], "dilated_channels": meta["f"], "dilations": meta["dilations"]}
    para |= {"kernel_size": 3, "task_embs": [0, 2]}
    if task == 1:
        return para
    return {**para, "num_task": task, "target_item_size": [meta["items"], *meta["targets"]][:task]}


def models(
    given: Golden, reached: FastTCN | None, task: int, dtype: torch.dtype, algorithm: str
) -> tuple[FastTCN, FastTCN | None]:
    """Model and teacher at the beginning of a task: from the file, and where it says so from what this run reached."""
    model = FastTCN(published_para(given, task), algorithm=algorithm).to(dtype)
    model.load_state_dict(given.under(f"t{task}.init."))
    if task == 1:
        return model, None
    teacher = FastTCN(published_para(given, task - 1), algorithm=algorithm).to(dtype)
    teacher.load_state_dict(given.under(f"t{task - 1}.final.") if reached is None else reached.state_dict())
    if reached is not None:
        kept = {name: value for name, value in reached.state_dict().items() if ".mlp" not in name}
        model.load_state_dict(kept, strict=False)
    return model, teacher.frozen()


def own_training(given: Golden, dtype: torch.dtype, restart: bool, algorithm: str = "direct") -> Trajectory:
    """Tasks 1 to 4 with `t1_step` and `continual_step`; results under the names of the golden file.

    restart: every task begins with the file's weights instead of those that this run reached.
    """
    meta, result, reached = given.meta, {}, None
    for task in range(1, len(meta["targets"]) + 2):
        model, teacher = models(given, None if restart else reached, task, dtype, algorithm)
        optimizer, rho = make_optimizer(model, meta["lr"]), [FIRST_RHO] * (task - 1)
        for b in range(meta["steps"]):
            x, s = given[f"t{task}.x.{b}"], annealed_scale(b, meta["steps"], meta["smax"])
            if teacher is None:
                result[f"t1.loss.{b}"] = t1_step(model, optimizer, x, s).class_loss
                continue
            users = [given[f"t{task}.users.{b}.{j}"] for j in range(task - 1)]
            step = continual_step(model, teacher, optimizer, x, given[f"t{task}.y.{b}"], users, rho, s, meta["alpha"])
            assert step.next_rho is not None and step.retention_loss is not None
            rho = step.next_rho.tolist()
            result[f"t{task}.class_loss.{b}"] = step.class_loss
            result[f"t{task}.retention_loss.{b}"] = step.retention_loss
            result[f"t{task}.next_ratio.{b}"] = torch.tensor(rho, dtype=torch.float64)
        result.update({f"t{task}.final.{name}": value.clone() for name, value in model.state_dict().items()})
        reached = model
    return result


def published_training(given: Golden, dtype: torch.dtype, restart: bool, algorithm: str = "direct") -> Trajectory:
    """The published program's way of training with FastTCN in the place of its own class.

    One forward call per task and model, logits in full, a masks list per call, PyTorch's losses and Adam.
    """
    meta, result, reached = given.meta, {}, None
    cross_entropy, squared_error = nn.CrossEntropyLoss(), nn.MSELoss()

    def ratio(past: list[Tensor], current: list[Tensor]) -> float:
        cosine = nn.CosineSimilarity(dim=1, eps=1e-6)
        gates = [torch.sigmoid(6 * cosine(p, q)).item() for p, q in zip(past, current, strict=True)]
        return 1 - sum(gates) / len(gates)

    for task in range(1, len(meta["targets"]) + 2):
        model, teacher = models(given, None if restart else reached, task, dtype, algorithm)
        optimizer = torch.optim.Adam(model.parameters(), lr=meta["lr"], weight_decay=0)
        ratios, new = [0.9] * (task - 1), task - 1
        for b in range(meta["steps"]):
            x, smax = given[f"t{task}.x.{b}"], meta["smax"]
            s = (smax - 1 / smax) * b / meta["steps"] + 1 / smax
            optimizer.zero_grad()
            if teacher is None:
                logits, _ = model(x[:, :-1], s, [], 0, "cpu")
                loss = cross_entropy(logits, x[:, 1:].reshape(-1))
                result[f"t1.loss.{b}"] = loss.detach()
            else:
                users = [given[f"t{task}.users.{b}.{j}"] for j in range(new)]
                seen = [x[rows][:, :-1] if j == 0 else x[rows] for j, rows in enumerate(users)]
                past = [teacher(part, s, [], j, "cpu", onecall=True, new_task=new) for j, part in enumerate(seen)]
                logits, masks_list = model(x, s, [], new, "cpu", onecall=True, new_task=new)
                own = [
                    model(part, s, [], j, "cpu", onecall=True, backward=True, new_task=new)[0]
                    for j, part in enumerate(seen)
                ]
                class_loss = cross_entropy(logits, given[f"t{task}.y.{b}"])
                retention = sum(ratios[j] / sum(ratios) * squared_error(own[j], past[j][0]) for j in range(new))
                ratios = [ratio(past[j][1], masks_list) for j in range(new)]
                loss = class_loss + meta["alpha"] * retention
                result[f"t{task}.class_loss.{b}"] = class_loss.detach()
                result[f"t{task}.retention_loss.{b}"] = retention.detach()
                result[f"t{task}.next_ratio.{b}"] = torch.tensor(ratios, dtype=torch.float64)
            loss.backward()
            optimizer.step()
            for name, parameter in model.named_parameters():
                if ".ec" in name:
                    parameter.data = torch.clamp(parameter.data, -6, 6)
        result.update({f"t{task}.final.{name}": value.clone() for name, value in model.state_dict().items()})
        reached = model
    return result


@pytest.fixture(scope="module", params=[own_training, published_training])
def training(request: pytest.FixtureRequest) -> Callable[..., Trajectory]:
    way: Callable[..., Trajectory] = request.param
    return way


@pytest.fixture(scope="module")
def fp32(training: Callable[..., Trajectory]) -> dict[str, tuple[float, float]]:
    """Of every number of train_sequence.npz: error of the fp32 training, and of exact arithmetic (float64)."""
    return fp32_errors(training, "direct")


def fp32_errors(training: Callable[..., Trajectory], algorithm: str) -> dict[str, tuple[float, float]]:
    given = load("train_sequence")
    runs = [training(given, dtype, True, algorithm) for dtype in (torch.float32, torch.float64)]
    return {name: tuple(relative_error(run[name], given[name]) for run in runs) for name in runs[0]}  # type: ignore[misc]


def test_float64_training_is_the_published_one(training: Callable[..., Trajectory]) -> None:
    """Four tasks in one run: losses, rho and weights, each to rounding."""
    expected = load("train_sequence_float64")
    result = training(load("train_sequence"), torch.float64, False)
    assert set(result) == set(expected.arrays)
    errors = {name: relative_error(value, expected[name]) for name, value in result.items()}
    assert max(errors.values()) < 1e-9, max(errors.items(), key=lambda item: item[1])


def test_fp32_training_is_the_published_one(fp32: dict[str, tuple[float, float]]) -> None:
    """Bounds as tests/golden/README.md explains them: what fp32 does not determine is bounded by its error."""
    for name, (error, _) in fp32.items():
        task, kind = name.split(".")[:2]
        if kind in ("loss", "class_loss"):
            assert error < 1e-6, (name, error)
        elif kind == "next_ratio" or (kind == "final" and task in ("t1", "t2")):
            assert error < 1e-5, (name, error)
    bounds = {"t2.retention_loss.": 1e-4} | dict.fromkeys(("t3.final.", "t4.final.", "t3.retention_", "t4.retention_"), 5e-2)
    for prefix, bound in bounds.items():
        worst = max(error for name, (error, _) in fp32.items() if name.startswith(prefix))
        assert worst < bound, (prefix, worst)


def test_the_faster_algorithm_trains_alike(training: Callable[..., Trajectory]) -> None:
    """Minimal filtering rounds 1.5 times as much as direct products, and four steps of Adam make more of it."""
    for name, (error, _) in fp32_errors(training, "auto").items():
        task, kind = name.split(".")[:2]
        if kind in ("loss", "class_loss"):
            assert error < 1e-5, (name, error)
        elif kind == "next_ratio" or (kind == "final" and task in ("t1", "t2")):
            assert error < 3e-4, (name, error)


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
    for step, (x, y, users, rates, s, alpha, student_mask, c, precision, lengths) in enumerate(seen):
        epoch, batch = divmod(step, per_epoch)
        expected_x, expected_y = fetch(task.data, epoch_batches(train, 16, 11, epoch)[batch])
        assert torch.equal(x, expected_x) and torch.equal(y, expected_y)
        assert np.array_equal(lengths, packing.real_lengths(expected_x))
        assert s == pytest.approx((50 - 1 / 50) * batch / (len(train) / 16) + 1 / 50)
        assert rates == rho and (alpha, student_mask, c, precision) == (0.25, "past", 3.0, "fp32")
        assert torch.equal(users[0], draw_users(len(x), rho, draws)[0])
        event = host.events[step]
        assert (event["epoch"], event["batch"], event["step"], event["scale"]) == (epoch, batch, step, s)
        assert event["rho"] == rates
        rho = host.events[step + 1]["rho"] if step + 1 < len(seen) else rho
        assert rho != [FIRST_RHO], "rho moves after every step and is not reset by an epoch"
    valid = host.valid[0]
    sizes = [len(part[0]) for part in seen[:per_epoch]]
    losses = [event["class_loss"] for event in host.events[:per_epoch]]
    assert valid["class_loss"] == pytest.approx(sum(n * v for n, v in zip(sizes, losses, strict=True)) / sum(sizes))
    assert valid["step"] == per_epoch - 1


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
        patch.setattr(trainer, "fetch", failing)
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
