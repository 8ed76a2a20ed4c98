"""What may not change between two starts of a run, and what may: by every method, named where it is refused."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_data import write_tiny
from tiny_run import Recorder, StopAt, assert_same_run, events, tiny_config

from teracon_fast.config import RunConfig
from teracon_fast.data import TaskSequence
from teracon_fast.errors import ConfigError
from teracon_fast.methods import METHODS
from teracon_fast.ops import backends
from teracon_fast.train.checkpoint import RunState
from teracon_fast.train.folder import RunStopped, locked
from teracon_fast.train.run import task_split, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TaskSequence:
    return write_tiny(tmp_path_factory.mktemp("data") / "tiny", tasks=3, rows=120)


class Finished:
    """A run of three tasks, trained once for all tests that only look at it."""

    def __init__(self, data: TaskSequence, run: Path) -> None:
        self.config, self.run = tiny_config(data.path, run), run
        self.results = train(self.config)


@pytest.fixture(scope="module")
def finished(data: TaskSequence, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Finished(data, tmp_path_factory.mktemp("runs") / "whole")


def begun_with(run: Path, **exact: Any) -> None:
    """Let a run have begun elsewhere."""
    state = RunState.load(run)
    assert state is not None
    state.fingerprint["exact"].update(exact)
    state.save(run)


def other_settings(config: RunConfig) -> dict[str, dict[str, Any]]:
    """By what it is called: what a task in training does not survive."""
    backend = backends.resolve(config.backend)
    return {
        f"backend: got 'torch', expected {backend!r}": {"backend": "torch"},
        "algorithm: got 'direct', expected 'auto'": {"algorithm": "direct"},
        "threads: got 2, expected 1": {"threads": 2},
    }


@pytest.mark.parametrize("method", METHODS)
def test_within_a_task_arithmetic_stays_and_a_finished_run_is_reused(method: str, data: TaskSequence, tmp_path: Path) -> None:
    config = tiny_config(data.path, tmp_path / "run", method=method, num_tasks=2, first__epochs=1, later__epochs=1)
    with pytest.raises(RunStopped):
        train(config, StopAt(lambda kind, count: kind == "step" and count >= 2))
    others = other_settings(config)
    if backends.resolve("auto") == "torch":
        others.pop(next(iter(others)))
    for message, changes in others.items():
        with pytest.raises(ConfigError) as error:
            train(config.model_copy(update=changes))
        assert [line.strip() for line in str(error.value).splitlines()[1:]] == [message]
    begun_with(tmp_path / "run", device="cuda")
    with pytest.raises(ConfigError, match="device: got 'cpu', expected 'cuda'"):
        train(config.model_copy(update={"device": "cpu"}))
    begun_with(tmp_path / "run", device="cpu")
    results, seen = train(config), Recorder()
    for changes in others.values():
        assert train(config.model_copy(update=changes), seen) == results
    begun_with(tmp_path / "run", device="cuda:7", backend="none of ours")
    assert train(config.model_copy(update={"device": "auto", "backend": "auto"}), seen) == results, "from another machine"
    assert not seen.steps
    begun_with(tmp_path / "run", device="cpu", backend=backends.resolve("auto"))
    train(config.model_copy(update={"num_tasks": 3, "threads": 2}), seen)
    assert seen.steps, "between two tasks they may change"


def test_a_run_resumes_with_what_it_began_with_where_nothing_is_said(data: TaskSequence, tmp_path: Path) -> None:
    config = tiny_config(data.path, tmp_path / "run", num_tasks=1, backend="torch")
    whole = train(config.model_copy(update={"run": tmp_path / "whole"}))
    with pytest.raises(RunStopped):
        train(config, StopAt(lambda kind, count: count >= 5))
    assert train(config.model_copy(update={"backend": "auto", "threads": None})) == whole
    assert_same_run(tmp_path / "run", tmp_path / "whole", 1)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"first__lr": 0.02}, "task.1.lr: got 0.02, expected 0.01"),
        ({"task__2__alpha": 0.1}, "task.2.alpha: got 0.1, expected 0.7"),
        ({"seed": 4}, "seed: got 4, expected 0"),
        ({"teracon__mask": "none"}, "teracon.mask: got 'none', expected 'relation'"),
        ({"method": "hat"}, "method: got 'hat', expected 'teracon'"),
        ({"order": "reversed"}, "data.task2.number: got 3, expected 2"),
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
    assert str(finished.run) in lines[0] and expected in [line.strip() for line in lines[1:]]


def test_settings_that_do_not_are_accepted(data: TaskSequence, finished: Finished, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(finished.run, moved)
    shutil.copytree(data.path, tmp_path / "data")
    free: dict[str, Any] = {"log_every": 7, "checkpoint_every_seconds": 5, "task__4__lr": 0.5, "device": "auto", "threads": 2}
    assert train(tiny_config(tmp_path / "data", moved, **free)) == finished.results


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


def test_fresh_starts_over(data: TaskSequence, finished: Finished, tmp_path: Path) -> None:
    shutil.copytree(finished.run, tmp_path / "run")
    (tmp_path / "run" / "own notes.txt").write_text("kept")
    results = train(tiny_config(data.path, tmp_path / "run", seed=3, num_tasks=1), fresh=True)
    assert len(results.R) == 1 and not (tmp_path / "run" / "checkpoints" / "task2.safetensors").exists()
    assert {event["task"] for event in events(tmp_path / "run")} == {1}
    assert (tmp_path / "run" / "own notes.txt").exists()


def test_nothing_is_deleted_before_settings_and_data_are_known_to_fit(finished: Finished, tmp_path: Path) -> None:
    shutil.copytree(finished.run, tmp_path / "run")
    config = finished.config.model_copy(update={"run": tmp_path / "run", "options": {"teracon": {"mask": "unknown"}}})
    with pytest.raises(ConfigError, match="mask is 'unknown'"):
        train(config, fresh=True)
    assert (tmp_path / "run" / "results.json").exists()


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

    real = task_split

    def emptied(config: RunConfig, task: Any) -> Any:
        split = real(config, task)
        return dataclasses.replace(split, **{part: np.arange(0)}) if task.name == "task 3" else split

    monkeypatch.setattr("teracon_fast.train.run.task_split", emptied)
    seen = Recorder()
    with pytest.raises(ConfigError, match=rf"task 3 \(task 3\): got no samples in the {part} split"):
        train(tiny_config(data.path, tmp_path / "run"), seen)
    assert not seen.steps
