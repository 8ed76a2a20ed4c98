"""Parquet: integer and string ids, ragged lists, users and labels, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from teracon_fast.data import DatasetWriter, open_dataset, pad_left, read_parquet
from teracon_fast.errors import DataError


def table(tmp_path: Path, **columns) -> Path:
    path = tmp_path / "file.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def joined(path: Path, **options):
    blocks = list(read_parquet(path, **options))
    assert all(block.path == path for block in blocks)
    return np.concatenate([block.items for block in blocks]), blocks


values = st.one_of(st.lists(st.integers(1, 2**62), max_size=6), st.just([]))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(values, min_size=1, max_size=12),
    length=st.integers(1, 5),
    text=st.booleans(),
    kind=st.sampled_from([pa.list_, pa.large_list]),
    rows_per_block=st.integers(1, 5),
)
def test_ragged_lists_are_padded_on_the_left_and_keep_the_newest(
    tmp_path: Path, rows, length: int, text: bool, kind, rows_per_block: int
) -> None:
    lists = [[str(value) if text else value for value in row] for row in rows]
    users = np.arange(len(rows))[::-1]
    path = table(tmp_path, items=pa.array(lists, kind(pa.string() if text else pa.int64())), user_id=users)
    items, blocks = joined(path, length=length, rows_per_block=rows_per_block)
    pad = "0" if text else 0
    assert items.tolist() == [([pad] * length + row)[-length:] for row in lists]
    assert np.concatenate([block.groups for block in blocks]).tolist() == users.tolist()
    assert [block.first_line for block in blocks] == list(range(0, len(rows), rows_per_block))
    if any(rows):
        assert joined(path, rows_per_block=rows_per_block)[0].shape[1] == max(map(len, rows))
    else:
        with pytest.raises(DataError, match="column 'items' has no items"):
            joined(path)


@pytest.mark.parametrize(
    ("labels", "rows", "expected"),
    [
        (pa.array([4, 0, 2]), [0, 1, 2], [4, 0, 2]),
        (pa.array([True, False, True]), [0, 1, 2], [1, 0, 1]),
        (pa.array(["f", "m", "f"]), [0, 1, 2], ["f", "m", "f"]),
        (pa.array(["f", "m", "f"]).dictionary_encode(), [0, 1, 2], ["f", "m", "f"]),
        (pa.array([[4, 5], [6], [7, 7]]), [0, 0, 1, 2, 2], [4, 5, 6, 7, 7]),
        (pa.array([["a"], ["b", "c"], ["a"]]), [0, 1, 1, 2], ["a", "b", "c", "a"]),
        (pa.array([[1, 2]] * 3, pa.list_(pa.int16(), 2)), [0, 0, 1, 1, 2, 2], [1, 2, 1, 2, 1, 2]),
    ],
)
def test_labels(tmp_path: Path, labels, rows, expected) -> None:
    path = table(tmp_path, label=labels, items=pa.array([[1], [2, 3], [4]]))
    blocks = list(read_parquet(path, user=None, labels="label"))
    assert blocks[0].label_rows.tolist() == rows and blocks[0].label_values.tolist() == expected
    assert blocks[0].groups is None
    with DatasetWriter(tmp_path / "data", "x") as writer:
        writer.add_task("a", "next_item", read_parquet(path, user=None))
        writer.add_task("b", "label", read_parquet(path, user=None, labels="label", rows_per_block=2))
    task = open_dataset(tmp_path / "data").tasks[1]
    assert task.samples[:, 0].tolist() == rows
    assert task.label_ids()[task.samples[:, 1]].tolist() == [str(value) for value in expected]


def test_fixed_size_lists_of_narrow_integers(tmp_path: Path) -> None:
    path = table(tmp_path, items=pa.array([[0, 1], [2, 3]], pa.list_(pa.uint8(), 2)))
    items, _ = joined(path, user=None)
    assert items.dtype == np.int64 and items.tolist() == [[0, 1], [2, 3]]


def test_empty_labels(tmp_path: Path) -> None:
    items = pa.array([[1], [2], [3], [4]])
    cases = [
        (pa.array([5, None, None, 6]), 1, [0, 3], [5, 6]),
        (pa.array([[5], [], None, [6]]), 1, [0, 3], [5, 6]),
        (pa.array([[5], [7], [8, None], [6]]), 2, [0, 1, 2, 3], [5, 7, 8, 6]),
    ]
    for labels, row, rows, expected in cases:
        path = table(tmp_path, items=items, label=labels)
        for rows_per_block in (1, 4):
            with pytest.raises(DataError, match="label") as caught:
                list(read_parquet(path, user=None, labels="label", rows_per_block=rows_per_block))
            assert caught.value.line == row
        (block,) = read_parquet(path, user=None, labels="label", empty_labels="skip")
        assert block.label_rows.tolist() == rows and block.label_values.tolist() == expected and len(block.items) == 4


def test_string_users_become_stable_groups(tmp_path: Path) -> None:
    path = table(tmp_path, items=pa.array([[1], [2], [3]]), who=["ann", "bob", "ann"])
    (block,) = read_parquet(path, user="who")
    assert block.groups.dtype == np.int64 and block.groups[0] == block.groups[2] != block.groups[1]
    assert (block.groups >= 0).all()
    # Fixed number: users must fall on the same side of a split on every machine.
    assert block.groups[0] == 2734568703782763149


def test_unseen_items_are_refused_with_the_row(tmp_path: Path) -> None:
    path = table(tmp_path, items=pa.array([["a"], ["b"], ["a"], ["c"]]), label=[1, 2, 3, 4])
    with pytest.raises(DataError, match="'b', which task 1 does not") as caught, DatasetWriter(tmp_path / "data", "x") as writer:
        writer.add_task("a", "next_item", np.array([["a"]], dtype=object))
        writer.add_task("b", "label", read_parquet(path, user=None, labels="label"))
    assert (caught.value.path, caught.value.line) == (path, 1)


@pytest.mark.parametrize(
    ("columns", "options", "line", "reason"),
    [
        ({"items": [[1]]}, {}, None, "no column 'user_id'"),
        ({"things": [[1]]}, {"user": None}, None, "no column 'items'"),
        ({"items": [1, 2]}, {"user": None}, None, "column 'items': got int64; expected lists"),
        ({"items": [[1.5]]}, {"user": None}, None, "ids of type double"),
        ({"items": [[1], None]}, {"user": None}, 1, "got null; expected a list"),
        ({"items": [[1], [2, None], [3]]}, {"user": None}, 1, "got a null item"),
        ({"items": [[1], [2]], "user_id": [1, None]}, {}, 1, "expected a user id"),
        ({"items": [[1], [2]], "user_id": [1.0, 2.0]}, {}, None, "ids of type double"),
        ({"items": [[1]], "label": [1.0]}, {"user": None, "labels": "label"}, None, "ids of type double"),
        ({"items": pa.array([[2**63]], pa.list_(pa.uint64()))}, {"user": None}, None, "column 'items'"),
        ({"items": pa.array([], pa.list_(pa.int64()))}, {"user": None, "length": 2}, None, "no rows"),
        ({"items": [[1]]}, {"user": None, "length": 0}, None, "length 0"),
        ({"items": [[1]]}, {"user": None, "empty_labels": "x"}, None, "empty labels"),
    ],
)
def test_refused_with_file_row_and_reason(tmp_path: Path, columns, options, line, reason: str) -> None:
    path = table(tmp_path, **columns)
    with pytest.raises(DataError, match=reason) as caught:
        list(read_parquet(path, **options))
    assert caught.value.path == path and caught.value.line == line


def test_files_that_are_not_whole_parquet_are_refused(tmp_path: Path) -> None:
    path = table(tmp_path, items=[[1], [2]])
    content = path.read_bytes()
    for broken in (b"", b"1,2\n", content[:-10], content[:4] + b"\xff" * 60 + content[64:]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match="not a Parquet file|not readable"):
            list(read_parquet(path, user=None))
    with pytest.raises(DataError, match="no such file"):
        read_parquet(tmp_path / "absent.parquet")


def test_pad_left_takes_offsets_or_begins_and_ends() -> None:
    values = np.array([1, 2, 3, 4, 5])
    assert pad_left(values, np.array([0, 2, 2, 5]), 2).tolist() == [[1, 2], [0, 0], [4, 5]]
    assert pad_left(values, np.array([[1, 0], [3, 1]]), 3).tolist() == [[0, 2, 3], [0, 0, 1]]
    assert pad_left(values[:0], np.array([0, 0]), 2).tolist() == [[0, 0]]
