"""`teracon train`: flags become configuration, a run is trained, resumed, refused and begun anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_run import arguments, write_dataset
from typer.testing import CliRunner

from teracon_fast import config as configuration
from teracon_fast.cli.app import app
from teracon_fast.cli.train import flag
from teracon_fast.config import SHARED, RunConfig

RUNNER = CliRunner()
PLACES = ["--data", "d", "--run", "r"]


def configured(tmp_path: Path, *more: str) -> RunConfig:
    """The configuration that `teracon train` would use, by way of its --dry-run."""
    result = RUNNER.invoke(app, ["train", *PLACES, *more, "--dry-run"])
    assert result.exit_code == 0, result.output
    path = tmp_path / "printed.toml"
    path.write_text(result.stdout)
    return configuration.load_config(path=path)


def test_every_configuration_value_is_a_flag(tmp_path: Path) -> None:
    values = {"int": "7", "float": "0.25", "str": "", "Path": "elsewhere", "list": "1,2,3", "bool": ""}
    given = []
    for option in configuration.options():
        name = getattr(option.type, "__name__", "list")
        if name == "bool":
            on = option.name == "tensorboard"  # what is on by default is switched off
            given.append(flag(f"no_{option.name}" if on else option.name))
        elif option.name == "backend":
            given += [flag(option.name), "torch"]
        elif option.name in ("first.s_max", "later.s_max"):
            given += [flag(option.name), "30"]
        else:
            given += [flag(option.name), option.choices[-1] if option.choices else values[name] or "cpu"]
    read = configured(tmp_path, *given)
    default = configuration.load_config(overrides={"data": "d", "run": "r"})
    for option in configuration.options():
        got: object = read
        was: object = default
        for part in option.name.split("."):
            got, was = getattr(got, part), getattr(was, part)
        assert got != was or option.choices == (was,), option.name
    assert read.model.dilations == (1, 2, 3) and read.first.s_max == 30 and read.data == Path("elsewhere")


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("seed = 3\n[later]\nlr = 0.25\nalpha = 0.5\n[[task]]\nnumber = 4\nalpha = 0.25\n")
    read = configured(tmp_path, str(file), "--preset", "ml", "--seed", "9")
    assert (read.seed, read.later.lr, read.later.alpha) == (9, 0.25, 0.5)
    assert (read.for_task(3).alpha, read.for_task(4).alpha) == (0.9, 0.25)
    read = configured(tmp_path, str(file), "--preset", "ml", "--alpha", "0.1", "--task", "4.alpha=0.2")
    assert [read.for_task(number).alpha for number in (1, 2, 3, 4)] == [0.1, 0.1, 0.1, 0.2]
    read = configured(tmp_path, "--preset", "ml", "--lr", "0.3", "--later-lr", "0.4", "--task", "2.lr=1e-4")
    assert [read.for_task(number).lr for number in (1, 2, 3, 4)] == [0.3, 1e-4, 0.4, 0.4]


def test_shared_flags_are_the_task_settings() -> None:
    text = RUNNER.invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).output
    for name in SHARED:
        assert (
            f" {flag(name)} " in text and f" {flag('first.' + name)} " in text and f" {flag('later.' + name)} " in text
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--task", "2lr"], "--task: got '2lr', expected NUMBER.NAME=VALUE"),
        (["--task", "2.speed=1"], "unknown key"),
        (["--dilations", "1,x"], "dilations"),
        (["--channels", "0"], "model.channels: got 0"),
        (["--preset", "mine"], "preset: got 'mine', expected one of ttl, ml, naver, demo"),
        (["nowhere.toml"], "nowhere.toml: cannot read the configuration"),
    ],
)
def test_bad_values_are_named(given: list[str], message: str) -> None:
    result = RUNNER.invoke(app, ["train", *PLACES, *given])
    assert result.exit_code == 2, result.output
    assert message in result.stderr and "Traceback" not in result.stderr


def test_wrong_type_is_a_usage_error() -> None:
    result = RUNNER.invoke(app, ["train", *PLACES, "--lr", "fast"])
    assert result.exit_code == 2 and "Invalid value for '--lr'" in result.stderr


def test_train_resume_refuse_and_begin_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, run = write_dataset(tmp_path / "data"), tmp_path / "run"
    # Ctrl-C in the middle of task 2.
    import os
    import signal

    from teracon_fast.cli.progress import ConsoleObserver
    from teracon_fast.train.log import Step

    def interrupt(self: ConsoleObserver, step: Step) -> None:
        if step.task == 2 and step.batch == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(ConsoleObserver, "on_step", interrupt)
        stopped = RUNNER.invoke(app, arguments(data, run))
    assert stopped.exit_code == 130 and "run the same command to go on" in stopped.stderr
    assert not (run / "results.json").exists()
    # The same command goes on.
    resumed = RUNNER.invoke(app, arguments(data, run))
    assert resumed.exit_code == 0, resumed.output
    assert "T1 of 3" not in resumed.stdout and "T2 of 3: click" in resumed.stdout and "resuming at" in resumed.stdout
    assert "BWT (%)" in resumed.stdout and "\x1b" not in resumed.stdout
    result = json.loads((run / "results.json").read_text())
    assert result["tasks"] == ["next", "click", "age"]
    # Other settings are refused, unless the run is begun anew.
    other = RUNNER.invoke(app, arguments(data, run, "--channels", "4"))
    assert other.exit_code == 2 and "model.channels: got 4, expected 8" in other.stderr
    assert json.loads((run / "results.json").read_text()) == result
    anew = RUNNER.invoke(app, arguments(data, run, "--channels", "4", "--fresh", "--num-tasks", "1"))
    assert anew.exit_code == 0 and json.loads((run / "results.json").read_text())["tasks"] == ["next"]


def test_pictures_at_the_end(tmp_path: Path) -> None:
    data, run = write_dataset(tmp_path / "data"), tmp_path / "run"
    result = RUNNER.invoke(app, arguments(data, run, "--num-tasks", "1", "--report"))
    assert result.exit_code == 0, result.output
    assert (run / "report" / "report.md").is_file() and (run / "report" / "r_matrix.png").is_file()
