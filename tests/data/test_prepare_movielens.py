"""MovieLens: sequences, labels and groups worked out by hand, both downloads, and broken files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from synthetic import write_movielens_1m

from teracon_fast.data import TaskData, open_dataset
from teracon_fast.data.prepare import PREPARERS
from teracon_fast.errors import ConfigError, DataError

prepare = PREPARERS["movielens"]

# User 7 rated four movies below 4 stars at times 10, 20, 20, 30 (lines out of order; 50 before 40 at time 20, as in the file),
# user 2 one movie, user 9 only liked movies.
RATINGS = [
    "7::30::3::30",
    "7::10::1::10",
    "7::50::2::20",
    "7::40::3::20",
    "7::60::4::5",
    "7::20::4::15",
    "7::70::5::40",
    "2::40::3::99",
    "2::70::5::98",
    "9::60::4::1",
    "9::70::5::2",
]
USERS = ["2::F::25::15::55117", "7::M::1::10::48067-1234", "9::M::56::0::02460"]


def write_1m(folder: Path, ratings: list[str] = RATINGS, users: list[str] | None = USERS, end: str = "\n") -> Path:
    (folder / "ratings.dat").write_text(end.join(ratings) + end, encoding="latin-1", newline="")
    if users is not None:
        (folder / "users.dat").write_text(end.join(users) + end, encoding="latin-1", newline="")
    return folder


def write_25m(folder: Path, rows: list[str]) -> Path:
    (folder / "ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *rows]) + "\n")
    return folder


def raw_rows(path: Path, task: TaskData) -> dict[int, list[str]]:
    """Group -> sequence in raw ids."""
    ids = open_dataset(path).item_ids()
    return {int(g): list(ids[row]) for g, row in zip(task.groups, task.sequences, strict=True)}


def raw_samples(task: TaskData) -> list[tuple[int, str]]:
    """(group, raw label) of every sample, in order."""
    labels = task.label_ids()
    return [(int(task.groups[row]), labels[label]) for row, label in task.samples]


def test_1m_by_hand(tmp_path: Path) -> None:
    summary = prepare(write_1m(tmp_path), tmp_path / "out", length=3)
    data = open_dataset(tmp_path / "out")
    assert [task.name for task in data.tasks] == ["clicking", "4-star", "5-star", "gender", "age", "occupation"]
    assert [task.kind for task in data.tasks] == ["next_item"] + ["label"] * 5
    clicking, four, five, gender, age, occupation = data.tasks

    # The recent 3 of 10, 50, 40, 30: movie 10 is too old, so it is no item at all.
    assert list(data.item_ids()) == ["0", "30", "40", "50"]
    assert raw_rows(data.path, clicking) == {2: ["0", "0", "40"], 7: ["50", "40", "30"]}
    assert raw_samples(clicking) == [(2, "40"), (7, "30")]
    assert list(clicking.lengths) == [1, 3]

    assert raw_rows(data.path, four) == {7: ["50", "40", "30"]}
    assert raw_samples(four) == [(7, "60"), (7, "20")]
    assert raw_rows(data.path, five) == raw_rows(data.path, clicking)
    assert raw_samples(five) == [(2, "70"), (7, "70")]
    assert raw_samples(gender) == [(2, "F"), (7, "M")]
    assert raw_samples(age) == [(2, "25"), (7, "1")]
    assert list(age.label_ids()) == ["1", "25"]
    assert raw_samples(occupation) == [(2, "15"), (7, "10")]

    assert summary.users == 2 and summary.items == 3 and summary.length == 3
    assert [(task.rows, task.samples, task.labels) for task in summary.tasks[:3]] == [(2, 2, 4), (1, 2, 2), (2, 2, 1)]
    assert summary.mean_length == pytest.approx((4 + 3 + 4 + 4 + 4 + 4) / 11)
    assert summary.pad_share == pytest.approx(1 - summary.mean_length / 3)
    assert any("1 users skipped" in note for note in summary.notes)
    assert "T2 4-star (label): 1 users, 1 rows, 2 samples, 2 labels" in str(summary)


@pytest.mark.parametrize("variant", ["crlf", "bom", "no_last_newline", "blank_last_lines"])
def test_1m_text_variants_give_the_same_data(tmp_path: Path, variant: str) -> None:
    plain, other = tmp_path / "plain", tmp_path / "other"
    plain.mkdir()
    other.mkdir()
    write_1m(plain)
    write_1m(other, end="\r\n" if variant == "crlf" else "\n")
    for name in ("ratings.dat", "users.dat"):
        content = (other / name).read_bytes()
        content = {
            "crlf": content,
            "bom": b"\xef\xbb\xbf" + content,
            "no_last_newline": content.rstrip(b"\n"),
            "blank_last_lines": content + b"\n\n",
        }[variant]
        (other / name).write_bytes(content)
    for folder in (plain, other):
        prepare(folder, folder / "out", length=3)
    for file in sorted(path.relative_to(plain) for path in (plain / "out").rglob("*") if path.is_file()):
        assert (plain / file).read_bytes() == (other / file).read_bytes(), file


def test_without_users_file_three_tasks_and_a_note(tmp_path: Path) -> None:
    summary = prepare(write_1m(tmp_path, users=None), tmp_path / "out")
    assert [task.name for task in summary.tasks] == ["clicking", "4-star", "5-star"]
    assert any("users.dat" in note for note in summary.notes)


HALF_STARS = [
    "1,10,0.5,100",
    "1,20,4.5,101",
    "1,30,4.0,102",
    "1,40,5.0,103",
    "1,50,3.5,104",
    "2,20,4.5,7",
    "2,60,4.0,8",
]


def test_25m_keeps_four_and_a_half_stars_as_input(tmp_path: Path) -> None:
    summary = prepare(write_25m(tmp_path, HALF_STARS), tmp_path / "out", length=4)
    data = open_dataset(tmp_path / "out")
    assert [task.name for task in data.tasks] == ["clicking", "4-star", "5-star"]
    assert raw_rows(data.path, data.tasks[0]) == {1: ["0", "10", "20", "50"], 2: ["0", "0", "0", "20"]}
    assert raw_samples(data.tasks[1]) == [(1, "30"), (2, "60")]
    assert raw_samples(data.tasks[2]) == [(1, "40")]
    assert summary.length == 4


def test_25m_can_drop_four_and_a_half_stars(tmp_path: Path) -> None:
    prepare(write_25m(tmp_path, HALF_STARS), tmp_path / "out", length=4, half_star="drop")
    data = open_dataset(tmp_path / "out")
    assert raw_rows(data.path, data.tasks[0]) == {1: ["0", "0", "10", "50"]}
    assert raw_samples(data.tasks[1]) == [(1, "30")]


def test_recent_items_are_cut_at_the_length(tmp_path: Path) -> None:
    rows = [f"5,{movie},3.0,{1000 - movie}" for movie in range(1, 41)]
    prepare(write_25m(tmp_path, rows + ["5,99,4.0,1", "6,1,4.0,1"]), tmp_path / "out")
    data = open_dataset(tmp_path / "out")
    assert data.length == 30
    # Later lines are older here: the 30 newest are movies 30 down to 1, oldest first.
    assert raw_rows(data.path, data.tasks[0]) == {5: [str(movie) for movie in range(30, 0, -1)]}


def test_min_items_leaves_out_short_users_of_all_tasks(tmp_path: Path) -> None:
    prepare(write_1m(tmp_path), tmp_path / "out", min_items=2)
    for task in open_dataset(tmp_path / "out").tasks:
        assert set(task.groups.tolist()) == {7}


def test_synthetic_agrees_with_a_plain_loop(tmp_path: Path) -> None:
    """Every task of a larger folder against a dictionary-and-loop reading of the same files."""
    write_movielens_1m(tmp_path, users=40, movies=60, ratings=(15, 40), seed=3)
    prepare(tmp_path, tmp_path / "out", length=8)
    data = open_dataset(tmp_path / "out")
    clicks: dict[int, list[tuple[int, str]]] = {}
    stars: dict[int, dict[int, list[tuple[int, str]]]] = {4: {}, 5: {}}
    for line in (tmp_path / "ratings.dat").read_text().splitlines():
        user, movie, rating, stamp = line.split("::")
        target = clicks if rating not in ("4", "5") else stars[int(rating)]
        target.setdefault(int(user), []).append((int(stamp), movie))
    expected = {
        user: [movie for _, movie in sorted(events, key=lambda event: event[0])][-8:] for user, events in clicks.items()
    }
    expected = {user: ["0"] * (8 - len(row)) + row for user, row in expected.items()}
    assert len(expected) == 40
    for task in data.tasks:
        for user, row in raw_rows(data.path, task).items():
            assert row == expected[user]
    assert set(raw_rows(data.path, data.tasks[0])) == set(expected)
    for task, rating in ((data.tasks[1], 4), (data.tasks[2], 5)):
        wanted = [
            (user, movie)
            for user in sorted(stars[rating])
            for _, movie in sorted(stars[rating][user], key=lambda event: event[0])
        ]
        assert raw_samples(task) == wanted
    profiles = [line.split("::") for line in (tmp_path / "users.dat").read_text().splitlines()]
    for column, task in enumerate(data.tasks[3:], start=1):
        assert raw_samples(task) == [(int(profile[0]), profile[column]) for profile in profiles]


def test_synthetic_profile_can_be_read_off_the_sequence(tmp_path: Path) -> None:
    """Otherwise the trainer's test on this folder could not tell learning from guessing."""
    write_movielens_1m(tmp_path, users=60, movies=56, seed=1)
    prepare(tmp_path, tmp_path / "out")
    data = open_dataset(tmp_path / "out")
    genre = np.array([0] + [(int(raw) - 2) // 3 % 4 for raw in data.item_ids()[1:]])
    task = data.tasks[3]
    right = 0
    for row, label in task.samples:
        items = task.sequences[row]
        favourite = np.bincount(genre[items[items > 0]], minlength=4).argmax()
        right += task.label_ids()[label] == "FM"[favourite % 2]
    assert right / len(task.samples) > 0.9


def test_same_input_same_bytes(tmp_path: Path) -> None:
    write_movielens_1m(tmp_path / "a", seed=5)
    write_movielens_1m(tmp_path / "b", seed=5)
    write_movielens_1m(tmp_path / "c", seed=6)
    assert (tmp_path / "a/ratings.dat").read_bytes() == (tmp_path / "b/ratings.dat").read_bytes()
    assert (tmp_path / "a/ratings.dat").read_bytes() != (tmp_path / "c/ratings.dat").read_bytes()
    for name in "ab":
        prepare(tmp_path / name, tmp_path / f"out_{name}")
    files = sorted(path.relative_to(tmp_path / "out_a") for path in (tmp_path / "out_a").rglob("*") if path.is_file())
    assert len(files) == 2 + 4 + 5 * 5
    for file in files:
        assert (tmp_path / "out_a" / file).read_bytes() == (tmp_path / "out_b" / file).read_bytes(), file


def broken_line(number: int, text: str) -> Callable[[Path], Path]:
    return lambda folder: write_1m(folder, RATINGS[: number - 1] + [text] + RATINGS[number:])


def broken_user(number: int, text: str) -> Callable[[Path], Path]:
    return lambda folder: write_1m(folder, users=USERS[: number - 1] + [text] + USERS[number:])


BROKEN = {
    "too few fields": (broken_line(3, "7::50::2"), "ratings.dat:3", "got 3 fields"),
    "too many fields": (broken_line(4, "7::40::3::20::1"), "ratings.dat:4", "got 5 fields"),
    "single colons": (broken_line(2, "7:10:1:10"), "ratings.dat:2", "got 1 fields"),
    "text between separators": (broken_line(2, "7:x:10::1::10"), "ratings.dat:2", "got 3 fields"),
    "first line": (broken_line(1, "nonsense"), "ratings.dat:1", "expected 4 fields"),
    "text id": (broken_line(5, "7::sixty::4::5"), "ratings.dat:5", "got MovieID 'sixty'; expected an integer"),
    "empty field": (broken_line(5, "7::::4::5"), "ratings.dat:5", "got MovieID ''; expected an integer"),
    "empty line": (broken_line(5, ""), "ratings.dat:5", "an empty line"),
    "nan rating": (broken_line(6, "7::20::nan::15"), "ratings.dat:6", "got Rating 'nan'; expected a number"),
    "rating off the scale": (broken_line(6, "7::20::6::15"), "ratings.dat:6", "got rating 6.0; expected 0.5"),
    "rating between steps": (broken_line(6, "7::20::3.7::15"), "ratings.dat:6", "got rating 3.7"),
    "pad as movie": (broken_line(7, "7::0::5::40"), "ratings.dat:7", "got movie id 0; expected a positive id"),
    "time missing": (broken_line(7, "7::70::5::"), "ratings.dat:7", "got Timestamp ''"),
    "huge id": (broken_line(7, "7::" + "9" * 400 + "::5::40"), "ratings.dat:7", "got MovieID '999"),
    "empty ratings": (lambda folder: write_1m(folder, ratings=[""]), "ratings.dat:1", "got an empty first line"),
    "users too short": (broken_user(2, "7::M::1::10"), "users.dat:2", "got 4 fields"),
    "users text age": (broken_user(2, "7::M::old::10::4"), "users.dat:2", "got Age 'old'"),
    "users no gender": (broken_user(1, "2::::25::15::5"), "users.dat:1", "got Gender ''"),
    "user twice": (broken_user(3, "7::F::1::10::4"), "users.dat:3", "got a second line of user 7"),
    "user missing": (lambda folder: write_1m(folder, users=USERS[1:]), "users.dat", "no line for user 2"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_with_file_and_line(tmp_path: Path, name: str) -> None:
    write, place, reason = BROKEN[name]
    write(tmp_path)
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, tmp_path / "out")
    assert place in str(caught.value) and reason in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"ratings.dat", "users.dat"}


def test_wrong_csv_header(tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text("user,movie,rating,timestamp\n1,2,3.0,4\n")
    with pytest.raises(
        DataError, match=r"ratings.csv:1: got header 'user,movie,rating,timestamp'; expected 'userId"
    ):
        prepare(tmp_path, tmp_path / "out")


def test_csv_error_counts_the_header_line(tmp_path: Path) -> None:
    write_25m(tmp_path, ["1,10,3.0,100", "1,11,x,101"])
    with pytest.raises(DataError, match=r"ratings.csv:3: got rating 'x'"):
        prepare(tmp_path, tmp_path / "out")
    write_25m(tmp_path, ["1,10,3.0,100", "1,11,3.2,101"])
    with pytest.raises(DataError, match=r"ratings.csv:3: got rating 3.2"):
        prepare(tmp_path, tmp_path / "out")


def test_header_alone(tmp_path: Path) -> None:
    write_25m(tmp_path, [])
    with pytest.raises(DataError, match="no rows"):
        prepare(tmp_path, tmp_path / "out")


def test_everybody_likes_everything(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got only ratings of 4 and 5 stars"):
        prepare(write_1m(tmp_path, RATINGS[-2:]), tmp_path / "out")


def test_a_star_that_nobody_gave_is_no_task(tmp_path: Path) -> None:
    summary = prepare(write_1m(tmp_path, ["1::10::3::1", "1::11::4::2"], users=None), tmp_path / "out")
    assert [task.name for task in summary.tasks] == ["clicking", "4-star"]
    assert any("task 5-star skipped" in note for note in summary.notes)


def test_missing_source_and_options(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a folder with ratings.dat"):
        prepare(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ConfigError, match="movielens: got no SOURCE"):
        prepare(None, tmp_path / "out")
    with pytest.raises(ConfigError, match="--min-items 4"):
        prepare(write_1m(tmp_path), tmp_path / "out", length=3, min_items=4)


def test_existing_output_is_kept_unless_overwrite(tmp_path: Path) -> None:
    write_1m(tmp_path)
    prepare(tmp_path, tmp_path / "out", length=3)
    with pytest.raises(DataError, match="already exists"):
        prepare(tmp_path, tmp_path / "out", length=4)
    assert open_dataset(tmp_path / "out").length == 3
    prepare(tmp_path, tmp_path / "out", length=4, overwrite=True)
    assert open_dataset(tmp_path / "out").length == 4
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="not a prepared data set"):
        prepare(tmp_path, tmp_path / "mine", overwrite=True)


def test_extended(tmp_path: Path) -> None:
    prepare(write_1m(tmp_path), tmp_path / "old")
    assert list(open_dataset(tmp_path / "old").item_ids()) == ["0", "10", "30", "40", "50"]
    prepare(write_1m(tmp_path, [*RATINGS, "7::20::1::50", "7::5::4::60"]), tmp_path / "new", extend=tmp_path / "old")
    data = open_dataset(tmp_path / "new")
    assert list(data.item_ids()) == ["0", "10", "30", "40", "50", "20"]
    assert list(data.tasks[1].label_ids()) == ["20", "60", "5"], "labels of a known task, then its new one"
    summary = prepare(tmp_path, tmp_path / "rare", min_count=2, buckets=1)
    assert list(open_dataset(tmp_path / "rare").item_ids()) == ["0", "<bucket 1 of 1>", "40"] and summary.items == 2
