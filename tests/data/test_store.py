"""The prepared folder: what is written, what unseen and repeated values become, and what is refused when it is opened."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from teracon_fast.data import Block, DatasetWriter, Dictionary, fetch, open_dataset, read_sequences_csv
from teracon_fast.data.dictionaries import bucket_number
from teracon_fast.errors import ConfigError, DataError

WATCH = np.array([[0, 0, 40, 7], [0, 7, 7, 300], [12, 40, 7, 12]])


def write(path: Path, sequences=WATCH, **options) -> Path:
    with DatasetWriter(path, "small", **options) as writer:
        writer.add_task("watch", "next_item", sequences, groups=np.arange(len(sequences)) + 100)
        writer.add_task("age", "label", WATCH, labels=np.array(["old", "young", "old"]))
        writer.add_task("like", "label", WATCH[1:], labels=(np.array([1, 0, 1]), np.array([90, 5, 90])))
    return path


def test_layout_on_disk(tmp_path: Path) -> None:
    path = write(tmp_path / "data", source={"from": "test"})
    about = json.loads((path / "dataset.json").read_text())
    assert about["format_version"] == 1 and about["name"] == "small" and about["source"] == {"from": "test"}
    assert about["length"] == 4 and about["num_items"] == 5
    expected = [("watch", "next_item", 3, 3, 5), ("age", "label", 3, 3, 2), ("like", "label", 2, 3, 2)]
    keys = ("name", "kind", "num_rows", "num_samples", "num_labels")
    assert [tuple(task[key] for key in keys) for task in about["tasks"]] == expected
    first = path / "task1"
    for name, dtype, values in [
        ("sequences", np.int32, [[0, 0, 3, 1], [0, 1, 1, 4], [2, 3, 1, 2]]),
        ("lengths", np.int32, [2, 3, 4]),
        ("groups", np.int64, [100, 101, 102]),
        ("samples", np.int32, [[0, 1], [1, 4], [2, 2]]),
    ]:
        array = np.load(first / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        assert array.dtype == dtype and array.flags.c_contiguous and array.tolist() == values
    assert Dictionary.load(path / "items.parquet").ids.tolist() == ["0", "7", "12", "40", "300"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["data"]


def test_open_dataset(tmp_path: Path) -> None:
    data = open_dataset(write(tmp_path / "data"))
    assert (data.name, data.length, data.num_items, data.path) == ("small", 4, 5, tmp_path / "data")
    assert data.item_ids().tolist() == ["0", "7", "12", "40", "300"]
    watch, age, like = data.tasks
    assert isinstance(watch.sequences, np.memmap) and not watch.sequences.flags.writeable
    assert watch.label_ids().tolist() == data.item_ids().tolist()
    assert age.label_ids().tolist() == ["old", "young"] and age.samples.tolist() == [[0, 0], [1, 1], [2, 0]]
    assert age.groups.tolist() == [0, 1, 2]
    assert like.label_ids().tolist() == ["5", "90"] and like.samples.tolist() == [[0, 0], [1, 1], [1, 1]]
    assert like.num_labels == 2 and like.kind == "label"
    x, y = fetch(like, np.array([2, 0]))
    assert x.tolist() == [[2, 3, 1, 2], [0, 1, 1, 4]] and y.tolist() == [1, 0]


rows_of_ids = st.integers(1, 5).flatmap(
    lambda width: st.lists(
        st.lists(st.sampled_from([0, 0, 3, 5, 10**17]), min_size=width, max_size=width), min_size=1, max_size=9
    )
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=rows_of_ids, cut=st.integers(1, 4), number=st.integers(0, 2**60))
def test_raw_ids_come_back_and_chunks_do_not_matter(tmp_path: Path, rows, cut: int, number: int) -> None:
    whole = np.array(rows)
    chunks = (whole[i : i + cut] for i in range(0, len(whole), cut))
    path = tmp_path / f"data{number}"
    with DatasetWriter(path, "x", overwrite=True) as writer:
        writer.add_task("a", "next_item", whole)
        writer.add_task("b", "label", chunks, labels=np.arange(len(whole))[::-1])
    data = open_dataset(path)
    first, second = data.tasks
    np.testing.assert_array_equal(data.item_ids()[first.sequences], whole.astype(str))
    np.testing.assert_array_equal(first.sequences, second.sequences)
    np.testing.assert_array_equal(first.lengths, second.lengths)
    assert first.lengths.tolist() == [expected_length(row) for row in rows]
    np.testing.assert_array_equal(first.samples[:, 1], first.sequences[:, -1])
    np.testing.assert_array_equal(second.label_ids()[second.samples[:, 1]], np.arange(len(whole))[::-1].astype(str))


def expected_length(row: list[int]) -> int:
    while row and row[0] == 0:
        row = row[1:]
    return len(row)


def test_pad_has_index_0_even_when_it_never_occurs(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "data", "x") as writer:
        writer.add_task("a", "next_item", np.array([[5, 6], [6, 5]]))
    data = open_dataset(tmp_path / "data")
    assert data.num_items == 3 and data.tasks[0].sequences.tolist() == [[1, 2], [2, 1]]


def test_zero_is_an_ordinary_label(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "data", "x") as writer:
        writer.add_task("a", "next_item", WATCH)
        writer.add_task("b", "label", WATCH, labels=np.array([3, 0, 10]))
    task = open_dataset(tmp_path / "data").tasks[1]
    assert task.label_ids().tolist() == ["0", "3", "10"] and task.samples[:, 1].tolist() == [1, 0, 2]


def test_items_may_be_strings(tmp_path: Path) -> None:
    words = np.array([["0", "b", "a"], ["a", "a", "b"]], dtype=object)
    with DatasetWriter(tmp_path / "data", "x") as writer:
        writer.add_task("a", "next_item", words)
        writer.add_task("b", "label", words.astype(str), labels=np.array([1, 2]))
    data = open_dataset(tmp_path / "data")
    assert data.item_ids().tolist() == ["0", "a", "b"]
    assert data.tasks[1].sequences.tolist() == [[0, 2, 1], [1, 1, 2]] and data.tasks[1].lengths.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("unseen", "expected", "lengths"),
    [("pad", [[1, 0, 0, 2], [0, 0, 0, 0]], [4, 0]), ("drop", [[0, 0, 1, 2], [0, 0, 0, 0]], [2, 0])],
)
def test_unseen_items(tmp_path: Path, unseen, expected, lengths) -> None:
    later = np.array([[7, 99, 98, 12], [99, 99, 99, 99]])
    with DatasetWriter(tmp_path / "data", "x") as writer:
        writer.add_task("a", "next_item", np.array([[0, 0, 7, 12]]))
        meta = writer.add_task("b", "label", later, labels=np.array([1, 1]), unseen=unseen)
    task = open_dataset(tmp_path / "data").tasks[1]
    assert task.sequences.tolist() == expected and task.lengths.tolist() == lengths
    assert any(note.startswith("6 items that task 1 does not have") for note in meta.notes)


def test_unseen_items_are_refused_with_file_line_and_id(tmp_path: Path) -> None:
    csv = tmp_path / "later.csv"
    csv.write_text("7,12,,1\n" * 5 + "7,99,,1\n7,98,,1\n")
    for block_bytes in (8, 1 << 20):
        with pytest.raises(DataError) as caught, DatasetWriter(tmp_path / "data", "x") as writer:
            writer.add_task("a", "next_item", np.array([[7, 12]]))
            writer.add_task("b", "label", read_sequences_csv(csv, True, block_bytes=block_bytes))
        assert (caught.value.path, caught.value.line) == (csv, 6) and "'99'" in caught.value.reason
        assert [entry.name for entry in tmp_path.iterdir()] == ["later.csv"]


def test_a_given_dictionary_holds_task_1_too(tmp_path: Path) -> None:
    items = Dictionary(["0", "12", "7", "9"])
    with DatasetWriter(tmp_path / "data", "x", items=items) as writer:
        writer.add_task("a", "next_item", np.array([[0, 7], [7, 12]]))
    data = open_dataset(tmp_path / "data")
    assert data.tasks[0].sequences.tolist() == [[0, 2], [2, 1]] and data.num_items == 4
    assert data.tasks[0].samples.tolist() == [[0, 2], [1, 1]]
    with (
        pytest.raises(DataError, match="'40', which task 1 does not have"),
        DatasetWriter(tmp_path / "other", "x", items=items) as writer,
    ):
        writer.add_task("a", "next_item", WATCH)


def test_repeated_labels(tmp_path: Path) -> None:
    labels = (np.array([0, 0, 0, 1, 2]), np.array([8, 6, 8, 8, 6]))
    expected = {"keep": [[0, 1], [0, 0], [0, 1], [1, 1], [2, 0]], "drop": [[0, 1], [0, 0], [1, 1], [2, 0]]}
    for duplicates, samples in expected.items():
        with DatasetWriter(tmp_path / duplicates, "x") as writer:
            writer.add_task("a", "next_item", WATCH)
            meta = writer.add_task("b", "label", WATCH, labels=labels, duplicates=duplicates)  # type: ignore[arg-type]
        assert open_dataset(tmp_path / duplicates).tasks[1].samples.tolist() == samples
        assert meta.notes[-1].startswith("1 labels given twice to a row")
    csv = tmp_path / "b.csv"
    csv.write_text("7,,1,2\n7,,3,4,3\n")
    with (
        pytest.raises(DataError, match="got label '3' twice") as caught,
        DatasetWriter(tmp_path / "e", "x") as writer,
    ):
        writer.add_task("a", "next_item", np.array([[7]]))
        writer.add_task("b", "label", read_sequences_csv(csv, True), duplicates="error")
    assert caught.value.path == csv and caught.value.line == 2


def test_oddities_are_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = np.array([[0, 0, 0], [0, 5, 0], [5, 0, 5], [0, 0, 5]])
    with caplog.at_level(logging.WARNING, "teracon_fast.data"), DatasetWriter(tmp_path / "data", "x") as writer:
        writer.add_task("a", "next_item", rows)
    notes = open_dataset(tmp_path / "data").tasks[0].notes
    assert [note.split(" rows ")[0] for note in notes] == ["1", "2", "1"]
    assert "only pads" in notes[0] and "after their first item" in notes[1] and "end with the pad" in notes[2]
    assert all(note in caplog.text for note in notes)
    assert open_dataset(tmp_path / "data").tasks[0].lengths.tolist() == [0, 2, 3, 1]


def refused(tmp_path: Path, reason: str, add) -> None:
    with pytest.raises(DataError, match=reason), DatasetWriter(tmp_path / "data", "x") as writer:
        add(writer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("reason", "arguments", "options"),
    [
        ("expected 'next_item' for task 1", ("b", "next_item", WATCH), {}),
        ("got two tasks named", ("a", "label", WATCH), {"labels": np.zeros(3, int)}),
        ("no labels", ("b", "label", WATCH), {}),
        ("no labels", ("b", "label", WATCH), {"labels": (np.zeros(0, int), np.zeros(0, int))}),
        ("got label rows 0 to 3", ("b", "label", WATCH), {"labels": np.zeros(4, int)}),
        ("got label rows -1", ("b", "label", WATCH), {"labels": (np.array([-1]), np.array([1]))}),
        ("1-D arrays of equal length", ("b", "label", WATCH), {"labels": (np.array([0]), np.array([1, 2]))}),
        ("labels: got ids of dtype float64", ("b", "label", WATCH), {"labels": np.zeros(3)}),
        ("items: got ids of dtype float64", ("b", "label", WATCH * 1.0), {"labels": np.zeros(3, int)}),
        ("rows of 3 items; expected 4", ("b", "label", WATCH[:, 1:]), {"labels": np.zeros(3, int)}),
        (r"shape \(12,\)", ("b", "label", WATCH.ravel()), {"labels": np.zeros(12, int)}),
        ("got no rows", ("b", "label", WATCH[:0]), {"labels": np.zeros(0, int)}),
        ("2 groups for more rows", ("b", "label", WATCH), {"labels": np.zeros(3, int), "groups": np.arange(2)}),
        ("4 groups for 3 rows", ("b", "label", WATCH), {"labels": np.zeros(3, int), "groups": np.arange(4)}),
        ("groups float64", ("b", "label", WATCH), {"labels": np.zeros(3, int), "groups": np.zeros(3)}),
        ("unseen items: got 'x'", ("b", "label", WATCH), {"labels": np.zeros(3, int), "unseen": "x"}),
        ("duplicate labels: got 'x'", ("b", "label", WATCH), {"labels": np.zeros(3, int), "duplicates": "x"}),
        ("a row of the block for each label", ("b", "label", [Block(WATCH, np.array([3]), np.array([1]))]), {}),
    ],
)
def test_wrong_tasks_are_refused_and_leave_nothing(tmp_path: Path, reason: str, arguments, options) -> None:
    def add(writer: DatasetWriter) -> None:
        writer.add_task("a", "next_item", WATCH)
        writer.add_task(*arguments, **options)

    refused(tmp_path, reason, add)


def test_wrong_first_tasks_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    refused(tmp_path, "got no tasks", lambda writer: None)
    refused(tmp_path, "expected 'next_item' for task 1", lambda writer: writer.add_task("a", "label", WATCH))
    refused(
        tmp_path, "got labels; expected none", lambda writer: writer.add_task("a", "next_item", WATCH, labels=np.zeros(3, int))
    )
    with pytest.raises(DataError, match="length 0"):
        DatasetWriter(tmp_path / "data", "x", 0)


def test_an_existing_folder_is_replaced_only_when_asked_and_only_by_a_whole_one(tmp_path: Path) -> None:
    path = write(tmp_path / "data")
    with pytest.raises(DataError, match="already exists"):
        DatasetWriter(path, "other")
    with pytest.raises(RuntimeError, match="boom"), DatasetWriter(path, "other", overwrite=True) as writer:
        writer.add_task("a", "next_item", WATCH)
        raise RuntimeError("boom")
    assert open_dataset(path).name == "small"
    with DatasetWriter(path, "other", overwrite=True) as writer:
        writer.add_task("a", "next_item", WATCH)
    assert open_dataset(path).name == "other" and [entry.name for entry in tmp_path.iterdir()] == ["data"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with pytest.raises(DataError, match="not a prepared data set"):
        DatasetWriter(foreign, "x", overwrite=True)


def test_a_killed_writer_leaves_no_data_set(tmp_path: Path) -> None:
    path = tmp_path / "data"
    program = (
        "import os, signal, sys, numpy as np\n"
        "from teracon_fast.data import DatasetWriter\n"
        "with DatasetWriter(sys.argv[1], 'x') as writer:\n"
        "    writer.add_task('a', 'next_item', np.array([[1, 2]]))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", program, str(path)], env=environment, cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL and not path.exists()
    assert open_dataset(write(path)).name == "small"


def change_json(path: Path, **changes) -> None:
    about = json.loads((path / "dataset.json").read_text())
    (path / "dataset.json").write_text(json.dumps({**about, **changes}))


def change_task(path: Path, number: int, **changes) -> None:
    tasks = json.loads((path / "dataset.json").read_text())["tasks"]
    tasks[number - 1].update(changes)
    change_json(path, tasks=tasks)


def edit(file: Path, change) -> None:
    array = np.load(file)
    change(array)
    np.save(file, array)


def put(index, value):
    def change(array) -> None:
        array[index] = value

    return change


BROKEN = {
    "no dataset.json": (lambda p: (p / "dataset.json").unlink(), "not a prepared data set"),
    "not JSON": (lambda p: (p / "dataset.json").write_text("{"), "not JSON"),
    "JSON of something else": (lambda p: (p / "dataset.json").write_text("[1]"), "format_version None"),
    "later version": (lambda p: change_json(p, format_version=2), "got format_version 2; expected 1"),
    "length is text": (lambda p: change_json(p, length="4"), "length = '4'"),
    "no items": (lambda p: change_json(p, num_items=0), "num_items = 0; expected a positive int"),
    "no tasks": (lambda p: change_json(p, tasks=[]), "no tasks"),
    "task is no object": (lambda p: change_json(p, tasks=[1]), "name = None"),
    "task kind": (lambda p: change_task(p, 1, kind="label"), "task 1: got kind 'label'"),
    "missing array": (lambda p: (p / "task2/samples.npy").unlink(), "samples.npy.*missing"),
    "missing task": (lambda p: os.rename(p / "task3", p / "task4"), "task3"),
    "truncated array": (lambda p: os.truncate(p / "task1/sequences.npy", 150), "sequences.npy.*truncated"),
    "empty array file": (lambda p: os.truncate(p / "task1/sequences.npy", 0), "sequences.npy.*truncated"),
    "bytes after the array": (
        lambda p: (p / "task1/lengths.npy").open("ab").write(b"x"),
        "got 141 bytes; expected 140",
    ),
    "an archive": (lambda p: np.savez((p / "task1/lengths.npy").open("wb"), a=[1]), "archive"),
    "pickled objects": (lambda p: np.save(p / "task1/lengths.npy", np.array([None]), allow_pickle=True), "lengths.npy"),
    "another dtype": (lambda p: np.save(p / "task1/lengths.npy", np.zeros(3)), r"got float64 \(3,\); expected int32"),
    "another shape": (lambda p: np.save(p / "task1/lengths.npy", np.zeros(4, "i4")), r"got int32 \(4,\); expected"),
    "Fortran order": (lambda p: np.save(p / "task1/sequences.npy", np.zeros((3, 4), "i4", "F")), "Fortran order"),
    "item too large": (
        lambda p: edit(p / "task1/sequences.npy", put((1, 2), 5)),
        "sequences.npy:1: got item 5; expected 0 to 4",
    ),
    "negative item": (lambda p: edit(p / "task2/sequences.npy", put((2, 1), -7)), "sequences.npy:2: got item -7"),
    "label too large": (
        lambda p: edit(p / "task2/samples.npy", put((2, 1), 2)),
        "samples.npy:2: got label 2; expected 0 to 1",
    ),
    "row too large": (
        lambda p: edit(p / "task3/samples.npy", put((0, 0), 2)),
        "samples.npy:0: got row 2; expected 0 to 1",
    ),
    "wrong length": (lambda p: edit(p / "task1/lengths.npy", put(1, 2)), "lengths.npy:1: got length 2; the row has 3"),
    "label is not the last item": (
        lambda p: edit(p / "task1/samples.npy", put((2, 1), 1)),
        "samples.npy:2: got a label other than",
    ),
    "rows out of order": (lambda p: edit(p / "task1/samples.npy", put((2, 0), 1)), "one per row, in order"),
    "items of another set": (lambda p: Dictionary(["0"]).save(p / "items.parquet"), "got 1 ids; expected 5"),
    "labels of another set": (lambda p: Dictionary(["0"]).save(p / "task2/labels.parquet"), "got 1 ids; expected 2"),
    "truncated dictionary": (lambda p: os.truncate(p / "items.parquet", 20), "items.parquet.*truncated"),
    "no dictionary": (lambda p: (p / "task2/labels.parquet").unlink(), "labels.parquet.*missing"),
    "task 1 without all items": (lambda p: change_task(p, 1, num_labels=4), "expected 5, one per item"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "data")
    damage, reason = BROKEN[name]
    damage(path)
    with pytest.raises(DataError, match=reason):
        open_dataset(path)


def test_values_are_not_read_when_validation_is_off(tmp_path: Path) -> None:
    path = write(tmp_path / "data")
    edit(path / "task1/sequences.npy", put((1, 2), 5))
    assert open_dataset(path, validate=False).tasks[0].sequences[1, 2] == 5
    with pytest.raises(DataError, match="not a prepared data set"):
        open_dataset(tmp_path / "absent", validate=False)


def test_values_are_checked_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from teracon_fast.data import layout

    path = tmp_path / "data"
    with DatasetWriter(path, "x") as writer:
        meta = writer.add_task("a", "next_item", np.tile(WATCH, (7, 1)))
    layout.check_values(path / "task1", meta, 4, 5, values_per_block=12)
    edit(path / "task1/sequences.npy", put((19, 0), 5))
    with pytest.raises(DataError, match="sequences.npy:19: got item 5"):
        layout.check_values(path / "task1", meta, 4, 5, values_per_block=12)


def test_extend_keeps_items_and_labels_by_the_name_of_their_task(tmp_path: Path) -> None:
    write(tmp_path / "old")
    with DatasetWriter(tmp_path / "new", "small", extend=tmp_path / "old") as writer:
        writer.add_task("watch", "next_item", np.array([[0, 5, 40, 9], [7, 7, 301, 40]]))
        writer.add_task("like", "label", np.array([[0, 12, 300, 9]]), labels=np.array([7]))
        writer.add_task("age", "label", np.array([[5, 12, 7, 9]] * 2), labels=np.array(["middle", "young"]))
    data = open_dataset(tmp_path / "new")
    assert data.item_ids().tolist() == ["0", "7", "12", "40", "300", "5", "9", "301"]
    watch, like, age = data.tasks
    assert watch.sequences.tolist() == [[0, 5, 3, 6], [1, 1, 7, 3]] and watch.samples.tolist() == [[0, 6], [1, 3]]
    assert like.label_ids().tolist() == ["5", "90", "7"] and like.samples.tolist() == [[0, 2]]
    assert like.sequences.tolist() == [[0, 2, 4, 6]], "items that only the old data have are known"
    assert age.label_ids().tolist() == ["old", "young", "middle"] and age.samples.tolist() == [[0, 2], [1, 1]]
    assert data.num_items == watch.num_labels == 8 and data.source == {"extends": str(tmp_path / "old")}
    with DatasetWriter(tmp_path / "old", "small", extend=tmp_path / "old", overwrite=True) as writer:
        writer.add_task("watch", "next_item", np.array([[6]]))
    assert open_dataset(tmp_path / "old").item_ids().tolist() == ["0", "7", "12", "40", "300", "6"], "in place, too"
    with pytest.raises(DataError, match="not a prepared data set"):
        DatasetWriter(tmp_path / "other", "small", extend=tmp_path)


def test_buckets_in_a_data_set(tmp_path: Path) -> None:
    later = np.array([[7, 99, 0, 300]])
    with DatasetWriter(tmp_path / "data", "small", min_count=2, buckets=2) as writer:
        first = writer.add_task("watch", "next_item", WATCH)
        second = writer.add_task("age", "label", later, labels=np.array(["old"]))
    data = open_dataset(tmp_path / "data")
    rare, stranger = bucket_number("300", 2), bucket_number("99", 2)
    assert data.item_ids().tolist() == ["0", "<bucket 1 of 2>", "<bucket 2 of 2>", "7", "12", "40"]
    assert data.tasks[0].sequences.tolist() == [[0, 0, 5, 3], [0, 3, 3, rare], [4, 5, 3, 4]]
    assert data.tasks[0].samples[:, 1].tolist() == [3, rare, 4]
    assert data.tasks[1].sequences.tolist() == [[3, stranger, 0, rare]]
    assert first.notes == ["1 rare items share the buckets (1 occurrences)"]
    assert any("2 items without an index of their own" in note for note in second.notes)
    with DatasetWriter(tmp_path / "more", "small", extend=tmp_path / "data", min_count=2) as writer:
        writer.add_task("watch", "next_item", np.array([[300, 300, 8, 7]]))
    more = open_dataset(tmp_path / "more")
    assert more.item_ids().tolist() == [*data.item_ids(), "300"], "no longer rare"
    assert more.tasks[0].sequences.tolist() == [[6, 6, bucket_number("8", 2), 3]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_count": 2}, "--min-count 2 without --buckets"),
        ({"buckets": 2}, "--buckets 2 without --min-count above 1"),
        ({"min_count": 0, "buckets": 2}, "--min-count 0, --buckets 2: expected at least 1 and at least 0"),
        ({"extend": "old", "min_count": 2, "buckets": 3}, "--buckets 3: expected the 0 of the data set that is extended"),
        ({"extend": "old", "items": Dictionary(["0", "7"])}, "got an item dictionary and options"),
    ],
)
def test_buckets_that_cannot_be_are_refused(tmp_path: Path, options: dict, message: str) -> None:
    write(tmp_path / "old")
    if "extend" in options:
        options = {**options, "extend": tmp_path / "old"}
    with pytest.raises(ConfigError, match=message):
        DatasetWriter(tmp_path / "data", "small", **options)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["old"]
