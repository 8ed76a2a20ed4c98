"""Items that a trained run has never seen: buckets through prepare, train, resume, embed, recommend; and evaluation."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet
from tiny_run import StopAt, assert_same_run, tiny_config
from typer.testing import CliRunner

from teracon_fast.cli.app import app
from teracon_fast.data import DatasetWriter, open_dataset
from teracon_fast.data.dictionaries import bucket_number
from teracon_fast.data.user_input import UNSEEN, Inputs
from teracon_fast.errors import ConfigError, DataError
from teracon_fast.infer.measure import measure
from teracon_fast.infer.open import TrainedRun, open_run
from teracon_fast.infer.predictor import embed, recommend
from teracon_fast.train.evaluation import evaluate
from teracon_fast.train.folder import RunStopped
from teracon_fast.train.run import task_split, train

LENGTH, ROWS, BUCKETS = 8, 120, 4
COMMON, RARE = np.arange(201, 221), np.arange(601, 631)
STRANGERS = [901, 902, 555]


def write(folder: Path, **options: Any) -> Path:
    """Twenty common items, thirty that occur once; a click on an item (common or rare); a color."""
    random = np.random.default_rng(0)
    sequences = COMMON[random.integers(0, len(COMMON), (ROWS, LENGTH))]
    sequences[: len(RARE), random.integers(4, LENGTH)] = RARE
    sequences[40:70, -1] = sequences[:30, 2]
    sequences[np.arange(LENGTH) < random.integers(0, 4, ROWS)[:, None]] = 0
    users = np.arange(ROWS)
    with DatasetWriter(folder, "shop", LENGTH, **options) as writer:
        writer.add_task("next", "next_item", sequences, groups=users)
        clicks = np.append(COMMON, RARE[:2])
        writer.add_task("click", "label", sequences, labels=clicks[users % len(clicks)], groups=users)
        writer.add_task("color", "label", sequences, labels=np.array(["red", "blue"])[users % 2], groups=users)
    return folder


def config(home: Path, run: str) -> Any:
    return tiny_config(home / "data", home / run, first__epochs=2)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data with buckets, and run trained on them."""
    home = tmp_path_factory.mktemp("unseen")
    write(home / "data", min_count=2, buckets=BUCKETS)
    train(config(home, "run"))
    return home


@pytest.fixture(scope="module")
def run(home: Path) -> TrainedRun:
    return open_run(home / "run", device="cpu")


def csv(path: Path, rows: list[list[int]]) -> Path:
    path.write_text("\n".join(",".join(map(str, row)) for row in rows) + "\n")
    return path


def bucket(raw: int) -> int:
    return bucket_number(str(raw), BUCKETS)


def test_rare_items_are_trained_as_their_buckets(home: Path, run: TrainedRun) -> None:
    data = open_dataset(home / "data")
    assert run.items.buckets == BUCKETS and data.num_items == 1 + BUCKETS + len(COMMON)
    assert {bucket(raw) for raw in RARE} == set(range(1, BUCKETS + 1))
    sequences = data.tasks[0].sequences
    assert int((sequences > 0).sum() - (sequences > BUCKETS).sum()) == len(RARE)
    first, last = (opened.method.state_dict()["model.embeding.weight"] for opened in (open_run(home / "run", 1, "cpu"), run))
    assert not torch.equal(first[1 : 1 + BUCKETS], last[1 : 1 + BUCKETS])
    assert data.tasks[1].num_labels == len(COMMON) + 2, "labels of later tasks are raw: no buckets"


def test_a_run_with_buckets_resumes_to_the_same_bits(home: Path, tmp_path: Path) -> None:
    stopped = tiny_config(home / "data", tmp_path / "run", first__epochs=2)
    for count in (3, 2):
        with pytest.raises(RunStopped):
            train(stopped, StopAt(lambda kind, number, at=count: kind == "step" and number >= at, signal.SIGTERM))
    train(stopped)
    assert_same_run(tmp_path / "run", home / "run", 3)


MIXED = [[201, 901, 203], [902, 601], [555], [205, 206]]
EXPECTED: dict[str, list[list[Any]]] = {  # as raw ids, 0 the pad, "b" a bucket of the item at that place
    "pad": [[201, 0, 203], [0, 0], [0], [205, 206]],
    "drop": [[201, 203], [], [], [205, 206]],
    "bucket": [[201, "b", 203], ["b", "b"], ["b"], [205, 206]],
}


def indices(unseen: str) -> np.ndarray:
    x = np.zeros((len(MIXED), LENGTH), dtype=np.int64)
    for row, (items, raw) in enumerate(zip(EXPECTED[unseen], MIXED, strict=True)):
        codes = [bucket(raw[at]) if item == "b" else 1 + BUCKETS + item - 201 if item else 0 for at, item in enumerate(items)]
        x[row, LENGTH - len(codes) :] = codes
    return x


@pytest.mark.parametrize("unseen", ["pad", "drop", "bucket"])
def test_every_policy_on_csv_parquet_and_prepared_folders(unseen: Any, run: TrainedRun, tmp_path: Path) -> None:
    import pyarrow as pa

    parquet.write_table(pa.table({"items": [[str(item) for item in row] for row in MIXED]}), tmp_path / "u.parquet")
    padded = np.array([[0] * (3 - len(row)) + row for row in MIXED])
    with DatasetWriter(tmp_path / "other", "other") as writer:
        writer.add_task("next", "next_item", padded)
    expected = run.method.encode(torch.from_numpy(indices(unseen)), 1).numpy()
    for source in (csv(tmp_path / "u.csv", MIXED), tmp_path / "u.parquet", tmp_path / "other"):
        inputs = Inputs(source, run.items, run.length, unseen)
        assert np.concatenate([block.x for block in inputs.blocks(3)]).tolist() == indices(unseen).tolist()
        assert (inputs.unseen_items, inputs.unseen_users) == (4, 3)
        embed(run, Inputs(source, run.items, run.length, unseen), tmp_path / "out.parquet", [2])
        got = np.asarray(parquet.read_table(tmp_path / "out.parquet")["task_2"].to_pylist(), dtype=np.float32)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_a_folder_with_the_same_buckets_keeps_them(run: TrainedRun, home: Path) -> None:
    (block,) = Inputs(home / "data", run.items, run.length).blocks(1000)
    assert np.array_equal(block.x, open_dataset(home / "data").tasks[0].sequences)


def test_error_is_the_default_and_names_the_item(run: TrainedRun, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got item '901', which the run has not seen; --unseen pad, drop or bucket"):
        list(Inputs(csv(tmp_path / "u.csv", MIXED), run.items, run.length).blocks(10))


def test_neither_pad_nor_bucket_is_recommended(run: TrainedRun, home: Path, tmp_path: Path) -> None:
    """Even where their scores are the highest."""
    source, output = csv(tmp_path / "u.csv", MIXED), tmp_path / "out.parquet"
    head = run.method.head(0)
    kept = head.bias.detach().clone()
    try:
        with torch.no_grad():
            head.bias[: 1 + BUCKETS] = 100.0
        for exclude, lengths in ((False, [20] * 4), (True, [18, 20, 20, 18])):
            inputs = Inputs(source, run.items, run.length, "bucket")
            recommend(run, inputs, output, 1, 1 + BUCKETS + len(COMMON), exclude)
            found = parquet.read_table(output)["items"].to_pylist()
            assert [len(row) for row in found] == lengths and {item for row in found for item in row} <= set(map(str, COMMON))
    finally:
        head.bias.data.copy_(kept)
    # Two of the clicked items are rare: they have no index of their own, so nobody is known to have seen them.
    recommend(run, Inputs(source, run.items, run.length, "bucket"), output, 2, 22, exclude_seen=True)
    assert [len(row) for row in parquet.read_table(output)["items"].to_pylist()] == [20, 22, 22, 20]


def test_bucket_needs_buckets(home: Path, tmp_path: Path) -> None:
    write(tmp_path / "data")
    train(tiny_config(tmp_path / "data", tmp_path / "run", num_tasks=1, first__epochs=1))
    run, source = open_run(tmp_path / "run", device="cpu"), csv(tmp_path / "u.csv", MIXED)
    with pytest.raises(ConfigError, match="the run has no buckets; expected error, pad or drop"):
        Inputs(source, run.items, run.length, "bucket")
    with pytest.raises(ConfigError, match="has no buckets"):
        measure(run, home / "data", unseen="bucket")
    assert UNSEEN == ("error", "pad", "drop", "bucket")


@pytest.mark.parametrize("unseen", ["pad", "drop", "bucket"])
def test_evaluation_on_data_with_strangers(unseen: Any, run: TrainedRun, home: Path, tmp_path: Path) -> None:
    """Against the same rows written by hand with the indices of the run."""
    random = np.random.default_rng(5)
    sequences = np.concatenate([COMMON, RARE[:5], STRANGERS])[random.integers(0, 28, (60, LENGTH))]
    colors = np.array(["blue", "green", "red"])[np.arange(60) % 3]
    with DatasetWriter(tmp_path / "other", "other") as writer:
        writer.add_task("next", "next_item", sequences)
        writer.add_task("click", "label", sequences, labels=np.where(np.arange(60) % 2, 201, 601 + np.arange(60) % 4))
        writer.add_task("color", "label", sequences, labels=colors)
    said: list[str] = []
    found = measure(run, tmp_path / "other", "train", unseen=unseen, say=said.append)
    data = open_dataset(tmp_path / "other")
    for number, words in enumerate(said, 1):
        task = data.tasks[number - 1]
        chosen = task.samples[task_split(run.config, task).train]
        rows = sequences[chosen[:, 0]]
        raw = task.label_ids()[chosen[:, 1]]
        known = np.isin(rows, COMMON)
        index = np.where(known, rows - 201 + 1 + BUCKETS, 0)
        if unseen == "bucket":
            index = np.where(known, index, np.vectorize(bucket)(rows))
        if unseen == "drop":
            index = np.array([np.append(np.zeros(LENGTH - real.sum(), int), row[real])
                              for row, real in zip(index, known, strict=True)])  # fmt: skip
        if number == 1:
            target = np.where(known[:, -1] | (unseen == "bucket"), index[:, -1], -1)
        else:
            ids = run.tasks[number - 1].labels.ids.tolist()
            target = np.array([ids.index(label) if label in ids else -1 for label in raw])
        kept = target >= 0
        assert 0 < kept.sum() < len(kept) or (number, unseen) == (1, "bucket")
        own = open_dataset(home / "data").tasks[number - 1]
        samples = np.stack([np.arange(kept.sum()), target[kept]], 1).astype(np.int32)
        by_hand = replace(own, sequences=index[kept].astype(np.int32), samples=samples)
        metrics = evaluate(run.method, by_hand, number - 1, np.arange(int(kept.sum())))
        assert found[number] == pytest.approx(metrics, rel=1e-6)
        places = (~np.isin(sequences[np.unique(chosen[kept, 0])], COMMON)).sum()
        assert words == f"T{number} {task.name}: {places:,} unseen items, {(~kept).sum():,} samples left out because of " \
            "their labels"  # fmt: skip
    assert len(said) == 3
    with pytest.raises(ConfigError, match="--unseen pad, drop or bucket reads others by raw id"):
        measure(run, tmp_path / "other")


def test_evaluation_of_the_runs_own_data_is_the_same_by_raw_id(run: TrainedRun, home: Path) -> None:
    said: list[str] = []
    final = json.loads((home / "run" / "results.json").read_text())["final"]
    found = measure(run, unseen="bucket", say=said.append)
    assert {str(number): metrics for number, metrics in found.items()} == final and not said


def test_from_the_command_line(home: Path, tmp_path: Path) -> None:
    source, output = csv(tmp_path / "u.csv", MIXED), tmp_path / "out.parquet"
    words = {"pad": "became the pad", "drop": "were dropped", "bucket": "became buckets"}
    for unseen, fate in words.items():
        for command in (["embed"], ["recommend", "-k", "3"], ["predict", "--task", "3"]):
            arguments = [*command, str(home / "run"), "-i", str(source), "-o", str(output), "--unseen", unseen]
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, result.output
            assert f"4 items unknown to the run, of 3 users, {fate}" in result.stdout
    result = CliRunner().invoke(app, ["embed", str(home / "run"), "-i", str(source), "-o", str(output)])
    assert result.exit_code == 2 and "item '901'" in result.stderr
    log = tmp_path / "log.csv"
    steps = [(user, step, item) for user in range(30) for step, item in enumerate([201, 202 + user % 4, 203])]
    rows = [f"{user},{item},{step},{'ab'[user % 2]}" for user, step, item in steps]
    log.write_text("\n".join(["user,item,time,color", *rows, "0,777,9,a", "1,778,9,b"]) + "\n")
    data = ["prepare", "events", str(log), "-o", str(tmp_path / "d"), "--extend", str(home / "run"), "--min-count", "2"]
    result = CliRunner().invoke(app, [*data, "--labels", "color"])
    assert result.exit_code == 0 and "2 rare items share the buckets" in result.stdout, result.output
    assert open_dataset(tmp_path / "d").num_items == open_dataset(home / "data").num_items
