"""Training steps against the reference, and the loop of one task with scripted validations."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from golden_vectors import relative_error
from steps import continual_step, t1_step
from tiny_data import write_tiny
from torch import Tensor, nn

from teracon_fast import FastTCN, packing
from teracon_fast.data import Batch, TaskSequence, epoch_batches, fetch, loader, split_task
from teracon_fast.data.seeds import derived_seed
from teracon_fast.errors import CheckpointError, ConfigError
from teracon_fast.methods import HAT, MTL, Method, Sizes, StepContext, StepResult, Teracon
from teracon_fast.methods.teracon import FIRST_RHO, draw_users
from teracon_fast.reference import ReferenceTCN
from teracon_fast.reference import continual_step as reference_step
from teracon_fast.train import loop
from teracon_fast.train.loop import (
    Callbacks,
    DivergedError,
    LoopSettings,
    PendingLosses,
    StepRecord,
    TaskCheckpoint,
    TaskSettings,
    Trainer,
    TrainState,
    make_optimizer,
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
        assert got.class_loss.item() == pytest.approx(expected.class_loss, rel=1e-12)
        assert got.retention_loss.item() == pytest.approx(expected.retention_loss, rel=1e-11)
        assert got.next_rho == pytest.approx(expected.next_rho, rel=1e-9)
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
            assert step.class_loss.dtype == torch.float32
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


# The loop


class Scripted(Trainer):
    """Validations come to given scores."""

    scores: list[float]

    def measure(self, samples: Any, progress: Any = None) -> dict[str, float]:
        score = self.scores.pop(0)
        return {"hit@1": score, "mrr@5": 1 - score}


class Recorder(Callbacks):
    """Writes down what it is told; stops after some steps if asked to."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.stop_after, self.steps = stop_after, 0
        self.events: list[dict[str, Any]] = []
        self.epochs: list[dict[str, Any]] = []
        self.best: list[int] = []

    def on_step(self, trainer: Trainer, users: int, event: dict[str, Any] | None) -> None:
        self.steps += 1
        self.events += [] if event is None else [event]
        if self.steps == self.stop_after:
            raise KeyboardInterrupt

    def on_epoch_end(self, trainer: Trainer, event: dict[str, Any]) -> None:
        self.epochs.append(event)

    def keep_best(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        super().keep_best(trainer, metrics)
        self.best.append(trainer.state.epoch)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TaskSequence:
    return write_tiny(tmp_path_factory.mktemp("data") / "tiny", tasks=3, rows=61, length=6, items=12)


def trainer_of(
    tiny: TaskSequence, number: int, scores: list[float], kind: type[Method] = Teracon, log_every: int = 1,
    stop_after: int | None = None, options: Mapping[str, Any] | None = None, **settings: Any,
) -> tuple[Scripted, Recorder]:  # fmt: skip
    """The trainer of a task (from 1) that has just begun."""
    method, seen = kind(Sizes(tiny.num_items, 8, (1, 2)), **(options or {})), Recorder(stop_after)
    for task in range(number):
        method.start(task, tiny.tasks[task].num_labels, torch.Generator().manual_seed(task))
    splits = [split_task(data) for data in tiny.tasks]
    chosen = TaskSettings(**{"batch_size": 16, "lr": 1e-3, **settings})
    trainer = Scripted(method, tiny, splits, chosen, LoopSettings(seed=11, log_every=log_every), seen)
    trainer.scores = scores
    return trainer, seen


def test_patience_counts_epochs_without_strict_improvement_and_the_best_weights_come_back(tiny: TaskSequence) -> None:
    trainer, seen = trainer_of(tiny, 1, [0.2, 0.3, 0.3, 0.4, 0.4, 0.4, 0.9], epochs=50, patience=2)
    kept: list[dict[str, Tensor]] = []
    plain = seen.on_epoch_end
    seen.on_epoch_end = lambda trainer, event: (  # type: ignore[method-assign]
        kept.append({name: value.clone() for name, value in trainer.method.state_dict().items()}), plain(trainer, event))[1]
    state = trainer.train()
    assert seen.best == [0, 1, 3], "an equal score is not better"
    assert [event["best"] for event in seen.epochs] == [True, True, False, True, False, False]
    assert (state.best_epoch, state.best_score, state.epoch) == (3, 0.4, 6)
    for name, value in trainer.method.state_dict().items():
        assert torch.equal(value, kept[3][name]), name
    assert not torch.equal(kept[3]["model.embeding.weight"], kept[5]["model.embeding.weight"])


def test_epochs_are_limited_and_the_score_can_be_mrr(tiny: TaskSequence) -> None:
    trainer, seen = trainer_of(tiny, 2, [0.5, 0.6, 0.4], epochs=3, select="mrr@5")
    state = trainer.train()
    assert seen.best == [0, 2] and state.best_score == pytest.approx(0.6) and state.epoch == 3


def test_the_first_epoch_is_kept_even_with_score_zero(tiny: TaskSequence) -> None:
    trainer, seen = trainer_of(tiny, 1, [0.0, 0.0], epochs=2)
    trainer.train()
    assert seen.best == [0]


def test_each_epoch_is_in_its_order_with_the_annealing_restarted(tiny: TaskSequence, monkeypatch: Any) -> None:
    trainer, seen = trainer_of(tiny, 2, [0.1, 0.2], epochs=2, log_every=3, options={"alpha": 0.25})
    taken: list[tuple[Batch, StepContext, StepResult]] = []
    real = loop.train_step

    def spy(method: Method, optimizer: Any, batch: Batch, context: StepContext) -> StepResult:
        taken.append((batch, context, real(method, optimizer, batch, context)))
        return taken[-1][2]

    monkeypatch.setattr(loop, "train_step", spy)
    method, draws = trainer.method, torch.Generator().manual_seed(2)
    method.draws.manual_seed(2)
    drawn: list[list[Tensor]] = []
    plain = Teracon.draw_users
    monkeypatch.setattr(Teracon, "draw_users", lambda self, *rest: drawn.append(plain(self, *rest)) or drawn[-1])
    trainer.train()
    train = trainer.split.train
    per_epoch = -(-len(train) // 16)
    assert len(train) % 16 and len(taken) == 2 * per_epoch == seen.steps, "the last batch of this test is a partial one"
    rates = [FIRST_RHO]
    for step, (batch, context, result) in enumerate(taken):
        epoch, number = divmod(step, per_epoch)
        samples = epoch_batches(train, 16, derived_seed(11, 2, "order"), epoch)[number]
        x, y = fetch(trainer.data, samples)
        assert torch.equal(batch.x, x) and torch.equal(batch.y, y) and np.array_equal(batch.lengths, packing.real_lengths(x))
        assert result.log["scale"] == pytest.approx((50 - 1 / 50) * number / (len(train) / 16) + 1 / 50)
        assert (context.batch, context.precision, context.predictions) == (number, "fp32", step % 3 == 0)
        assert ("hit@1" in result.log) == context.predictions, "hits are counted in steps that are logged"
        assert (result.log["rho"] == [FIRST_RHO]) == (step == 0), "rho moves after every step and is not reset by an epoch"
        assert torch.equal(drawn[step][0], draw_users(len(x), result.log["rho"], draws)[0])
        rates = result.log["rho"]
        if context.predictions:
            event = seen.events[step // 3]
            assert (event["epoch"], event["batch"], event["step"], event["rho"]) == (epoch, number, step, rates)
            assert event["loss"] == pytest.approx(event["class_loss"] + 0.25 * event["retention_loss"])
    assert len(seen.events) == -(-len(taken) // 3)
    for name in ("class_loss", "retention_loss"):
        losses = [(len(batch.x), float(result.losses[name])) for batch, _, result in taken[:per_epoch]]
        mean = sum(n * value for n, value in losses) / len(train)
        assert seen.epochs[0][name] == pytest.approx(mean), "the mean over samples, not over batches"
    assert seen.epochs[0]["step"] == per_epoch - 1


def test_batches_are_prepared_in_a_thread_and_its_error_stops_the_loop_at_its_batch(
    tiny: TaskSequence, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, before, makers = 0, threading.active_count(), set()

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        makers.add(threading.current_thread() is threading.main_thread())
        calls += 1
        if calls == 3:
            raise OSError("the disk is gone")
        return fetch(*arguments)

    monkeypatch.setattr(loader, "fetch", failing)
    trainer, _ = trainer_of(tiny, 2, [])
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.train()
    assert makers == {False} and threading.active_count() == before
    assert (trainer.state.batch, trainer.state.step) == (2, 2), "the batches before it have been trained on"


@pytest.mark.parametrize(("number", "broken", "part"), [(1, "embeding", "class"), (2, "task_classifier.0", "retention")])
def test_a_loss_that_is_not_finite_stops_and_says_where(tiny: TaskSequence, number: int, broken: str, part: str) -> None:
    trainer, _ = trainer_of(tiny, number, [])
    with torch.no_grad():
        trainer.method.get_submodule(f"model.{broken}").weight[:] = float("nan")
    with pytest.raises(DivergedError) as error:
        trainer.train()
    text = str(error.value)
    name = tiny.tasks[number - 1].name
    assert f"task {number} ({name}), epoch 1, batch 1 (step 1): the {part} loss is not finite" in text
    assert "scale = 0.02" in text and ("rho = [0.9]" in text) == (number == 2)


def record(step: int, class_loss: float, retention: float) -> StepRecord:
    losses = {"class_loss": torch.tensor(class_loss), "retention_loss": torch.tensor(retention)}
    return StepRecord(3, 0, step, step, StepResult(losses, {"retention_loss": 0.5}))


def test_losses_are_summed_alike_however_often_they_are_read() -> None:
    values = [(0.1 * k + 0.3, 0.01 * k) for k in range(7)]
    sums = []
    for every in (1, 3, 7):
        losses, state = PendingLosses("task"), TrainState()
        for step, (class_loss, retention) in enumerate(values):
            losses.add(record(step, class_loss, retention))
            if step % every == 0:
                event = losses.read(state)
                assert event is not None and event["step"] == step
                assert event["loss"] == pytest.approx(class_loss + 0.5 * retention)
        losses.read(state)
        assert losses.read(state) is None
        sums.append((state.samples, state.sums))
    assert sums[0] == sums[1] == sums[2] and sums[0][0] == 21


def test_a_loss_read_late_names_the_step_that_broke() -> None:
    losses = PendingLosses("task 2 (clicks)")
    for step, value in enumerate((1.0, float("inf"), float("nan"))):
        losses.add(record(step, value, 0.0))
    with pytest.raises(DivergedError, match=r"clicks.*batch 2 \(step 2\): the class loss is not finite: got class loss inf"):
        losses.read(TrainState())


def test_on_a_gpu_no_step_reads_a_loss_unless_it_is_logged(tiny: TaskSequence, monkeypatch: Any) -> None:
    """Where reading means waiting: only every log_every-th step and the end of an epoch read."""
    trainer, seen = trainer_of(tiny, 1, [0.5], epochs=1, batch_size=4, log_every=5)
    reads: list[int] = []
    real = PendingLosses.read

    def counted(losses: PendingLosses, state: TrainState) -> Any:
        reads.append(state.step)
        return real(losses, state)

    monkeypatch.setattr(PendingLosses, "read", counted)
    monkeypatch.setattr(loop, "train_step", lambda *_: StepResult({"class_loss": torch.ones(())}))
    monkeypatch.setattr(Method, "device", property(lambda self: torch.device("meta")))  # anything but the CPU
    trainer.train()
    assert reads == [0, 5, 10, trainer.state.step] and [event["step"] for event in seen.events] == [0, 5, 10]


def test_companions_come_from_their_own_training_samples(tiny: TaskSequence, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epoch after epoch, all of them, in another order in each."""
    trainer, _ = trainer_of(tiny, 2, [0.1] * 3, MTL, epochs=3, batch_size=20)
    seen: list[Batch] = []
    plain = MTL.loss

    def watched(self: MTL, batch: Batch, context: StepContext) -> Tensor:
        assert set(context.companions) == {0}
        seen.append(context.companions[0])
        return plain(self, batch, context)

    monkeypatch.setattr(MTL, "loss", watched)
    trainer.train()
    first = tiny.tasks[0]
    train = first.samples[trainer.splits[0].train][:, 0]
    assert {tuple(row) for batch in seen for row in batch.x.tolist()} == {tuple(row) for row in first.sequences[train].tolist()}
    per_epoch = -(-len(train) // 20)
    assert [len(batch.x) for batch in seen[: per_epoch + 1]] == [20] * (per_epoch - 1) + [len(train) % 20 or 20, 20]
    assert len(seen) >= 2 * per_epoch and not torch.equal(seen[0].x, seen[per_epoch].x)


# Checkpoints, see also test_resume.py


def test_the_loop_resumes_from_a_checkpoint(tiny: TaskSequence) -> None:
    whole, _ = trainer_of(tiny, 2, [0.1, 0.2], epochs=2)
    whole.train()
    stopped, _ = trainer_of(tiny, 2, [], epochs=2, stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert (stopped.state.epoch, stopped.state.batch, stopped.state.step) == (0, 2, 2)
    resumed, seen = trainer_of(tiny, 2, [0.1, 0.2], epochs=2)
    state = resumed.train(TaskCheckpoint.of_plain(stopped.checkpoint().plain()))
    assert seen.steps == whole.state.step - 2
    assert {**vars(state), "seconds": 0} == {**vars(whole.state), "seconds": 0}
    for name, value in whole.method.state_dict().items():
        assert torch.equal(resumed.method.state_dict()[name], value), name


def test_a_checkpoint_that_does_not_fit_is_refused(tiny: TaskSequence) -> None:
    stopped, _ = trainer_of(tiny, 2, [], HAT, stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    saved = stopped.checkpoint().plain()
    more = {**saved["weights"], "heads.7.bias": torch.zeros(1)}
    other = {**saved["weights"], "heads.1.bias": torch.zeros(1)}
    less = {name: value for name, value in saved["weights"].items() if name != "heads.1.bias"}
    for changes, message in (
        ({"state": {**saved["state"], "phase": "prune"}}, "got phase 'prune', expected one of"),
        ({"weights": more}, "does not fit hat: it has 'heads.7.bias'"),
        ({"weights": other}, "(?s)does not fit hat: .*heads.1.bias"),
        ({"weights": less}, "does not fit hat: it lacks 'heads.1.bias'"),
        ({"method": {}}, "does not fit hat: 'draws'"),
    ):
        trainer, _ = trainer_of(tiny, 2, [], HAT)
        with pytest.raises(CheckpointError, match=message):
            trainer.train(TaskCheckpoint.of_plain({**saved, **changes}))


def test_settings_out_of_range_are_refused() -> None:
    for settings in ({"epochs": 0}, {"batch_size": 0}, {"patience": 0}, {"lr": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            TaskSettings(**settings)  # type: ignore[arg-type]
