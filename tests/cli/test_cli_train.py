"""`teracon train`: flags become configuration, a run is trained, resumed, refused and started over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_run import arguments, write_dataset
from typer.testing import CliRunner

from teracon_fast import config as configuration
from teracon_fast.cli.app import app
from teracon_fast.cli.train import flag, seeds_of
from teracon_fast.config import SHARED, RunConfig, flags
from teracon_fast.methods import METHODS, options_of

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
    """Each is given another value than its default, and arrives as if it were given by its TOML name."""
    values = {"int": "7", "float": "0.25", "Path": "elsewhere", "list": "1,2,3"}
    special = {
        "order": "reversed", "device": "cpu", "backend": "torch", "method": "hat", "conure.pruning": "0.5",
        "first.pruning": "[0.5, 0.25]", "later.pruning": "0.125", "teracon.task_embedding_range": "[0, 1]",
        "parameter_masks.task_embedding_range": "[0.5, 1]",
    }  # fmt: skip
    given, wanted = [], {}
    for option in flags():
        kind = getattr(option.type, "__name__", "list")
        if option.name == "plugins":
            continue  # see below
        if kind == "bool":
            wanted[option.name] = not option.default
            given.append(flag(f"no_{option.name}" if option.default else option.name))
        else:
            other = next((choice for choice in option.choices if choice != option.default), None)
            value = special.get(option.name) or other or values[kind]
            wanted[option.name] = [1, 2, 3] if kind == "list" else value
            given += [flag(option.name), value]
    read, plain = configured(tmp_path, *given), configuration.load_config(overrides={"data": "d", "run": "r"})
    assert read == configuration.load_config(overrides=wanted)
    same = {name for name, value in read.model_dump().items() if value == plain.model_dump()[name]}
    assert same == {"plugins", "task"}
    assert {name: set(table) for name, table in read.options.items()} == {
        name: set(options_of(kind)) for name, kind in METHODS.items() if options_of(kind)
    }


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("seed = 3\n[later]\nlr = 0.25\nalpha = 0.5\n[[task]]\nnumber = 4\nalpha = 0.25\n")

    def alphas(read: RunConfig, *numbers: int) -> list[float]:
        return [read.task_options(number)["alpha"] for number in numbers]

    read = configured(tmp_path, str(file), "--preset", "ml", "--seed", "9")
    assert (read.seed, read.later.lr) == (9, 0.25) and alphas(read, 2, 3, 4) == [0.5, 0.9, 0.25]
    read = configured(tmp_path, str(file), "--preset", "ml", "--alpha", "0.1", "--task", "4.alpha=0.2")
    assert alphas(read, 1, 2, 3, 4) == [0.1, 0.1, 0.1, 0.2]
    read = configured(tmp_path, "--preset", "ml", "--lr", "0.3", "--later-lr", "0.4", "--task", "2.lr=1e-4")
    assert [read.for_task(number).lr for number in (1, 2, 3, 4)] == [0.3, 1e-4, 0.4, 0.4]
    read = configured(tmp_path, "--teracon-alpha", "0.1", "--set", "teracon.alpha=0.6", "--set", "hat.weight=2")
    assert alphas(read, 2) == [0.6] and read.options["hat"] == {"weight": 2.0}


def test_a_plugin_and_its_options(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from teracon_fast.methods import METHODS, SinMo\n\n\nclass Mine(SinMo):\n    name = 'mine'\n\n"
        "    def __init__(self, sizes, width: int = 3):\n        super().__init__(sizes)\n        self.width = width\n\n\n"
        "METHODS['mine'] = Mine\n"
    )
    data, run = write_dataset(tmp_path / "data"), tmp_path / "run"
    plugin = ["--plugin", str(tmp_path / "mine.py"), "--method", "mine", "--num-tasks", "2", "--epochs", "1"]
    try:
        done = RUNNER.invoke(app, arguments(data, run, *plugin, "--set", "mine.width=8"))
        assert done.exit_code == 0, done.output
        other = RUNNER.invoke(app, arguments(data, run, *plugin))
        assert other.exit_code == 2 and "mine.width: got 3, expected 8" in other.stderr
        wrong = RUNNER.invoke(app, arguments(data, run, *plugin, "--set", "mine.width=wide"))
        assert wrong.exit_code == 2 and "mine.width: got 'wide', expected an integer" in wrong.stderr
    finally:
        METHODS.pop("mine", None)


@pytest.mark.parametrize(("text", "seeds"), [("0", (0,)), ("0,1,2", (0, 1, 2)), ("7, 3", (7, 3))])
def test_seeds(text: str, seeds: tuple[int, ...]) -> None:
    assert seeds_of(text) == seeds


@pytest.mark.parametrize("text", ["", "1,1", "a", "1,,2", "-1", "1.5"])
def test_other_seeds_are_refused(text: str) -> None:
    result = RUNNER.invoke(app, ["train", *PLACES, "--seeds", text])
    assert result.exit_code == 2 and f"--seeds: got {text!r}, expected different numbers" in result.stderr


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
        (["--task", "2.speed=1"], "task 2.speed: unknown key"),
        (["--set", "speed"], "--set: got 'speed', expected NAME=VALUE"),
        (["--set", "hat.speed=1"], "hat.speed: unknown key"),
        (["--method", "hatt"], "method: got 'hatt', expected one of"),
        (["--hat-protection", "weak"], "hat.protection: got 'weak', expected one of 'strict', 'as_published'"),
        (["--plugin", "nowhere.py"], "nowhere.py, expected a Python file"),
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


def test_train_resume_refuse_and_start_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert stopped.exit_code == 130 and "saved; the same command resumes" in stopped.stderr
    assert not (run / "results.json").exists()
    # The same command resumes.
    resumed = RUNNER.invoke(app, arguments(data, run))
    assert resumed.exit_code == 0, resumed.output
    assert "T1 of 3" not in resumed.stdout and "T2 of 3: click" in resumed.stdout and "resuming at" in resumed.stdout
    assert "BWT (%)" in resumed.stdout and "\x1b" not in resumed.stdout
    result = json.loads((run / "results.json").read_text())
    assert result["tasks"] == ["next", "click", "age"]
    # Other settings are refused, unless the run starts over.
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
