"""Inference on a trained run: what is written equals what the model gives, whatever the form of the input."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from tiny_run import ITEMS, LENGTH, train_tiny

from teracon_fast import Request
from teracon_fast.data import open_dataset
from teracon_fast.data.user_input import Inputs
from teracon_fast.errors import ConfigError, DataError, TeraconError
from teracon_fast.infer import predictor
from teracon_fast.infer.measure import measure
from teracon_fast.infer.open import TrainedRun, open_run
from teracon_fast.infer.predictor import embed, predict, recommend
from teracon_fast.methods import Teracon
from teracon_fast.model.checkpoints import read_tensors


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return train_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def run(folders: tuple[Path, Path]) -> TrainedRun:
    return open_run(folders[1], device="cpu")


def inputs_of(run: TrainedRun, path: Path, **options: Any) -> Inputs:
    return Inputs(path, run.items, run.length, **options)


def hidden_of(run: TrainedRun, rows: list[list[int]], task: int) -> torch.Tensor:
    """Representations of raw sequences, encoded one by one without the code under test."""
    x = torch.zeros(len(rows), LENGTH, dtype=torch.int64)
    for row, items in enumerate(rows):
        recent = items[-LENGTH:]
        if recent:
            x[row, LENGTH - len(recent) :] = torch.tensor([item - 100 if item else 0 for item in recent])
    assert isinstance(run.method, Teracon)
    with torch.no_grad():
        return torch.cat([run.method.model.encode(one[None], [Request(task - 1)], 50.0)[0] for one in x])


ROWS = [[101, 102, 103], [140, 120, 0, 130], list(range(101, 125)), [0, 0, 105], [117]]


def write_csv(path: Path, rows: list[list[int]], tail: str = "") -> Path:
    path.write_text("\n".join(",".join(map(str, row)) + tail for row in rows) + "\n")
    return path


def test_dictionary_is_the_expected_one(run: TrainedRun) -> None:
    assert run.items.ids.tolist() == ["0", *map(str, ITEMS)]
    assert [task.name for task in run.tasks] == ["next", "click", "age"] and run.order == (1, 2, 3)


def test_embed_csv_pads_truncates_and_equals_the_model(run: TrainedRun, tmp_path: Path) -> None:
    source, output = write_csv(tmp_path / "users.csv", ROWS), tmp_path / "out.parquet"
    seen: list[int] = []
    assert embed(run, inputs_of(run, source), output, [1, 3], batch_size=2, progress=seen.append) == 5
    assert seen == [2, 4, 5]
    table = parquet.read_table(output)
    assert table.column_names == ["line", "task_1", "task_3"]
    assert table["line"].to_pylist() == [1, 2, 3, 4, 5]
    assert table.schema.field("task_3").type == pa.list_(pa.float32(), 8)
    for task in (1, 3):
        got = np.asarray(table[f"task_{task}"].to_pylist(), dtype=np.float32)
        np.testing.assert_allclose(got, hidden_of(run, ROWS, task), rtol=1e-5, atol=1e-6)
    assert not np.allclose(got, np.asarray(table["task_1"].to_pylist()))


def _csv_with_labels(folder: Path) -> tuple[Path, dict[str, Any]]:
    return write_csv(folder / "users.txt", ROWS, tail=",,7,8"), {}


def _parquet_integers(folder: Path) -> tuple[Path, dict[str, Any]]:
    table = pa.table({"user_id": [f"u{i}" for i in range(5)], "items": pa.array(ROWS, pa.list_(pa.int64()))})
    parquet.write_table(table, folder / "users.parquet", row_group_size=2)
    return folder / "users.parquet", {}


def _parquet_strings(folder: Path) -> tuple[Path, dict[str, Any]]:
    rows = pa.array([[str(item) for item in row] for row in ROWS], pa.large_list(pa.string()))
    parquet.write_table(pa.table({"who": [5, 4, 3, 2, 1], "past": rows}), folder / "users.parquet")
    return folder / "users.parquet", {"user_column": "who", "items_column": "past"}


@pytest.mark.parametrize(
    ("write", "keys"),
    [
        (_csv_with_labels, [1, 2, 3, 4, 5]),
        (_parquet_integers, ["u0", "u1", "u2", "u3", "u4"]),
        (_parquet_strings, [5, 4, 3, 2, 1]),
    ],
)
def test_every_form_of_input_gives_the_same(
    write: Callable[[Path], tuple[Path, dict[str, Any]]], keys: list[Any], run: TrainedRun, tmp_path: Path
) -> None:
    path, options = write(tmp_path)
    inputs = inputs_of(run, path, **options)
    assert inputs.total() == 5
    embed(run, inputs, tmp_path / "out.parquet", [2], batch_size=2)
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table.column(0).to_pylist() == keys
    got = np.asarray(table["task_2"].to_pylist(), dtype=np.float32)
    np.testing.assert_allclose(got, hidden_of(run, ROWS, 2), rtol=1e-5, atol=1e-6)


def test_prepared_folder_is_mapped_by_raw_id(folders: tuple[Path, Path], run: TrainedRun, tmp_path: Path) -> None:
    from teracon_fast.data import DatasetWriter

    # Another data set numbers the same raw items otherwise: it has fewer of them.
    rows = np.asarray([[0, 110, 120], [140, 110, 130]])
    with DatasetWriter(tmp_path / "other", name="other", length=3) as writer:
        writer.add_task("next", "next_item", rows, groups=np.asarray([70, 71]))
    embed(run, inputs_of(run, tmp_path / "other"), tmp_path / "out.parquet", [2])
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table["row"].to_pylist() == [0, 1] and table["group"].to_pylist() == [70, 71]
    got = np.asarray(table["task_2"].to_pylist(), dtype=np.float32)
    np.testing.assert_allclose(got, hidden_of(run, rows.tolist(), 2), rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="got task 2; expected 1 to 1"):
        inputs_of(run, tmp_path / "other", task=2)
    with DatasetWriter(tmp_path / "strange", name="other", length=3) as writer:
        writer.add_task("next", "next_item", np.asarray([[0, 110, 120], [140, 555, 130]]))
    with pytest.raises(DataError, match=r"strange:1: got item '555'"):
        list(inputs_of(run, tmp_path / "strange").blocks(10))


@pytest.mark.parametrize("kind", [pa.list_(pa.int32(), 2), pa.list_(pa.uint16()), pa.large_list(pa.large_string())])
def test_list_types_of_parquet(kind: Any, run: TrainedRun, tmp_path: Path) -> None:
    text = pa.types.is_large_list(kind)
    rows = [[str(item) if text else item for item in row] for row in ([101, 102], [103, 104], [105, 106])]
    parquet.write_table(pa.table({"items": pa.array(rows, kind)}), tmp_path / "u.parquet")
    blocks = list(inputs_of(run, tmp_path / "u.parquet").blocks(2))
    assert [block.x[:, -2:].tolist() for block in blocks] == [[[1, 2], [3, 4]], [[5, 6]]]
    assert not any(block.x[:, :-2].any() for block in blocks)


def test_users_without_items_are_all_pads(run: TrainedRun, tmp_path: Path) -> None:
    parquet.write_table(pa.table({"items": pa.array([[], []], pa.list_(pa.int64()))}), tmp_path / "u.parquet")
    embed(run, inputs_of(run, tmp_path / "u.parquet"), tmp_path / "out.parquet", [1])
    got = np.asarray(parquet.read_table(tmp_path / "out.parquet")["task_1"].to_pylist(), dtype=np.float32)
    np.testing.assert_allclose(got, hidden_of(run, [[], []], 1), rtol=1e-5, atol=1e-6)


def brute_force(run: TrainedRun, rows: list[list[int]], task: int, k: int, exclude_seen: bool) -> list[list[str]]:
    """Best labels by sorting all scores in Python."""
    head, ids = run.method.head(task - 1), run.tasks[task - 1].labels.ids
    with torch.no_grad():
        scores = head(hidden_of(run, rows, task))
    best = []
    for row, items in zip(scores, rows, strict=True):
        banned = {"0"} | ({str(item) for item in items[-LENGTH:]} if exclude_seen else set())
        order = sorted(range(len(ids)), key=lambda label: -float(row[label]))
        best.append([ids[label] for label in order if ids[label] not in banned][:k])
    return best


@pytest.mark.parametrize("task", [1, 2])
@pytest.mark.parametrize("exclude_seen", [False, True])
def test_recommend_equals_sorting_all_scores(task: int, exclude_seen: bool, run: TrainedRun, tmp_path: Path) -> None:
    source, output = write_csv(tmp_path / "users.csv", ROWS), tmp_path / "out.parquet"
    recommend(run, inputs_of(run, source), output, task, 6, exclude_seen, batch_size=3)
    table = parquet.read_table(output)
    assert table["items"].to_pylist() == brute_force(run, ROWS, task, 6, exclude_seen)
    scores = table["scores"].to_pylist()
    assert all(row == sorted(row, reverse=True) for row in scores)
    recommend(run, inputs_of(run, source), tmp_path / "long.parquet", task, 6, exclude_seen, long=True, batch_size=3)
    long = parquet.read_table(tmp_path / "long.parquet")
    assert long.column_names == ["line", "rank", "item", "score"]
    assert long["item"].to_pylist() == [item for row in table["items"].to_pylist() for item in row]
    assert long["score"].to_pylist() == [score for row in scores for score in row]
    assert long["line"].to_pylist() == [line for line in range(1, 6) for _ in range(6)]
    assert long["rank"].to_pylist() == list(range(1, 7)) * 5


def test_recommend_gives_fewer_when_fewer_are_left(run: TrainedRun, tmp_path: Path) -> None:
    source, output = write_csv(tmp_path / "users.csv", ROWS), tmp_path / "out.parquet"
    recommend(run, inputs_of(run, source), output, 1, 41, exclude_seen=True)
    lengths = [len(row) for row in parquet.read_table(output)["items"].to_pylist()]
    assert lengths == [37, 37, 28, 39, 39]
    assert parquet.read_table(output)["items"].to_pylist() == brute_force(run, ROWS, 1, 41, True)


def test_predict_gives_probabilities(run: TrainedRun, tmp_path: Path) -> None:
    source, output = write_csv(tmp_path / "users.csv", ROWS), tmp_path / "out.parquet"
    predict(run, inputs_of(run, source), output, 3, batch_size=2)
    table = parquet.read_table(output)
    assert table.column_names == ["line", "label", "probability", "p_mid", "p_old", "p_young"]
    with torch.no_grad():
        expected = torch.softmax(run.method.head(2)(hidden_of(run, ROWS, 3)), 1).numpy()
    got = np.stack([table[name].to_numpy() for name in table.column_names[3:]], axis=1)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert table["label"].to_pylist() == [["mid", "old", "young"][best] for best in expected.argmax(1)]
    np.testing.assert_allclose(table["probability"].to_numpy(), expected.max(1), rtol=1e-5)


def test_blocks_are_gathered_into_row_groups(run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = write_csv(tmp_path / "users.csv", ROWS * 4), tmp_path / "out.parquet"
    embed(run, inputs_of(run, source), output, [2], batch_size=2)
    whole = parquet.read_table(output)
    assert parquet.ParquetFile(output).num_row_groups == 1
    monkeypatch.setattr(predictor, "ROW_GROUP_BYTES", 4 * (8 + 4 * 8))  # four users: a key and eight numbers each
    embed(run, inputs_of(run, source), output, [2], batch_size=2)
    file = parquet.ParquetFile(output)
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [4] * 5
    assert file.read().equals(whole)


def test_an_interrupted_output_leaves_no_file_and_no_thread(run: TrainedRun, tmp_path: Path) -> None:
    source, output, before = write_csv(tmp_path / "users.csv", ROWS * 4), tmp_path / "out.parquet", threading.active_count()

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    writers = [partial(embed, tasks=[3]), partial(recommend, task=3, k=2), partial(predict, task=3)]
    for write in writers:
        with pytest.raises(KeyboardInterrupt):
            write(run, inputs_of(run, source), output, batch_size=2, progress=stop)
        assert threading.active_count() == before and not output.exists()
    data = inputs_of(run, source)
    with closing(predictor.encode_blocks(run, data, [3], batch_size=2)) as blocks:
        next(blocks)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_unseen_items(run: TrainedRun, tmp_path: Path) -> None:
    source, output = write_csv(tmp_path / "users.csv", [[101], [102, 999, 103], [998, 104]]), tmp_path / "out.parquet"
    with pytest.raises(DataError, match=r"users.csv:2: got item '999', which the run has not seen"):
        embed(run, inputs_of(run, source), output, [1])
    assert list(tmp_path.iterdir()) == [source]  # nothing half-written
    for unseen, rows in (("pad", [[101], [102, 0, 103], [0, 104]]), ("drop", [[101], [102, 103], [104]])):
        embed(run, inputs_of(run, source, unseen=unseen), output, [1])
        got = np.asarray(parquet.read_table(output)["task_1"].to_pylist(), dtype=np.float32)
        np.testing.assert_allclose(got, hidden_of(run, rows, 1), rtol=1e-5, atol=1e-6)
    # Only the most recent items count: an unseen one that is cut off is no error, in either form.
    old = [999, *range(101, 101 + LENGTH)]
    embed(run, inputs_of(run, write_csv(source, [old])), output, [1])
    parquet.write_table(pa.table({"items": pa.array([[101], old], pa.list_(pa.int32()))}), tmp_path / "u.parquet")
    embed(run, inputs_of(run, tmp_path / "u.parquet"), output, [1])
    parquet.write_table(pa.table({"items": [[101], [102, 103], [104, 997]]}), tmp_path / "u.parquet")
    with pytest.raises(DataError, match=r"u.parquet:2: got item '997'"):
        embed(run, inputs_of(run, tmp_path / "u.parquet"), output, [1], batch_size=2)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"thing": [[1]]}, "got columns thing; expected item lists"),
        ({"items": [1]}, "column 'items': got int64; expected lists"),
        ({"items": [[1.5]]}, "got ids of type double; expected integers or strings"),
        ({"items": [[101], None]}, r"u.parquet:1: column 'items': got null"),
        ({"items": [[101], [102, None]]}, r"u.parquet:1: column 'items': got a null item"),
    ],
)
def test_bad_parquet_is_refused(columns: dict[str, Any], reason: str, run: TrainedRun, tmp_path: Path) -> None:
    parquet.write_table(pa.table(columns), tmp_path / "u.parquet")
    with pytest.raises(DataError, match=reason):
        list(inputs_of(run, tmp_path / "u.parquet").blocks(10))


def test_bad_requests_are_refused(run: TrainedRun, tmp_path: Path) -> None:
    source, output = write_csv(tmp_path / "users.csv", ROWS), tmp_path / "out.parquet"
    inputs = inputs_of(run, source)
    with pytest.raises(ConfigError, match=r"got task '4', expected one of 1 \(next\), 2 \(click\), 3 \(age\)"):
        embed(run, inputs, output, [1, 4])
    with pytest.raises(ConfigError, match="top-k: got 42, expected 1 to 41"):
        recommend(run, inputs, output, 1, 42)
    with pytest.raises(ConfigError, match=r"labels of task 3 \(age\) are not items"):
        recommend(run, inputs, output, 3, 2, exclude_seen=True)
    with pytest.raises(ConfigError, match=r"expected a name ending in \.parquet"):
        embed(run, inputs, tmp_path / "out.csv", [1])
    with pytest.raises(ConfigError, match="--unseen: got 'ignore'"):
        inputs_of(run, source, unseen="ignore")
    with pytest.raises(ConfigError, match="expected a .csv, .txt or .parquet file"):
        inputs_of(run, write_csv(tmp_path / "users.json", ROWS))
    with pytest.raises(DataError, match="no such file"):
        inputs_of(run, tmp_path / "nothing.csv")
    with pytest.raises(DataError, match="no column 'who'"):
        parquet.write_table(pa.table({"items": [[101]]}), tmp_path / "u.parquet")
        inputs_of(run, tmp_path / "u.parquet", user_column="who")
    with pytest.raises(TeraconError, match="'score' has the name of an output column"):
        parquet.write_table(pa.table({"score": [1], "items": [[101]]}), tmp_path / "u.parquet")
        recommend(run, inputs_of(run, tmp_path / "u.parquet", user_column="score"), output, 1, long=True)
    assert not output.exists()


def test_predict_refuses_many_labels(run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor, "MAX_PREDICTED", 2)
    with pytest.raises(ConfigError, match=r"task 3 \(age\) has 3 labels, expected at most 2"):
        predict(run, inputs_of(run, write_csv(tmp_path / "u.csv", ROWS)), tmp_path / "out.parquet", 3)


def test_metrics_are_those_of_training(folders: tuple[Path, Path], run: TrainedRun, tmp_path: Path) -> None:
    import json

    final = json.loads((folders[1] / "results.json").read_text())["final"]
    assert {str(number): metrics for number, metrics in measure(run).items()} == final
    first = open_run(folders[1], after=1, device="cpu")
    assert [str(task) for task in first.tasks] == ["task 1 (next)"] and first.method.task == 0
    found = measure(first, data=folders[0])
    assert found[1]["mrr@5"] == json.loads((folders[1] / "results.json").read_text())["R"][0][0]
    with pytest.raises(ConfigError, match="split: got 'all'"):
        measure(run, split="all")


def test_other_data_are_refused(folders: tuple[Path, Path], run: TrainedRun, tmp_path: Path) -> None:
    import shutil

    import tiny_run

    with pytest.raises(ConfigError, match=r"labels of task 3 \(age\) are not those"):
        measure(run, tiny_run.write_dataset(tmp_path / "other", ages=("a", "b", "c")))
    short = tmp_path / "run"
    shutil.copytree(folders[1], short)
    (short / "task2" / "labels.parquet").unlink()
    with pytest.raises(DataError, match=r"task2/labels\.parquet"):
        open_run(short)


def test_unfinished_task_is_not_used(folders: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(folders[1], run)
    (run / "checkpoints" / "task3.safetensors").unlink()
    assert open_run(run).method.task == 1
    for after in (3, "age", "x"):
        with pytest.raises(ConfigError, match=rf"got task '{after}', expected one of 1 \(next\), 2 \(click\)$"):
            open_run(run, after=after)
    for task in (1, 2):
        (run / "checkpoints" / f"task{task}.safetensors").unlink()
    with pytest.raises(ConfigError, match="no task is finished yet"):
        open_run(run)
    with pytest.raises(ConfigError, match=r"no config\.toml"):
        open_run(tmp_path)


def test_tasks_are_named_or_counted(folders: tuple[Path, Path], run: TrainedRun, tmp_path: Path) -> None:
    assert [run.task(which).number for which in (1, "2", "age", " click ")] == [1, 2, 3, 2]
    assert [task.name for task in open_run(folders[1], after="click", device="cpu").tasks] == ["next", "click"]
    for wrong in (0, 4, -1, "", "Age"):
        with pytest.raises(ConfigError, match="expected one of 1"):
            run.task(wrong)
    source = write_csv(tmp_path / "users.csv", ROWS)
    for name, tasks in (("a", [2, 3]), ("b", ["click", "age"])):
        embed(run, inputs_of(run, source), tmp_path / f"{name}.parquet", tasks)
    assert parquet.read_table(tmp_path / "a.parquet").equals(parquet.read_table(tmp_path / "b.parquet"))
    with pytest.raises(ConfigError, match=r"got task 3 \(age\) twice"):
        embed(run, inputs_of(run, source), tmp_path / "c.parquet", ["age", 1, 3])


def test_encoders_are_made_once_for_all_blocks(run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[int]] = []
    encoders = run.method.encoders

    def counted(tasks: Any) -> Any:
        made.append(list(tasks))
        return encoders(tasks)

    monkeypatch.setattr(run.method, "encoders", counted)
    monkeypatch.setattr(run.method, "encoder", None)
    source = write_csv(tmp_path / "users.csv", ROWS)
    embed(run, inputs_of(run, source), tmp_path / "out.parquet", ["age", "next"], batch_size=1)
    predict(run, inputs_of(run, source), tmp_path / "out.parquet", "age", batch_size=2)
    measure(run, batch_size=10)
    assert made == [[2, 0], [2], [0, 1, 2]]


def test_weights_are_the_checkpoint(folders: tuple[Path, Path], run: TrainedRun) -> None:
    expected = read_tensors(folders[1] / "checkpoints" / "task3.safetensors")
    state = run.method.state_dict()
    assert expected and all(torch.equal(state[name], value) for name, value in expected.items())
    assert not run.method.training and not any(parameter.requires_grad for parameter in run.method.parameters())
    assert open_dataset(folders[0]).num_items == len(run.items)


def test_backend_is_the_runs_unless_another_is_asked_for(folders: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(folders[1], run)
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace('backend = "auto"', 'backend = "torch"'))
    assert open_run(run, device="cpu").method.sizes.backend == "torch"
    assert open_run(run, device="cpu", backend="auto").method.sizes.backend == "auto"
