"""Event logs: rows and labels worked out by hand, CSV and Parquet alike, and broken files."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from teracon_fast.data import Dictionary, open_dataset
from teracon_fast.data.prepare import PREPARERS
from teracon_fast.errors import ConfigError, DataError

prepare = PREPARERS["events"]

# In no order of time; user 30 has two events at time 5: "b" comes first in the file.
LOG = {
    "user": [30, 4, 30, 30, 4, 30, 8],
    "item": ["b", "a", "d", "c", "zz", "a", "a"],
    "time": [5, 3, 5, 1, 2, 9, 1],
    "city": ["x", None, "x", "y", "w", None, None],
    "age": [40, 20, 40, 40, 20, 40, 60],
}


def write(folder: Path, columns: dict[str, list[Any]], form: str = "parquet") -> Path:
    path = folder / f"log.{form}"
    frame = pl.DataFrame(columns, strict=False)
    if form == "csv":
        frame.write_csv(path)
    else:
        frame.write_parquet(path)
    return path


def rows_of(folder: Path, number: int = 0) -> list[tuple[int, list[str]]]:
    """(group, raw ids) of each row of a task."""
    data = open_dataset(folder)
    ids, task = data.item_ids(), data.tasks[number]
    return [(int(group), list(ids[row])) for group, row in zip(task.groups, task.sequences, strict=True)]


def labels_of(folder: Path, number: int) -> list[tuple[int, str]]:
    """(group, raw label) of each sample of a task."""
    task = open_dataset(folder).tasks[number]
    return [(int(task.groups[row]), task.label_ids()[label]) for row, label in task.samples]


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_by_hand(tmp_path: Path, form: str) -> None:
    summary = prepare(write(tmp_path, LOG, form), tmp_path / "out", labels=("city", "age"), length=3)
    out = tmp_path / "out"
    data = open_dataset(out)
    assert data.name == "log" and [task.name for task in data.tasks] == ["next_item", "city", "age"]
    # User 8 has one event, fewer than min_items = 2. "c" of user 30 is too old, so it is no item.
    assert list(data.item_ids()) == ["0", "a", "b", "d", "zz"]
    assert rows_of(out) == [(4, ["0", "zz", "a"]), (30, ["b", "d", "a"])]
    assert labels_of(out, 0) == [(4, "a"), (30, "a")]
    # The latest city that is known: user 4's at time 2, user 30's at time 5 (both "x").
    assert labels_of(out, 1) == [(4, "w"), (30, "x")]
    assert labels_of(out, 2) == [(4, "20"), (30, "40")]
    assert list(data.tasks[2].label_ids()) == ["20", "40"]
    assert summary.users == 2 and summary.items == 4
    assert summary.notes == ("1 users skipped: no window of 2 events",)


def test_several_windows(tmp_path: Path) -> None:
    log = {
        "user": [1] * 7 + [2] * 2,
        "item": [*range(11, 18), 21, 22],
        "time": [*range(7), 0, 1],
        "age": [5] * 7 + [6] * 2,
    }
    path = write(tmp_path, log)
    prepare(path, tmp_path / "all", length=3, windows="several", labels=("age",), min_items=1)
    assert rows_of(tmp_path / "all") == [
        (1, ["0", "0", "11"]), (1, ["12", "13", "14"]), (1, ["15", "16", "17"]), (2, ["0", "21", "22"]),
    ]  # fmt: skip
    assert labels_of(tmp_path / "all", 1) == [(1, "5"), (1, "5"), (1, "5"), (2, "6")]
    prepare(path, tmp_path / "enough", length=3, windows="several")
    assert [row for _, row in rows_of(tmp_path / "enough")][0] == ["12", "13", "14"]
    prepare(path, tmp_path / "two", length=3, windows="several", max_windows=2, stride=2)
    assert rows_of(tmp_path / "two") == [
        (1, ["13", "14", "15"]), (1, ["15", "16", "17"]), (2, ["0", "21", "22"]),
    ]  # fmt: skip


def test_order_and_ties_do_not_depend_on_how_users_are_mixed(tmp_path: Path) -> None:
    """Against a stable Python sort of each user's events, over many ties."""
    random = np.random.default_rng(0)
    user, time = random.integers(0, 20, 400), random.integers(0, 6, 400)
    item = np.arange(1, 401)
    prepare(write(tmp_path, {"user": user.tolist(), "item": item.tolist(), "time": time.tolist()}), tmp_path / "out")
    for group, row in rows_of(tmp_path / "out"):
        mine = [(time[k], item[k]) for k in range(400) if user[k] == group]
        assert [int(raw) for raw in row if raw != "0"] == [i for _, i in sorted(mine, key=lambda event: event[0])]


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_text_users_are_numbered_and_kept(tmp_path: Path, form: str) -> None:
    log = {"user": ["eve", "bob", "eve", "bob"], "item": [5, 6, 70, 5], "time": [1.5, 0.25, 2.5, 0.75]}
    prepare(write(tmp_path, log, form), tmp_path / "out", length=2)
    assert rows_of(tmp_path / "out") == [(0, ["6", "5"]), (1, ["5", "70"])]
    assert list(Dictionary.load(tmp_path / "out/users.parquet").ids) == ["bob", "eve"]
    assert list(open_dataset(tmp_path / "out").item_ids()) == ["0", "5", "6", "70"]


def test_ids_with_leading_zeros_stay_apart(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user,item,time\n1,007,1\n1,7,2\n2,7,1\n2,007,2\n")
    prepare(path, tmp_path / "out", length=2)
    assert rows_of(tmp_path / "out") == [(1, ["007", "7"]), (2, ["7", "007"])]


@pytest.mark.parametrize(
    "times",
    [
        [datetime.datetime(2020, 1, 2, 3), datetime.datetime(2020, 1, 2, 2), datetime.datetime(2019, 5, 1)],
        [datetime.date(2020, 1, 2), datetime.date(2020, 1, 1), datetime.date(2019, 12, 31)],
        [3.5, 2.5, -1.0],
        [3, 2, -(2**40)],
    ],
    ids=["datetime", "date", "float", "int"],
)
@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_kinds_of_time(tmp_path: Path, times: list[Any], form: str) -> None:
    path = write(tmp_path, {"who": [1, 1, 1], "what": ["x", "y", "z"], "when": times}, form)
    prepare(path, tmp_path / "out", user="who", item="what", time="when", length=4)
    assert rows_of(tmp_path / "out") == [(1, ["0", "z", "y", "x"])]


def test_other_column_types(tmp_path: Path) -> None:
    frame = pl.DataFrame({"user": [1.0, 1.0, 2.0, 2.0], "item": ["a", "b", "b", "a"], "time": [1, 2, 1, 2],
                          "paid": [True, False, False, True], "score": [0.5, float("nan"), 2.0, None],
                          "level": [3.0, None, 1.0, float("nan")]}).with_columns(pl.col("item").cast(pl.Categorical))  # fmt: skip
    frame.write_parquet(tmp_path / "log.parquet")
    prepare(tmp_path / "log.parquet", tmp_path / "out", labels=("paid", "score", "level"), length=2)
    out = tmp_path / "out"
    assert rows_of(out) == [(1, ["a", "b"]), (2, ["b", "a"])]
    assert labels_of(out, 1) == [(1, "false"), (2, "true")]
    assert labels_of(out, 2) == [(1, "0.5"), (2, "2.0")]
    assert labels_of(out, 3) == [(1, "3"), (2, "1")]


def test_csv_variants(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(b'\xef\xbb\xbftime,extra,item,user\r\n2,"a, b",x,1\r\n1,,"y, ""z""",1\r\n\r\n')
    prepare(path, tmp_path / "out", length=2)
    assert rows_of(tmp_path / "out") == [(1, ['y, "z"', "x"])]


def test_constant_labels(tmp_path: Path) -> None:
    path = write(tmp_path, LOG)
    prepare(path, tmp_path / "out", labels=("age",), label_value="constant")
    assert labels_of(tmp_path / "out", 1) == [(4, "20"), (30, "40")]
    # User 30's city is "y" at time 1, and "x" in row 0 at time 5.
    with pytest.raises(DataError, match=r"log.parquet:0: column 'city': got 'x'; expected the user's earlier value"):
        prepare(path, tmp_path / "other", labels=("city",), label_value="constant")


@pytest.mark.parametrize("items", [[0, 1, 2], ["0", "b", "c"]], ids=["integers", "text"])
def test_item_zero_needs_a_prefix(tmp_path: Path, items: list[Any]) -> None:
    path = write(tmp_path, {"user": [1, 1, 1], "item": items, "time": [3, 2, 1]})
    with pytest.raises(
        DataError, match=r"log.parquet:0: column 'item': got '0'; expected another id, since 0 is the pad"
    ):
        prepare(path, tmp_path / "out")
    prepare(path, tmp_path / "out", item_prefix="i", length=3)
    assert rows_of(tmp_path / "out") == [(1, [f"i{item}" for item in reversed(items)])]


def changed(column: str, row: int, value: Any) -> Callable[[str], dict[str, list[Any]]]:
    def columns(form: str) -> dict[str, list[Any]]:
        values = list(LOG[column])
        values[row] = value
        return {**LOG, column: values}

    return columns


BROKEN: dict[str, tuple[Callable[[str], dict[str, list[Any]]], int | None, str]] = {
    "empty user": (changed("user", 3, None), 3, "column 'user': got an empty value"),
    "empty item": (changed("item", 2, None), 2, "column 'item': got an empty value"),
    "blank item": (changed("item", 2, " "), 2, "expected an integer or text"),
    "nan item": (changed("item", 2, "NaN"), 2, "column 'item': got 'NaN'; expected an integer or text"),
    "empty time": (changed("time", 6, None), 6, "column 'time': got an empty value"),
    "nan time": (
        lambda form: {**LOG, "time": [1.0, 2.0, float("nan"), 4.0, 5.0, 6.0, 7.0]}, 2, "column 'time': got 'NaN'; expected a",
    ),
    "text time": (
        lambda form: {**LOG, "time": ["1", "2", "soon", "4", "5", "6", "7"]}, 2,
        "column 'time': got 'soon'; expected numbers, dates or date-times in all rows",
    ),
    "text among dates": (
        lambda form: {**LOG, "time": ["2024-05-01T10:00:00"] * 5 + ["soon", "2024-05-02T10:00:00"]}, 5, "'time': got 'soon'",
    ),
    "no times at all": (lambda form: {**LOG, "time": list("abcdefg")}, 0, "column 'time': got 'a'; expected numbers, dates"),
    "no such column": (lambda form: {name: LOG[name] for name in ("user", "time", "age", "city")}, None, "no column 'item'"),
    "no rows": (lambda form: {name: [] for name in LOG}, None, "no rows"),
    "label never known": (
        lambda form: {**LOG, "city": [None] * 6 + ["x"]}, None, "column 'city': got no value for any user with 2 events",
    ),
    "one event each": (lambda form: {**LOG, "user": [1, 2, 3, 4, 5, 6, 7]}, None, "got no user with 2 events"),
}  # fmt: skip


@pytest.mark.parametrize("form", ["parquet", "csv"])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_logs_are_refused_with_file_and_row(tmp_path: Path, name: str, form: str) -> None:
    columns, row, reason = BROKEN[name]
    path = write(tmp_path, columns(form), form)
    with pytest.raises(DataError) as caught:
        prepare(path, tmp_path / "out", labels=("city", "age"))
    assert reason.lower() in str(caught.value).lower()
    assert str(caught.value).startswith(str(path))
    if row is not None:
        assert caught.value.line == (row + 2 if form == "csv" else row)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("values", [[1.5, 2.0], [1.0, float("nan")], [2**64 - 1, 1]], ids=["fraction", "nan", "uint64"])
def test_numbers_that_are_no_ids(tmp_path: Path, values: list[Any]) -> None:
    path = write(tmp_path, {"user": [1, 1], "item": values, "time": [1, 2]})
    with pytest.raises(DataError, match="expected an integer"):
        prepare(path, tmp_path / "out")


def test_times_that_are_lists_or_dates_as_text(tmp_path: Path) -> None:
    for times in ([[1], [2]], ["2024-05-01T10:00:00Z", "2024-05-02T10:00:00Z"]):
        path = write(tmp_path, {"user": [1, 1], "item": [1, 2], "time": times})
        with pytest.raises(DataError, match=r"expected numbers, dates or date-times in all rows, not") as caught:
            prepare(path, tmp_path / "out")
        assert caught.value.line == 0


def test_list_column_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"user": [1, 1], "item": [[1], [2]], "time": [1, 2]})
    with pytest.raises(DataError, match=r"column 'item': got List\(Int64\); expected integers or text"):
        prepare(path, tmp_path / "out")


@pytest.mark.parametrize("line", ["1,b", "1,b,2,3"], ids=["short", "long"])
def test_ragged_csv(tmp_path: Path, line: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text(f"user,item,time\n1,a,1\n{line}\n1,c,3\n")
    with pytest.raises(DataError, match=rf"log.csv:3: got {len(line.split(','))} fields; expected 3"):
        prepare(path, tmp_path / "out")


def test_no_file_no_parquet_other_suffix(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"log.csv: no such file"):
        prepare(tmp_path / "log.csv", tmp_path / "out")
    (tmp_path / "log.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="log.parquet: not readable as Parquet"):
        prepare(tmp_path / "log.parquet", tmp_path / "out")
    (tmp_path / "log.txt").write_text("user,item,time\n")
    with pytest.raises(DataError, match=r"expected .parquet or .csv"):
        prepare(tmp_path / "log.txt", tmp_path / "out")
    (tmp_path / "log.csv").write_text("")
    with pytest.raises(DataError, match="log.csv:1: no column 'user'"):
        prepare(tmp_path / "log.csv", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ("time",)}, "expected distinct names"),
        ({"labels": ("next_item",)}, "rename it"),
        ({"length": 1}, "a length of at least 2"),
        ({"min_items": 0}, "1 to length items"),
        ({"stride": 2}, "without --windows several"),
        ({"windows": "several", "max_windows": 0}, "--max-windows 0: expected at least 1"),
    ],
)
def test_options_out_of_range(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(write(tmp_path, LOG), tmp_path / "out", **options)


def test_extended_with_more_events(tmp_path: Path) -> None:
    """Text users, items and labels keep their numbers; all that is new follows them."""
    old = {"user": ["eve", "bob"] * 2, "item": ["k", "m", "m", "p"], "time": [1, 2, 3, 4], "city": ["y", "x"] * 2}
    more = {"user": ["amy", "amy"], "item": ["a", "k"], "time": [5, 6], "city": ["a", "a"]}
    options = {"labels": ("city",), "length": 2}
    prepare(write(tmp_path, old), tmp_path / "old", **options)
    path = write(tmp_path, {name: [*old[name], *more[name]] for name in old})
    prepare(path, tmp_path / "new", extend=tmp_path / "old", **options)
    assert list(open_dataset(tmp_path / "old").item_ids()) == ["0", "k", "m", "p"]
    assert list(open_dataset(tmp_path / "new").item_ids()) == ["0", "k", "m", "p", "a"]
    assert rows_of(tmp_path / "new") == [(0, ["m", "p"]), (1, ["k", "m"]), (2, ["a", "k"])]
    assert list(Dictionary.load(tmp_path / "new/users.parquet").ids) == ["bob", "eve", "amy"]
    assert labels_of(tmp_path / "new", 1) == [(0, "x"), (1, "y"), (2, "a")]
    assert list(open_dataset(tmp_path / "new").tasks[1].label_ids()) == ["x", "y", "a"]
    (tmp_path / "old" / "users.parquet").unlink()
    summary = prepare(path, tmp_path / "anew", extend=tmp_path / "old", **options)
    assert rows_of(tmp_path / "anew")[0] == (0, ["a", "k"])
    assert any("users are renumbered" in note for note in summary.notes)


def test_rare_items_share_buckets(tmp_path: Path) -> None:
    log = {"user": [1] * 4 + [2] * 4, "item": [*"abac", *"abad"], "time": list(range(8))}
    path = write(tmp_path, log)
    summary = prepare(path, tmp_path / "out", min_count=2, buckets=1, length=4)
    assert rows_of(tmp_path / "out") == [(1, [*"aba", "<bucket 1 of 1>"]), (2, [*"aba", "<bucket 1 of 1>"])]
    assert any("2 rare items share the buckets (2 occurrences)" in note for note in summary.notes)
    with pytest.raises(ConfigError, match="--min-count 2 without --buckets"):
        prepare(path, tmp_path / "other", min_count=2)
    assert not (tmp_path / "other").exists()
