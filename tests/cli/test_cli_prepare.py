"""`teracon prepare`: the preparers' own options as flags."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from teracon_fast.cli.app import app
from teracon_fast.data import open_dataset
from teracon_fast.data.prepare import PREPARERS

RUNNER = CliRunner()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.csv"
    rows = [
        f"{user},{10 + (user * 3 + step) % 7},{step},{'fm'[user % 2]}" for user in range(1, 21) for step in range(9)
    ]
    path.write_text("\n".join(["person,item,time,gender", *rows]) + "\n")
    return path


def test_events_become_a_data_set(log: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    arguments = [
        "prepare",
        "events",
        str(log),
        "-o",
        str(output),
        "--user",
        "person",
        "--labels",
        "gender",
        "--length",
        "6",
    ]
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "2 tasks, 20 users" in result.stdout
    dataset = open_dataset(output)
    assert dataset.length == 6 and [task.kind for task in dataset.tasks] == ["next_item", "label"]
    assert dataset.tasks[1].label_ids().tolist() == ["f", "m"]
    again = RUNNER.invoke(app, arguments)
    assert again.exit_code == 2 and str(output) in again.stderr
    assert RUNNER.invoke(app, [*arguments, "--overwrite"]).exit_code == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--user", "nobody"], "nobody"),
        (["--windows", "sideways"], "--windows: got 'sideways'; expected one of last, several"),
        (["--length", "long"], "Invalid value for '--length'"),
    ],
)
def test_bad_options_are_named(more: list[str], message: str, log: Path, tmp_path: Path) -> None:
    given = ["prepare", "events", str(log), "-o", str(tmp_path / "data"), "--user", "person", *more]
    result = RUNNER.invoke(app, given)
    assert result.exit_code == 2 and message in result.stderr
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", list(PREPARERS))
def test_help_shows_every_option(name: str) -> None:
    text = RUNNER.invoke(app, ["prepare", name, "--help"], env={"COLUMNS": "200"}).output
    for option in PREPARERS[name].options:
        assert f"--{option.name.replace('_', '-')} " in text


def test_unknown_preparer() -> None:
    result = RUNNER.invoke(app, ["prepare", "netflix", "-o", "x"])
    assert result.exit_code == 2 and "netflix" in result.stderr
