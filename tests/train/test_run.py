"""A whole sequence of tasks in a run folder: results, files, refusals, and what may change between two starts."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_data import write_tiny
from tiny_run import Recorder, StopAt, assert_same_run, events, tiny_config, weights

from teracon_fast.config import load_config
from teracon_fast.data import TaskSequence, open_dataset
from teracon_fast.data.seeds import derived_seed
from teracon_fast.errors import CheckpointError
from teracon_fast.infer.open import open_run
from teracon_fast.methods import Method, Teracon
from teracon_fast.ops.task_masks.torch import similarity
from teracon_fast.train.checkpoint import RunState, read_task_header
from teracon_fast.train.evaluation import evaluate
from teracon_fast.train.folder import RunStopped
from teracon_fast.train.log import RunLog
from teracon_fast.train.loop import DivergedError
from teracon_fast.train.results import Results
from teracon_fast.train.run import task_split, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TaskSequence:
    return write_tiny(tmp_path_factory.mktemp("data") / "tiny", tasks=3, rows=120)


class Finished:
    """A run of three tasks, trained once for all tests that only look at it."""

    def __init__(self, data: TaskSequence, run: Path) -> None:
        self.config, self.run, self.seen = tiny_config(data.path, run), run, Recorder()
        self.results: Results = train(self.config, self.seen)


@pytest.fixture(scope="module")
def finished(data: TaskSequence, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Finished(data, tmp_path_factory.mktemp("runs") / "whole")


def opened(run: Path, task: int) -> Teracon:
    method = open_run(run, after=task, device="cpu").method
    assert isinstance(method, Teracon)
    return method


def test_matrix_holds_the_tests_of_the_best_weights(data: TaskSequence, finished: Finished) -> None:
    """Recomputed from the files: after each task its best model, every task so far, the test samples, s_max."""
    results = finished.results
    assert results.tasks == ["next", "task 2", "task 3"] and results.metric == ["mrr@5", "mrr@5", "accuracy"]
    assert [len(row) for row in results.R] == [1, 2, 3]
    for j, row in enumerate(results.R):
        method = opened(finished.run, j + 1)
        assert len(method.labels) == j + 1 and method.model.has_relation == (j > 0)
        for i, value in enumerate(row):
            metrics = evaluate(method, data.tasks[i], i, task_split(finished.config, data.tasks[i]).test, 64)
            assert value == metrics[results.metric[i]]
            assert events(finished.run, "task_end")[j]["test"][str(i + 1)] == metrics
    assert results.bwt == [100 * (results.R[2][i] - results.R[i][i]) / results.R[i][i] for i in range(3)]
    assert results.final["3"] == events(finished.run, "task_end")[2]["test"]["3"]


def test_the_sequence_learns_and_retention_retains(tmp_path: Path) -> None:
    """Chance is 0.08 (MRR@5 of 31 and 30 labels) and 0.25 (4 classes).

    All users are retained: so few of a batch of 32 as rho asks for make the outcome a matter of the seed and of the last bits.
    """
    write_tiny(tmp_path / "data", tasks=3, rows=300)
    longer = {"model__channels": 16, "first__epochs": 6, "first__batch_size": 16, "later__epochs": 6, "teracon__sampling": "all"}
    runs = {}
    for alpha in (0.0, 0.7):
        config = tiny_config(
            tmp_path / "data", tmp_path / f"alpha {alpha}", later__alpha=alpha, later__batch_size=32, **longer
        )
        runs[alpha] = train(config)
        learned = [runs[alpha].R[i][i] for i in range(3)]
        assert learned[0] > 0.5 and learned[1] > 0.3 and learned[2] > 0.5, learned
    forgot, kept = runs[0.0].bwt[0], runs[0.7].bwt[0]
    assert forgot is not None and kept is not None and forgot < kept - 10


def test_kept_weights_are_of_the_best_validation(data: TaskSequence, finished: Finished) -> None:
    for task in (1, 2, 3):
        valid = [event for event in events(finished.run, "valid") if event["task"] == task]
        scores = [event["metrics"]["hit@1"] for event in valid]
        best = scores.index(max(scores))
        header = read_task_header(finished.run, task)
        assert (header.method, header.task, header.notes["epoch"]) == ("teracon", task, best + 1)
        assert header.notes["options"]["s_max"] == 50.0
        samples = task_split(finished.config, data.tasks[task - 1]).valid
        found = evaluate(opened(finished.run, task), data.tasks[task - 1], task - 1, samples, 64)
        assert found == valid[best]["metrics"]
        assert events(finished.run, "task_end")[task - 1]["best_epoch"] == best


def test_files_of_a_run(data: TaskSequence, finished: Finished) -> None:
    run = finished.run
    for name in ("dataset.json", "items.parquet", "task2/labels.parquet", "task3/labels.parquet"):
        assert (run / name).read_bytes() == (data.path / name).read_bytes()
    assert load_config(path=run / "config.toml") == finished.config.model_copy(update={"device": "cpu"})
    stored = json.loads((run / "results.json").read_text())
    assert stored == {name: getattr(finished.results, name) for name in ("metric", "tasks", "R", "bwt", "final")}
    assert not list(run.rglob("*.tmp"))


def test_events_of_a_run(data: TaskSequence, finished: Finished) -> None:
    kinds = [event["event"] for event in events(finished.run)]
    assert kinds[-1] == "run_end" and kinds.count("task_end") == 3 and kinds.count("run_end") == 1
    for task in (1, 2, 3):
        steps = [event for event in events(finished.run, "step") if event["task"] == task]
        samples = len(task_split(finished.config, data.tasks[task - 1]).train)
        settings = finished.config.for_task(task)
        batches = -(-samples // settings.batch_size)
        assert [event["step"] for event in steps] == list(range(0, batches * settings.epochs, 3))
        for event in steps:
            assert divmod(event["step"], batches) == (event["epoch"], event["batch"])
            assert event["scale"] == pytest.approx((50 - 0.02) * event["batch"] * settings.batch_size / samples + 0.02)
            assert len(event.get("rho", [])) == task - 1
            retention = event["retention_loss"] if task > 1 else 0.0
            assert event["loss"] == pytest.approx(event["class_loss"] + 0.7 * retention)
            assert event["users_per_s"] > 0
        if task > 1:
            assert steps[0]["rho"] == [0.9] * (task - 1)
            assert all(0.0024 < value <= 0.5 for event in steps[1:] for value in event["rho"])
    masks = opened(finished.run, 3).model.masks(50.0).detach()
    expected = torch.stack([similarity(masks[:, i, None], masks) for i in range(3)], 1)
    found = torch.tensor(events(finished.run, "task_end")[2]["similarity"])
    assert found.shape == (4, 3, 3)
    torch.testing.assert_close(found, expected)
    cost = events(finished.run, "run_end")[0]["cost"]
    assert cost["parameters"] == sum(value.numel() for value in weights(finished.run, 3).values())
    assert cost["kept_mib"] * 2**20 == 4 * cost["parameters"] and cost["peak_mib"] > 50 and cost["device"] == "cpu"


def test_observer_sees_every_step_and_the_logged_events(data: TaskSequence, finished: Finished) -> None:
    seen = finished.seen
    assert [(start.task, start.name, start.num_tasks) for start in seen.starts] == [
        (1, "next", 3), (2, "task 2", 3), (3, "task 3", 3),
    ]  # fmt: skip
    total = sum(start.batches_per_epoch * start.epochs for start in seen.starts)
    assert len(seen.steps) == total
    first = seen.starts[0].batches_per_epoch
    assert [step.batch for step in seen.steps[:first]] == list(range(first))
    assert sum(step.users for step in seen.steps[:first]) == len(task_split(finished.config, data.tasks[0]).train)
    assert [step.event for step in seen.steps if step.event] == events(finished.run, "step")
    assert seen.valid == events(finished.run, "valid") and seen.ends == events(finished.run, "task_end")
    assert {(task, split) for task, split, *_ in seen.evaluated} == {
        (t, s) for t in (1, 2, 3) for s in ("valid", "test")
    }


def test_each_task_begins_from_the_best_of_the_one_before(
    data: TaskSequence, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is carried over but the relation weights, which are new for all tasks; the teacher keeps its own."""
    begun: list[tuple[Method, Any]] = []

    def look(trainer: Any, saved: Any) -> None:
        trainer.state.begin_phase("train")
        begun.append((trainer.method, trainer._new_optimizer()))
        raise InterruptedError

    train(tiny_config(data.path, tmp_path / "run", num_tasks=1))
    monkeypatch.setattr("teracon_fast.train.loop.Trainer.train", look)
    with pytest.raises(InterruptedError):
        train(tiny_config(data.path, tmp_path / "run"))
    [(method, optimizer)] = begun
    assert isinstance(method, Teracon)
    teacher, own = method.teacher, method.state_dict()
    best = weights(finished.run, 1)
    assert teacher is not None and not any(parameter.requires_grad for parameter in teacher.parameters())
    assert teacher.num_tasks == 1 and not teacher.has_relation
    assert all(torch.equal(value, best[f"model.{name}"]) for name, value in teacher.state_dict().items())
    assert all(torch.equal(own[name], value) for name, value in best.items())
    new = {name for name in own if name not in best}
    assert {name.split(".")[-3] for name in new if "mlp" in name} == {"mlp1", "mlp2"}
    biases = [own[name] for name in new if "mlp" in name and name.endswith("bias")]
    assert len(biases) == 2 * 2 * 2 and all(torch.equal(bias, torch.full((1,), 0.1)) for bias in biases)
    assert not optimizer.state_dict()["state"]
    parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert parameters == {id(parameter) for parameter in method.parameters()}


def test_a_finished_run_is_left_alone(finished: Finished) -> None:
    before = {path: path.read_bytes() for path in finished.run.rglob("*") if path.is_file() and path.name != ".lock"}
    seen = Recorder()
    assert train(finished.config, seen) == finished.results
    after = {path: path.read_bytes() for path in finished.run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert before == after and not seen.steps and any("finished" in text for text in seen.messages)


def test_one_seed_gives_one_run_and_another_seed_another(
    data: TaskSequence, finished: Finished, tmp_path: Path
) -> None:
    torch.rand(7)  # the global generator stands elsewhere
    train(tiny_config(data.path, tmp_path / "same"))
    assert_same_run(tmp_path / "same", finished.run, 3)
    train(tiny_config(data.path, tmp_path / "other", seed=1, num_tasks=1))
    name = "model.embeding.weight"
    assert not torch.equal(weights(tmp_path / "other", 1)[name], weights(finished.run, 1)[name])


def test_a_run_of_fewer_tasks_can_be_extended(data: TaskSequence, finished: Finished, tmp_path: Path) -> None:
    """First one task of data that have two, then one more, then data with a third task: the same bits as at once."""
    shutil.copytree(data.path, tmp_path / "data")
    about = json.loads((tmp_path / "data" / "dataset.json").read_text())
    shorter = {**about, "tasks": about["tasks"][:2]}
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(shorter))
    shutil.move(tmp_path / "data" / "task3", tmp_path / "task3")
    assert len(train(tiny_config(tmp_path / "data", tmp_path / "run", num_tasks=1)).R) == 1
    assert len(train(tiny_config(tmp_path / "data", tmp_path / "run")).R) == 2
    shutil.move(tmp_path / "task3", tmp_path / "data" / "task3")
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(about))
    assert train(tiny_config(tmp_path / "data", tmp_path / "run")) == finished.results
    for task in (1, 2, 3):
        a, b = weights(tmp_path / "run", task), weights(finished.run, task)
        assert all(torch.equal(a[name], b[name]) for name in b)
    assert (tmp_path / "run" / "task3" / "labels.parquet").exists()


def test_a_diverging_task_stops_and_keeps_the_checkpoint_before(data: TaskSequence, tmp_path: Path) -> None:
    config = tiny_config(data.path, tmp_path / "run", task__2__lr=1e30, checkpoint_every_steps=1)
    with pytest.raises(DivergedError, match=r"task 2 \(task 2\), epoch 1, batch 2"):
        train(config)
    state = RunState.load(tmp_path / "run")
    assert state is not None and state.begun in (1, 2) and len(state.tests) == 1


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("place", "count"), [("step", 5), ("step", 11), ("valid", 2), ("test", 7), ("test", 12)])
def test_signals_save_and_the_run_resumes_to_the_same_bits(
    data: TaskSequence, finished: Finished, tmp_path: Path, signum: int, place: str, count: int
) -> None:
    config = tiny_config(data.path, tmp_path / "run")
    handler = signal.getsignal(signum)
    stops = StopAt(lambda kind, number: kind == place and number >= count, signum)
    with pytest.raises(RunStopped) as stopped:
        train(config, stops)
    assert stopped.value.signum == signum and "saved; the same command resumes" in str(stopped.value)
    assert signal.getsignal(signum) == handler, "the handlers of before are back"
    seen = Recorder()
    assert train(config, seen) == finished.results
    assert_same_run(tmp_path / "run", finished.run, 3)
    assert len(stops.steps) + len(seen.steps) == len(finished.seen.steps), "no step was repeated or left out"
    assert any("resuming task" in text for text in seen.messages)


def test_a_kill_in_a_second_phase_leaves_the_best_weights_of_the_first_alone(
    data: TaskSequence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CONURE, killed after the first validation of "retrain", resumes in "train", whose best epoch is long past."""
    monkeypatch.setattr("teracon_fast.train.loop.selection_value", lambda *_: 1.0)  # the first epoch is the best

    class Killed(Recorder):
        def on_valid(self, event: dict[str, Any]) -> None:
            if event["phase"] == "retrain":
                raise KeyboardInterrupt

    changes = {"method": "conure", "num_tasks": 1, "first__epochs": 3, "first__batch_size": 32, "checkpoint_every_steps": 8}
    config, whole = (tiny_config(data.path, tmp_path / name, **changes) for name in ("killed", "whole"))
    with pytest.raises(KeyboardInterrupt):
        train(config, Killed())
    saved = RunState.load(config.run)
    assert saved is not None and saved.training is not None
    assert saved.training["state"]["phase"] == "train" and saved.training["state"]["best_epoch"] == 0
    train(config)
    train(whole)
    assert_same_run(config.run, whole.run, 1)


def test_a_failed_save_keeps_the_checkpoint_before_and_another_version_is_refused(tmp_path: Path) -> None:
    training = {"draws": torch.Generator().get_state(), "rho": [0.5]}
    RunState({"result": {"seed": 1}, "exact": {}}, begun=2, training=training, tests=[[{"hit@1": 0.1}]]).save(tmp_path)
    with pytest.raises(AttributeError):
        RunState({}, training={"broken": lambda: None}).save(tmp_path)
    loaded = RunState.load(tmp_path)
    assert loaded is not None and loaded.begun == 2 and loaded.training is not None and loaded.tests == [[{"hit@1": 0.1}]]
    assert torch.equal(loaded.training["draws"], training["draws"])  # type: ignore[arg-type]
    path = RunState.file(tmp_path)
    assert [file.name for file in path.parent.iterdir()] == ["resume.pt"]
    torch.save({"weights": 1}, path)
    with pytest.raises(CheckpointError, match="got version None, expected"):
        RunState.load(tmp_path)


def test_log_shorter_than_the_checkpoint_says_is_refused(
    data: TaskSequence, finished: Finished, tmp_path: Path
) -> None:
    shutil.copytree(finished.run, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="got 0 bytes, expected at least"):
        train(tiny_config(data.path, tmp_path / "run"))


def test_tensorboard_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, tensorboard=True)
    for step in range(6):
        log.write("step", 2, step=step, loss=float(step), rho=[0.5, 0.25])
    offset = log.synced_offset()
    log.close()
    log = RunLog(tmp_path, offset, steps={2: 4}, tensorboard=True)
    log.write("step", 2, step=4, loss=40.0, rho=[0.5, 0.25])
    log.write("valid", 2, step=5, epoch=0, metrics={"hit@1": 0.75}, best=True)
    log.close()
    scalars = EventAccumulator(str(tmp_path / "tensorboard" / "task2")).Reload()
    assert [(event.step, event.value) for event in scalars.Scalars("step/loss")] == [
        (0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0),
    ]  # fmt: skip
    assert scalars.Scalars("step/rho/2")[0].value == 0.25
    assert scalars.Scalars("valid/metrics/hit@1")[0].value == 0.75


def test_seeds_of_tasks_and_purposes_differ() -> None:
    seeds = {
        derived_seed(seed, task, purpose) for seed in (0, 1) for task in (1, 2, 12) for purpose in ("order", "draws")
    }
    assert len(seeds) == 12 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("changes", [
    {"teracon__mask": "positive_only", "teracon__sampling": "minimum"},
    {"teracon__mask": "none", "teracon__sampling": "all", "teracon__student_mask": "current", "parity": "paper"},
    {"split_by": "user", "later__select": "mrr@5"},
])  # fmt: skip
def test_variants_run_from_end_to_end(data: TaskSequence, tmp_path: Path, changes: dict[str, Any]) -> None:
    results = train(tiny_config(data.path, tmp_path / "run", first__epochs=1, later__epochs=1, **changes))
    model = opened(tmp_path / "run", 3).model
    assert model.mask_variant == changes.get("teracon__mask", "relation")
    assert model.has_relation == (model.mask_variant != "none")
    steps = [event for event in events(tmp_path / "run", "step") if event["task"] == 3 and event["batch"] > 0]
    if changes.get("teracon__sampling") == "minimum":
        assert all(len(set(event["rho"])) == 1 and event["rho"][0] < 0.5 for event in steps)
    if changes.get("teracon__sampling") == "all":
        assert all(event["rho"] == [1.0, 1.0] for event in steps)
    assert len(results.R) == 3


def test_prepared_data_may_be_opened_while_training(data: TaskSequence, finished: Finished) -> None:
    """The data folder is only read: training leaves it as it was."""
    assert open_dataset(data.path).num_items == data.num_items
    assert sorted(path.name for path in data.path.iterdir()) == sorted(
        ["dataset.json", "items.parquet", "task1", "task2", "task3"]
    )
