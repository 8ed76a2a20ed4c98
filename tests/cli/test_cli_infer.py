"""`teracon evaluate`, `recommend`, `predict` and `embed` from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from pyarrow import parquet
from tiny_run import train_tiny
from typer.testing import CliRunner

from teracon_fast.cli.app import app

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    data, run = train_tiny(tmp_path_factory.mktemp("tiny"))
    (data.parent / "users.csv").write_text("101,102,103\n140,120,130\n")
    return str(data), str(run)


def users(folders: tuple[str, str]) -> str:
    return str(Path(folders[0]).parent / "users.csv")


def invoke(*arguments: str) -> str:
    result = RUNNER.invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


def test_evaluate_prints_every_metric(folders: tuple[str, str]) -> None:
    text = invoke("evaluate", folders[1], "--device", "cpu")
    assert "test metrics after task 3" in text and "T3 age" in text and "ndcg@20" in text and "accuracy" in text
    first = invoke("evaluate", folders[1], "--after", "1", "--split", "valid")
    assert "valid metrics after task 1" in first and "T2" not in first


def test_recommend(folders: tuple[str, str], tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    text = invoke("recommend", folders[1], "-i", users(folders), "-o", str(output), "--task", "2", "-k", "3")
    assert f"wrote {output}: 2 users" in text
    assert [len(items) for items in parquet.read_table(output)["items"].to_pylist()] == [3, 3]
    invoke(
        "recommend", folders[1], "-i", users(folders), "-o", str(output), "-k", "41", "--long", "--exclude-seen"
    )  # fmt: skip
    table = parquet.read_table(output).to_pylist()
    assert {row["item"] for row in table if row["line"] == 1}.isdisjoint({"0", "101", "102", "103"})
    assert sum(row["line"] == 1 for row in table) == 37


def test_predict(folders: tuple[str, str], tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    invoke("predict", folders[1], "-i", folders[0], "-o", str(output), "--task", "3", "--input-task", "2")
    table = parquet.read_table(output)
    assert table.num_rows == 120 and set(table["label"].to_pylist()) <= {"old", "young", "mid"}


def test_embed_one_some_and_all_tasks(folders: tuple[str, str], tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    for task, columns in (("2", ["task_2"]), ("1,3", ["task_1", "task_3"]), ("all", ["task_1", "task_2", "task_3"])):
        invoke("embed", folders[1], "-i", users(folders), "-o", str(output), "--task", task, "--batch-size", "1")
        assert parquet.read_table(output).column_names == ["line", *columns]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embed", "--task", "x"], "--task: got 'x', expected all, or task numbers"),
        (["embed", "--task", "1,1"], "--task: got '1,1'"),
        (["embed", "--task", "7"], "task: got 7, expected 1 to 3"),
        (["predict", "--task", "9"], "task: got 9, expected 1 to 3"),
        (["recommend", "-k", "99"], "top-k: got 99, expected 1 to 41"),
        (["recommend", "--unseen", "hide"], "--unseen: got 'hide'; expected one of error, pad, drop"),
        (["recommend", "--after", "5"], "got task 5, expected 1 to 3"),
        (["recommend", "--backend", "warp"], "warp"),
        (["recommend", "--device", "tpu"], "device: got 'tpu'"),
    ],
)
def test_bad_requests(arguments: list[str], message: str, folders: tuple[str, str], tmp_path: Path) -> None:
    command, *options = arguments
    output = tmp_path / "out.parquet"
    result = RUNNER.invoke(app, [command, folders[1], "-i", users(folders), "-o", str(output), *options])
    assert result.exit_code == 2, result.output
    assert message in result.stderr and result.stderr.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_unseen_item_is_named_with_its_line(folders: tuple[str, str], tmp_path: Path) -> None:
    source = tmp_path / "users.csv"
    source.write_text("101\n102,555\n")
    arguments = ["embed", folders[1], "-i", str(source), "-o", str(tmp_path / "out.parquet")]
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == 2 and f"{source}:2: got item '555'" in result.stderr
    assert invoke(*arguments, "--unseen", "drop").startswith("wrote ")
