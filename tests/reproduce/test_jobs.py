"""Runs as processes: with a script in place of Python, and a few real ones."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from teracon_fast.cli.app import app
from teracon_fast.config import RunConfig, load_config
from teracon_fast.data import TaskSequence
from teracon_fast.errors import ConfigError
from teracon_fast.methods import METHODS, SinMo
from teracon_fast.reproduce import Choices, is_finished, make_plan, read_run, reproduce, run_jobs
from teracon_fast.reproduce.jobs import Event, _dealt
from teracon_fast.train.checkpoint import RunState
from teracon_fast.train.folder import RunStopped
from teracon_fast.train.log import Observer, Step
from teracon_fast.train.run import train

BROKEN = """
from teracon_fast.methods import METHODS, SinMo

class Broken(SinMo):
    name = "broken"

    def loss(self, batch, context):
        raise RuntimeError("this method is broken")

METHODS["broken"] = Broken
"""
# In place of Python: what it does depends on the seed. Its arguments are -m teracon_fast train RUN/.job.toml --no-report.
SCRIPT = """#!/bin/sh
folder=$(dirname "$4")
ls "$folder"/../*/running 2> /dev/null | wc -l > "$folder/others"
touch "$folder/running"
echo "$TERACON_PARENT" > "$folder/parent"
trap 'rm "$folder/running"; echo saved > "$folder/saved"; exit 143' TERM
echo "epoch 1 of $5"
case $(grep "^seed" "$4") in
"seed = 1") printf 'Traceback (most recent call last):\\n  File\\nValueError: too bad\\n'; code=1;;
"seed = 2") printf 'error: got this, expected that:\\n  threads: 2\\n'; code=2;;
"seed = 3") rm "$folder/running"; kill -9 $$;;
"seed = 4") while true; do sleep 0.05; done;;
*) sleep 0.3; code=0;;
esac
rm "$folder/running"
exit $code
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes run SCRIPT."""
    file = tmp_path / "script"
    file.write_text(SCRIPT)
    file.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(file))


def configs(folder: Path, *seeds: int) -> list[RunConfig]:
    return [load_config(overrides={"data": "data", "run": folder / f"seed{seed}", "seed": seed}) for seed in seeds]


def test_a_failure_stops_nothing_and_is_explained(script: None, tmp_path: Path) -> None:
    told: list[tuple[Event, int, str]] = []
    runs = configs(tmp_path, 0, 1, 2, 3, 5, 6)
    failed = run_jobs(runs, 2, lambda event, config, text: told.append((event, config.seed, text)))
    assert failed == runs[1:4]
    assert [text for event, _, text in told if event == "start"] == [f"{number} of 6" for number in range(1, 7)]
    assert ("line", 0, "epoch 1 of --no-report") in told and {seed for event, seed, _ in told if event == "done"} == {0, 5, 6}
    assert {seed: text for event, seed, text in told if event == "failed"} == {
        1: "ValueError: too bad", 2: "got this, expected that: threads: 2", 3: "killed by SIGKILL, see log.txt",
    }  # fmt: skip
    assert (tmp_path / "seed1" / "error.txt").read_text().startswith("Traceback (most recent call last):\n  File\n")
    others = [int((config.run / "others").read_text()) for config in runs]
    assert max(others) == 1, "two at a time"
    assert (tmp_path / "seed0" / "parent").read_text() == f"{os.getpid()}\n"
    assert not (tmp_path / "seed0" / "error.txt").exists()
    with pytest.raises(ConfigError, match="jobs: got 0"):
        run_jobs(runs, 0)


def test_a_signal_is_passed_on_and_awaited(script: None, tmp_path: Path) -> None:
    def stop(event: Event, config: RunConfig, text: str) -> None:
        if event == "line":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(RunStopped) as stopped:
        run_jobs(configs(tmp_path, 4, 5), 1, stop)
    assert stopped.value.signum == signal.SIGINT
    assert (tmp_path / "seed4" / "saved").exists() and not (tmp_path / "seed5").exists()


def test_threads_are_divided_and_gpus_dealt_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    (config,) = configs(tmp_path, 0)

    def dealt(slot: int, **changes: Any) -> tuple[str, int | None]:
        found = _dealt(config.model_copy(update=changes), slot, 2)
        return found.device, found.threads

    assert [dealt(slot, threads=5) for slot in range(3)] == [("cuda:0", 2), ("cuda:1", 2), ("cuda:0", 2)]
    assert dealt(1, device="cpu", threads=1) == ("cpu", 1) and dealt(0, device="cuda:1", threads=2) == ("cuda:1", 1)
    # A run that has begun keeps what it began with.
    (config.run / "checkpoints").mkdir(parents=True)
    RunState.file(config.run).touch()
    (config.run / "config.toml").write_text('data = "d"\nrun = "r"\ndevice = "cuda:1"\nthreads = 3\n')
    assert [dealt(0, device=device) for device in ("auto", "cuda", "cpu")] == [("cuda:1", None)] * 2 + [("cpu", None)]


@pytest.fixture(scope="module")
def table(tiny: TaskSequence, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Output folder and result of a command that trains a broken method and TERACON, two at a time."""
    folder = tmp_path_factory.mktemp("table")
    (folder / "broken.py").write_text(BROKEN, "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "broken", SinMo)  # removed with the fixture
        arguments = ["--data", str(tiny.path), "--output", str(folder), "--quick", "--plugin", str(folder / "broken.py")]
        more = ["--methods", "broken,teracon", "--jobs", "2", "--threads", "2", "--set", "teracon.c=3"]
        return folder, RUNNER.invoke(app, ["reproduce", "table2", *arguments, *more])


RUNNER = CliRunner()


def test_a_broken_method_is_reported(table: Any) -> None:
    folder, result = table
    assert result.exit_code == 1, result.output
    (run,) = (folder / "runs").glob("broken-*")
    assert f"failed: {run}: RuntimeError: this method is broken" in result.stderr
    assert "2 runs: 1 trained, 0 reused, 1 failed" in result.stdout
    assert 'raise RuntimeError("this method is broken")' in (run / "error.txt").read_text("utf-8")
    assert "1 of 2 runs are not finished" in (folder / "table2.md").read_text("utf-8")


def test_a_finished_run_is_that_of_train_and_is_reused(
    table: Any, tiny: TaskSequence, tmp_path: Path, choices: Callable[..., Choices]
) -> None:
    folder, _ = table
    (run,) = (folder / "runs").glob("teracon-*")
    config = load_config(path=run / "config.toml")
    assert config.threads == 1 and config.task_options(2)["c"] == 3.0
    expected = train(config.model_copy(update={"run": tmp_path / "alone"}))
    found = read_run(run)
    assert found is not None and found.R == expected.R and found.epochs == [1, 1, 1]
    assert found.parameters > 9 * sum(task.num_labels for task in tiny.tasks) and found.peak_mib > 50
    # Reused with other threads and another backend, here in a copy of the folder; weights are kept unless asked otherwise.
    shutil.copytree(folder / "runs", tmp_path / "out" / "runs")
    copy = tmp_path / "out" / "runs" / run.name
    wanted = choices(methods=("teracon",), overrides={"teracon.c": 3, "threads": 5, "backend": "torch"})
    done = reproduce("table2", wanted)
    assert done.ran == [] and [config.run for config in done.plan.runs] == [copy]
    assert len(list(copy.glob("checkpoints/task*.safetensors"))) == 3
    reproduce("table2", choices(methods=("teracon",), overrides={"teracon.c": 3}, drop_weights=True))
    assert not list(copy.glob("checkpoints/task*.safetensors")) and is_finished(copy)
    (copy / "metrics.jsonl").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        read_run(copy)
    shutil.move(copy, copy.with_name("teracon-1.2.3-seed0-0123456789"))
    assert not is_finished(copy.with_name("teracon-1.2.3-seed0-0123456789")), "of other settings than the name says"


class Interrupt(Observer):
    """A signal in the third step of task 2."""

    def on_step(self, step: Step) -> None:
        if (step.task, step.batch) == (2, 2):
            os.kill(os.getpid(), signal.SIGTERM)


def test_an_interrupted_run_resumes_or_refuses_by_name(choices: Callable[..., Choices]) -> None:
    wanted = {"later.batch_size": 16, "threads": 1, "device": "cpu"}
    (config,) = make_plan("figure3", choices(methods=("fine_all",), overrides=wanted)).runs
    straight = config.model_copy(update={"run": config.run.with_name("straight")})
    expected = train(straight)
    with pytest.raises(RunStopped):
        train(config, Interrupt())
    assert not is_finished(config.run)
    done = reproduce("figure3", choices(methods=("fine_all",), overrides={**wanted, "backend": "torch"}))
    assert len(done.failed) == 1 and not is_finished(config.run)
    assert "backend: got 'torch', expected" in (config.run / "error.txt").read_text()
    done = reproduce("figure3", choices(methods=("fine_all",), overrides=wanted))
    (result,) = done.found[0].runs
    assert not done.failed and result is not None and result.R == expected.R
    assert [len(result.curves[task]) for task in range(3)] == [1, 1, 1] and result.curves[2] == [result.R[2][2]]
    assert "resuming task 2" in (config.run / "log.txt").read_text() and not (config.run / "error.txt").exists()
    assert done.files[-1].read_bytes().startswith(b"\x89PNG")


def test_a_process_ends_with_the_one_that_started_it(tiny: TaskSequence, tmp_path: Path) -> None:
    settings = tmp_path / "endless.toml"
    settings.write_text("[model]\nchannels = 8\n[first]\nepochs = 1000000\npatience = 1000000\n", "utf-8")
    command = [sys.executable, "-m", "teracon_fast", "reproduce", "table2", "--data", str(tiny.path), "--output", str(tmp_path)]
    with (tmp_path / "output.txt").open("w") as out:
        parent = subprocess.Popen([*command, "--methods", "sinmo", "--config", str(settings)], stdout=out, stderr=out)
    while not any("epoch 1:" in log.read_text() for log in tmp_path.glob("runs/*/log.txt")):
        assert parent.poll() is None, (tmp_path / "output.txt").read_text()
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    (run,) = (tmp_path / "runs").iterdir()
    while not RunState.file(run).is_file():
        time.sleep(0.05)
    state = RunState.load(run)
    assert state is not None and state.training is not None and state.training["state"]["step"] > 0
