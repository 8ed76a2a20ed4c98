"""A whole sequence of tasks in a run folder: results, files, refusals, and what may change between two starts."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_data import write_tiny

from teracon_fast import FastTCN
from teracon_fast.config import RunConfig, load_config
from teracon_fast.data import TaskSequence, open_dataset
from teracon_fast.errors import CheckpointError, ConfigError
from teracon_fast.model.checkpoints import load_model, read_notes
from teracon_fast.ops.task_masks import similarity
from teracon_fast.train.evaluation import evaluate
from teracon_fast.train.folder import RunStopped, locked
from teracon_fast.train.log import TIME_FIELDS, Observer, RunLog, Step, TaskStart
from teracon_fast.train.loop import DivergedError
from teracon_fast.train.results import Results, derived_seed
from teracon_fast.train.run import task_split, train

SETTINGS: dict[str, Any] = {
    "model.channels": 12, "model.dilations": [1, 2], "first.epochs": 3, "first.lr": 0.01, "later.epochs": 2,
    "later.lr": 0.01, "later.batch_size": 64, "log_every": 3, "evaluate_batch_size": 64, "threads": 1, "tensorboard": False,
}  # fmt: skip


def tiny_config(data: Path, run: Path, **changes: Any) -> RunConfig:
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return load_config(overrides={**SETTINGS, "data": str(data), "run": str(run), **changes})


def events(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["event"])]


def timeless(run: Path) -> list[dict[str, Any]]:
    """The events without the fields that hold times."""
    return [{name: value for name, value in event.items() if name not in TIME_FIELDS} for event in events(run)]


def weights(run: Path, task: int) -> dict[str, torch.Tensor]:
    return load_model(run / "checkpoints" / f"task{task}.safetensors").state_dict()


def assert_same_run(one: Path, other: Path, tasks: int) -> None:
    """The same weights, results and events, bit for bit."""
    for task in range(1, tasks + 1):
        a, b = weights(one, task), weights(other, task)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), task
    assert timeless(one) == timeless(other)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TaskSequence:
    return write_tiny(tmp_path_factory.mktemp("data") / "tiny", tasks=3, rows=120)


class Recorder(Observer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.starts: list[TaskStart] = []
        self.steps: list[Step] = []
        self.valid: list[dict[str, Any]] = []
        self.ends: list[dict[str, Any]] = []
        self.evaluated: list[tuple[int, str, int, int]] = []
        self.messages: list[str] = []

    def on_task_start(self, start: TaskStart) -> None:
        self.starts.append(start)

    def on_step(self, step: Step) -> None:
        self.steps.append(step)

    def on_evaluate(self, task: int, split: str, done: int, total: int) -> None:
        self.evaluated.append((task, split, done, total))

    def on_valid(self, event: dict[str, Any]) -> None:
        self.valid.append(event)

    def on_task_end(self, event: dict[str, Any]) -> None:
        self.ends.append(event)

    def on_message(self, text: str) -> None:
        self.messages.append(text)


class Finished:
    """A run of three tasks, trained once for all tests that only look at it."""

    def __init__(self, data: TaskSequence, run: Path) -> None:
        self.config, self.run, self.seen = tiny_config(data.path, run), run, Recorder()
        self.results: Results = train(self.config, self.seen)


@pytest.fixture(scope="module")
def finished(data: TaskSequence, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Finished(data, tmp_path_factory.mktemp("runs") / "whole")


def test_matrix_holds_the_tests_of_the_best_weights(data: TaskSequence, finished: Finished) -> None:
    """Recomputed from the files: after each task its best model, every task so far, the test samples, s_max."""
    results = finished.results
    assert results.tasks == ["next", "task 2", "task 3"] and results.metric == ["mrr@5", "mrr@5", "accuracy"]
    assert [len(row) for row in results.R] == [1, 2, 3]
    for j, row in enumerate(results.R):
        model = load_model(finished.run / "checkpoints" / f"task{j + 1}.safetensors")
        assert model.num_tasks == j + 1 and model.has_relation == (j > 0)
        for i, value in enumerate(row):
            test = task_split(finished.config, data.tasks[i]).test
            metrics = evaluate(model, data.tasks[i], i, test, 50.0, 64)
            assert value == metrics[results.metric[i]]
            assert events(finished.run, "task_end")[j]["test"][str(i + 1)] == metrics
    assert results.bwt == [100 * (results.R[2][i] - results.R[i][i]) / results.R[i][i] for i in range(3)]
    assert results.final["3"] == events(finished.run, "task_end")[2]["test"]["3"]


def test_the_sequence_learns_and_retention_retains(tmp_path: Path) -> None:
    """Chance is 0.08 (MRR@5 of 31 and 30 labels) and 0.25 (4 classes).

    All users are retained: so few of a batch of 32 as rho asks for make the outcome a matter of the seed and of the last bits.
    """
    write_tiny(tmp_path / "data", tasks=3, rows=300)
    longer = {"model__channels": 16, "first__epochs": 6, "first__batch_size": 16, "later__epochs": 6, "sampling": "all"}
    runs = {}
    for alpha in (0.0, 0.7):
        config = tiny_config(
            tmp_path / "data", tmp_path / f"alpha {alpha}", later__alpha=alpha, later__batch_size=32, **longer
        )
        runs[alpha] = train(config)
        learnt = [runs[alpha].R[i][i] for i in range(3)]
        assert learnt[0] > 0.5 and learnt[1] > 0.3 and learnt[2] > 0.5, learnt
    forgot, kept = runs[0.0].bwt[0], runs[0.7].bwt[0]
    assert forgot is not None and kept is not None and forgot < kept - 10


def test_kept_weights_are_of_the_best_validation(data: TaskSequence, finished: Finished) -> None:
    for task in (1, 2, 3):
        valid = [event for event in events(finished.run, "valid") if event["task"] == task]
        scores = [event["metrics"]["hit@1"] for event in valid]
        best = scores.index(max(scores))
        notes = read_notes(finished.run / "checkpoints" / f"task{task}.safetensors")
        assert (notes["task"], notes["epoch"], notes["s_max"]) == (task, best, 50.0)
        assert notes["valid"] == valid[best]["metrics"]
        model = load_model(finished.run / "checkpoints" / f"task{task}.safetensors")
        samples = task_split(finished.config, data.tasks[task - 1]).valid
        assert evaluate(model, data.tasks[task - 1], task - 1, samples, 50.0, 64) == notes["valid"]
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
    model = load_model(finished.run / "checkpoints" / "task3.safetensors")
    masks = model.masks(50.0).detach()
    expected = torch.stack([similarity(masks[:, i, None], masks) for i in range(3)], 1)
    assert torch.tensor(events(finished.run, "task_end")[2]["similarity"]).shape == (4, 3, 3)
    torch.testing.assert_close(torch.tensor(events(finished.run, "task_end")[2]["similarity"]), expected)


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
    begun: list[tuple[FastTCN, FastTCN | None, Any]] = []

    def look(task: Any, host: Any) -> None:
        begun.append((task.model, task.teacher, task.optimizer))
        raise InterruptedError

    shutil.copytree(finished.run, tmp_path / "run")
    state = torch.load(tmp_path / "run" / "checkpoints" / "resume.pt")
    later = ("task.2", "task.3", "data.task2", "data.task3")
    only_first = {name: value for name, value in state["settings"].items() if not name.startswith(later)}
    state |= {"tests": state["tests"][:1], "begun": 1, "settings": only_first}
    torch.save(state, tmp_path / "run" / "checkpoints" / "resume.pt")
    monkeypatch.setattr("teracon_fast.train.run.train_task", look)
    with pytest.raises(InterruptedError):
        train(tiny_config(data.path, tmp_path / "run"))
    [(model, teacher, optimizer)] = begun
    best = weights(finished.run, 1)
    assert teacher is not None and not any(parameter.requires_grad for parameter in teacher.parameters())
    assert teacher.num_tasks == 1 and not teacher.has_relation
    assert all(torch.equal(value, best[name]) for name, value in teacher.state_dict().items())
    own = model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in best.items())
    new = {name for name in own if name not in best}
    assert {name.split(".")[-3] for name in new if "mlp" in name} == {"mlp1", "mlp2"}
    biases = [own[name] for name in new if "mlp" in name and name.endswith("bias")]
    assert len(biases) == 2 * 2 * 2 and all(torch.equal(bias, torch.full((1,), 0.1)) for bias in biases)
    assert not optimizer.state_dict()["state"]
    parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert parameters == {id(parameter) for parameter in model.parameters()}


def test_a_finished_run_is_left_alone(finished: Finished) -> None:
    before = {path: path.read_bytes() for path in finished.run.rglob("*") if path.is_file() and path.name != ".lock"}
    seen = Recorder()
    assert train(finished.config, seen) == finished.results
    after = {path: path.read_bytes() for path in finished.run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert before == after and not seen.steps and any("finished" in text for text in seen.messages)


def test_another_seed_gives_another_run_and_the_same_seed_the_same(
    data: TaskSequence, finished: Finished, tmp_path: Path
) -> None:
    train(tiny_config(data.path, tmp_path / "same"))
    assert_same_run(tmp_path / "same", finished.run, 3)
    train(tiny_config(data.path, tmp_path / "other", seed=1, num_tasks=1))
    assert not torch.equal(
        weights(tmp_path / "other", 1)["embeding.weight"], weights(finished.run, 1)["embeding.weight"]
    )


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


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"first__lr": 0.02}, "task.1.lr: got 0.02, expected 0.01"),
        ({"task__2__alpha": 0.1}, "task.2.alpha: got 0.1, expected 0.7"),
        ({"seed": 4}, "seed: got 4, expected 0"),
        ({"mask": "none"}, "mask: got 'none', expected 'relation'"),
        ({"threads": 2}, "threads: got 2, expected 1"),
        ({"model__channels": 16}, "model.channels: got 16, expected 12"),
        ({"split_by": "user"}, "split_by: got 'user', expected 'sample'"),
    ],
)
def test_settings_that_change_the_arithmetic_are_refused(
    data: TaskSequence, finished: Finished, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError) as error:
        train(tiny_config(data.path, finished.run, **changes))
    lines = str(error.value).splitlines()
    assert str(finished.run) in lines[0] and [line.strip() for line in lines[1:]] == [expected]


def test_settings_that_do_not_are_accepted(data: TaskSequence, finished: Finished, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(finished.run, moved)
    shutil.copytree(data.path, tmp_path / "data")
    free: dict[str, Any] = {"log_every": 7, "checkpoint_every_seconds": 5, "task__4__lr": 0.5, "device": "auto"}
    config = tiny_config(tmp_path / "data", moved, **free)
    assert train(config.model_copy(update={"threads": None})) == finished.results, "no thread count means the run's"


def test_other_data_are_refused(data: TaskSequence, finished: Finished, tmp_path: Path) -> None:
    write_tiny(tmp_path / "smaller", tasks=3, rows=119)
    with pytest.raises(ConfigError, match="data.task1.rows: got 119, expected 120"):
        train(tiny_config(tmp_path / "smaller", finished.run))
    shutil.copytree(data.path, tmp_path / "relabelled")
    labels = tmp_path / "relabelled" / "task3" / "labels.parquet"
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(labels)
    ids = pyarrow.array([f"class {n}" for n in range(len(table))])
    pyarrow.parquet.write_table(table.set_column(table.schema.get_field_index("id"), "id", ids), labels)
    with pytest.raises(
        ConfigError, match=r"labels\.parquet differs from .*, expected the data that the run began with"
    ):
        train(tiny_config(tmp_path / "relabelled", finished.run))


def test_fresh_begins_anew(data: TaskSequence, finished: Finished, tmp_path: Path) -> None:
    shutil.copytree(finished.run, tmp_path / "run")
    (tmp_path / "run" / "own notes.txt").write_text("kept")
    results = train(tiny_config(data.path, tmp_path / "run", seed=3, num_tasks=1), fresh=True)
    assert len(results.R) == 1 and not (tmp_path / "run" / "checkpoints" / "task2.safetensors").exists()
    assert {event["task"] for event in events(tmp_path / "run")} == {1}
    assert (tmp_path / "run" / "own notes.txt").exists()


def test_a_folder_with_other_files_is_refused(data: TaskSequence, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "results.json").write_text("mine")
    with pytest.raises(ConfigError, match="expected a new, empty or run folder"):
        train(tiny_config(data.path, tmp_path / "home"), fresh=True)
    assert (tmp_path / "home" / "results.json").read_text() == "mine"


def test_one_process_at_a_time(data: TaskSequence, tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from teracon_fast.train.folder import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path / "run")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"process {other.pid} is training into this run folder"):
            train(tiny_config(data.path, tmp_path / "run"))
        other.send_signal(signal.SIGKILL)
    with locked(tmp_path / "run"):
        pass


@pytest.mark.parametrize("part", ["valid", "test"])
def test_split_parts_without_samples_are_refused_before_training(
    data: TaskSequence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    import dataclasses

    real = task_split

    def emptied(config: RunConfig, task: Any) -> Any:
        split = real(config, task)
        return dataclasses.replace(split, **{part: np.arange(0)}) if task.name == "task 3" else split

    monkeypatch.setattr("teracon_fast.train.run.task_split", emptied)
    seen = Recorder()
    with pytest.raises(ConfigError, match=rf"task 3 \(task 3\): got no samples in the {part} split"):
        train(tiny_config(data.path, tmp_path / "run"), seen)
    assert not seen.steps


def test_a_diverging_task_stops_and_keeps_the_checkpoint_before(data: TaskSequence, tmp_path: Path) -> None:
    config = tiny_config(data.path, tmp_path / "run", task__2__lr=1e30, checkpoint_every_steps=1)
    with pytest.raises(DivergedError, match="task 2, epoch 0, batch 1"):
        train(config)
    state = torch.load(tmp_path / "run" / "checkpoints" / "resume.pt")
    assert state["begun"] in (1, 2) and len(state["tests"]) == 1


class StopAt(Recorder):
    """Sends this process a signal in the middle of something."""

    def __init__(self, where: Callable[[str, int], bool], signum: int) -> None:
        super().__init__()
        self.where, self.signum = where, signum

    def on_step(self, step: Step) -> None:
        super().on_step(step)
        if self.where("step", len(self.steps)):
            signal.raise_signal(self.signum)

    def on_evaluate(self, task: int, split: str, done: int, total: int) -> None:
        super().on_evaluate(task, split, done, total)
        if self.where(split, len(self.evaluated)):
            signal.raise_signal(self.signum)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("place", "count"), [("step", 5), ("step", 11), ("valid", 2), ("test", 7), ("test", 12)])
def test_signals_save_and_the_run_goes_on_to_the_same_bits(
    data: TaskSequence, finished: Finished, tmp_path: Path, signum: int, place: str, count: int
) -> None:
    config = tiny_config(data.path, tmp_path / "run")
    handler = signal.getsignal(signum)
    stops = StopAt(lambda kind, number: kind == place and number >= count, signum)
    with pytest.raises(RunStopped) as stopped:
        train(config, stops)
    assert stopped.value.signum == signum and "saved, run the same command to go on" in str(stopped.value)
    assert signal.getsignal(signum) == handler, "the handlers of before are back"
    seen = Recorder()
    assert train(config, seen) == finished.results
    assert_same_run(tmp_path / "run", finished.run, 3)
    assert len(stops.steps) + len(seen.steps) == len(finished.seen.steps), "no step was repeated or left out"
    assert any("going on with task" in text for text in seen.messages)


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
    {"mask": "positive_only", "sampling": "minimum"},
    {"mask": "none", "sampling": "all", "student_mask": "current", "parity": "paper"},
    {"split_by": "user", "later__select": "mrr@5"},
])  # fmt: skip
def test_variants_run_from_end_to_end(data: TaskSequence, tmp_path: Path, changes: dict[str, Any]) -> None:
    results = train(tiny_config(data.path, tmp_path / "run", first__epochs=1, later__epochs=1, **changes))
    model = load_model(tmp_path / "run" / "checkpoints" / "task3.safetensors")
    assert model.mask_variant == changes.get("mask", "relation") and model.has_relation == (
        model.mask_variant != "none"
    )
    steps = [event for event in events(tmp_path / "run", "step") if event["task"] == 3 and event["batch"] > 0]
    if changes.get("sampling") == "minimum":
        assert all(len(set(event["rho"])) == 1 and event["rho"][0] < 0.5 for event in steps)
    if changes.get("sampling") == "all":
        assert all(event["rho"] == [1.0, 1.0] for event in steps)
    assert len(results.R) == 3


def test_prepared_data_may_be_opened_while_training(data: TaskSequence, finished: Finished) -> None:
    """The data folder is only read: training leaves it as it was."""
    assert open_dataset(data.path).num_items == data.num_items
    assert sorted(path.name for path in data.path.iterdir()) == sorted(
        ["dataset.json", "items.parquet", "task1", "task2", "task3"]
    )
