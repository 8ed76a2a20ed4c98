"""MovieLens downloads -> the paper's ML task sequence (section 5), followed by the profile tasks of the 1M download."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from teracon_fast.data.prepare.assemble import TaskRows, task_of_users, write_tasks
from teracon_fast.data.prepare.preparer import Summary, WriterOptions
from teracon_fast.data.prepare.tables import TextFormat, first_true, line_of_row, read_text_table
from teracon_fast.data.prepare.windows import choose_windows, cut, group_by_user
from teracon_fast.errors import ConfigError, DataError

_DOUBLE_COLON = TextFormat(
    (("UserID", "int"), ("MovieID", "int"), ("Rating", "float"), ("Timestamp", "int")), "::", False
)
_CSV = TextFormat((("userId", "int"), ("movieId", "int"), ("rating", "float"), ("timestamp", "int")), ",", True)
_USERS = TextFormat(
    (("UserID", "int"), ("Gender", "text"), ("Age", "int"), ("Occupation", "int"), ("Zip-code", "text")), "::", False
)


def prepare_movielens(
    source: Path,
    output: Path,
    writer: WriterOptions,
    *,
    length: int = 30,
    min_items: int = 1,
    half_star: Literal["input", "drop"] = "input",
) -> Summary:
    """MovieLens 1M (ratings.dat, users.dat) or 25M (ratings.csv): next movie, 4-star, 5-star, then gender, age, occupation.

    T1 (`clicking`) is the user's latest `length` movies rated neither 4 nor 5 stars, oldest first; its label is the last one.
    T2 (`4-star`) and T3 (`5-star`) have a sample for each movie rated exactly 4.0 or 5.0. The 1M download adds `gender`, `age`
    (seven bands) and `occupation`. The input of every task is the user's T1 sequence, as in the paper; users without one are
    left out of all tasks. As in the paper, a label movie may have been rated before some input movies. Ratings with equal
    timestamps, of which the 1M download is full, keep the order of the file.

    Half stars exist in the 25M download only. The paper excludes movies of 4 and 5 stars from the input and no others, so a
    movie rated 4.5 is by default an input of T1 and never a label.

    Args:
        source: folder with `ratings.dat` (and `users.dat`) or `ratings.csv`; or the ratings file itself.
        output: prepared folder to create.
        writer: passed to the `DatasetWriter`.
        length: items per row, left-padded; the paper uses 30.
        min_items: skip users with fewer T1 items; 2 gives every T1 row an item to predict from.
        half_star: a movie rated 4.5 is kept in T1 ("input") or left out ("drop").

    Raises:
        DataError: a file is missing or malformed (names the line), a rating is not one of 0.5, 1.0, ..., 5.0, the user of a
            rating is not in `users.dat`, or no user has a T1 sequence.
        ConfigError: an option is out of range.
    """
    if length < 2 or not 1 <= min_items <= length:
        raise ConfigError(f"--length {length}, --min-items {min_items}: expected a length of at least 2, and 1 to length items")
    path, format = _find_ratings(Path(source))
    table = read_text_table(path, format)
    user, movie, rating, stamp = (table[name] for name, _ in format.columns)
    _check_ratings(path, format, user, movie, rating)

    clicked = (rating != 4.0) & (rating != 5.0)
    if half_star == "drop":
        clicked &= rating != 4.5
    if not clicked.any():
        raise DataError(path, "got only ratings of 4 and 5 stars; expected others, which are the input of all tasks")
    clicks = np.flatnonzero(clicked)
    histories = group_by_user(user[clicks], stamp[clicks])
    item_ids, codes = np.unique(movie[clicks][histories.order], return_inverse=True)
    windows = choose_windows(histories.starts, length, max_windows=1, min_items=min_items)
    if len(windows) == 0:
        raise DataError(path, f"got no user with {min_items} movies rated neither 4 nor 5 stars")
    sequences = cut(codes.astype(np.int32) + 1, windows, length)
    groups = histories.users[windows.owner]

    tasks = [TaskRows("clicking", "next_item", sequences, groups)]
    notes = []
    for stars in (4, 5):
        chosen = np.flatnonzero((rating == stars) & np.isin(user, groups))
        if len(chosen) == 0:
            notes.append(f"task {stars}-star skipped: no user with a T1 sequence gave {stars} stars")
            continue
        # One row per user, one sample per movie, in time order.
        starred = group_by_user(user[chosen], stamp[chosen])
        inputs = sequences[np.searchsorted(groups, starred.users)]
        rows = np.repeat(np.arange(len(starred.users), dtype=np.int64), starred.counts)
        tasks.append(TaskRows(f"{stars}-star", "label", inputs, starred.users, rows, movie[chosen][starred.order]))
    profiles = path.with_name("users.dat")
    if format is _DOUBLE_COLON and profiles.is_file():
        tasks += _profile_tasks(profiles, sequences, groups)
    elif format is _DOUBLE_COLON:
        notes.append(f"tasks gender, age and occupation skipped: no {profiles.name} beside {path.name}")
    left_out = len(np.unique(user)) - len(groups)
    if left_out:
        notes.append(f"{left_out:,} users skipped: fewer than {min_items} movies rated neither 4 nor 5 stars")
    options = {"length": length, "min_items": min_items, "half_star": half_star}
    about = {"preparer": "movielens", "file": path.name, **options}
    return write_tasks(output, writer, "movielens", item_ids, tasks, about, notes)


def _find_ratings(source: Path) -> tuple[Path, TextFormat]:
    """The ratings file of a folder, and its format."""
    formats = {"ratings.dat": _DOUBLE_COLON, "ratings.csv": _CSV}
    if source.is_file() and source.name in formats:
        return source, formats[source.name]
    for name, format in formats.items():
        if (source / name).is_file():
            return source / name, format
    raise DataError(source, "no ratings file; expected a folder with ratings.dat (1M) or ratings.csv (25M)")


def _check_ratings(
    path: Path, format: TextFormat, user: NDArray[Any], movie: NDArray[Any], rating: NDArray[Any]
) -> None:
    """Refuse ids below 1 (0 is the pad) and ratings that are not on the star scale."""
    for name, values, wrong, expected in (
        ("user id", user, user < 1, "a positive id"),
        ("movie id", movie, movie < 1, "a positive id"),
        ("rating", rating, (rating < 0.5) | (rating > 5) | (rating * 2 != np.floor(rating * 2)), "0.5, 1.0, ..., 5.0"),
    ):
        row = first_true(wrong)
        if row is not None:
            raise DataError(path, f"got {name} {values[row]}; expected {expected}", line=line_of_row(row, format))


def _profile_tasks(path: Path, sequences: NDArray[np.int32], groups: NDArray[np.int64]) -> list[TaskRows]:
    """Gender, age and occupation of every user with a T1 sequence."""
    profile = read_text_table(path, _USERS)
    known, first = np.unique(profile["UserID"], return_index=True)
    if len(known) < len(profile["UserID"]):
        repeated = np.setdiff1d(np.arange(len(profile["UserID"])), first)[0]
        reason = f"got a second line of user {profile['UserID'][repeated]}; expected one per user"
        raise DataError(path, reason, line=line_of_row(int(repeated), _USERS))
    missing = np.setdiff1d(groups, known)
    if len(missing):
        raise DataError(path, f"got no line for user {missing[0]}, who has ratings ({len(missing)} such users)")
    return [
        task_of_users(column.lower(), known, profile[column][first], sequences, groups)
        for column in ("Gender", "Age", "Occupation")
    ]
