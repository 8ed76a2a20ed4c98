"""TTL: the published file names and format, with all files and with some."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from teracon_fast.data import open_dataset
from teracon_fast.data.prepare import PREPARERS
from teracon_fast.errors import ConfigError, DataError

prepare = PREPARERS["ttl"]

FILES = {
    "original_desen_pretrain.csv": "0,0,12,7\n0,9,100,12\n7,7,9,100\n",
    "original_desen_finetune_click_nouserID.csv": "0,0,12,7,,31,4\n7,7,9,100,,4\n",
    "original_desen_finetune_like_nouserID.csv": "0,9,100,12,,8",
    "original_desen_age.csv": "0,0,12,7,,3\n0,9,100,12,,1\n7,7,9,100,,3\n",
    "original_desen_gender.csv": "0,0,12,7,,1\n0,9,100,12,,2\n",
    "original_desen_lifestatus.csv": "7,7,9,100,,5\n",
}
NAMES = ["watching", "clicking", "thumb-up", "age", "gender", "life_status"]


def write(folder: Path, **changes: str | None) -> Path:
    """The files, some with another text; None leaves a file out. Names are given without prefix and ending."""
    for name, text in FILES.items():
        text = changes.get(name.split("_", 2)[2].split("_nouserID")[0].removesuffix(".csv"), text)
        if text is not None:
            (folder / name).write_text(text)
    return folder


def test_all_files(tmp_path: Path) -> None:
    summary = prepare(write(tmp_path), tmp_path / "out")
    data = open_dataset(tmp_path / "out")
    assert [task.name for task in data.tasks] == NAMES
    assert [task.kind for task in data.tasks] == ["next_item"] + ["label"] * 5
    assert list(data.item_ids()) == ["0", "7", "9", "12", "100"]
    assert data.tasks[0].sequences.tolist() == [[0, 0, 3, 1], [0, 2, 4, 3], [1, 1, 2, 4]]
    assert data.tasks[0].samples.tolist() == [[0, 1], [1, 3], [2, 4]]
    assert data.tasks[1].sequences.tolist() == [[0, 0, 3, 1], [1, 1, 2, 4]]
    assert list(data.tasks[1].label_ids()) == ["4", "31"]
    assert sorted(data.tasks[1].samples.tolist()) == [[0, 0], [0, 1], [1, 0]]
    assert data.tasks[2].samples.tolist() == [[0, 0]] and list(data.tasks[2].label_ids()) == ["8"]
    assert list(data.tasks[3].label_ids()) == ["1", "3"]
    assert [len(task.samples) for task in data.tasks] == [3, 3, 1, 3, 2, 1]
    assert summary.items == 4 and summary.users == 3 and summary.notes == ()
    assert summary.tasks[0].mean_length == pytest.approx(9 / 3)
    assert summary.tasks[0].pad_share == pytest.approx(3 / 12)


def test_missing_later_files_are_named(tmp_path: Path) -> None:
    summary = prepare(write(tmp_path, finetune_like=None, gender=None), tmp_path / "out")
    assert [task.name for task in summary.tasks] == ["watching", "clicking", "age", "life_status"]
    assert summary.notes == (
        "task thumb-up skipped: no original_desen_finetune_like_nouserID.csv",
        "task gender skipped: no original_desen_gender.csv",
    )
    assert open_dataset(tmp_path / "out").source["notes"] == list(summary.notes)


def test_first_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"original_desen_pretrain.csv: no such file; expected the first task"):
        prepare(write(tmp_path, pretrain=None), tmp_path / "out")
    with pytest.raises(ConfigError, match="ttl: got no SOURCE"):
        prepare(None, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"finetune_click": "0,0,12,7,,31\n0,0,12,13,,4\n"}, "original_desen_finetune_click_nouserID.csv:2"),
        ({"age": "0,0,12,7,,3\n0,0,12,7\n"}, "original_desen_age.csv:2"),
        ({"gender": "0,12,7,,1\n"}, "original_desen_gender.csv:1"),
        ({"pretrain": "0,0,12,7\n0,nan,100,12\n"}, "original_desen_pretrain.csv:2"),
        ({"lifestatus": ""}, "original_desen_lifestatus.csv"),
    ],
    ids=["unseen item", "no label", "other length than the first task", "no number", "empty file"],
)
def test_malformed_files_leave_no_output(tmp_path: Path, changes: dict[str, str], place: str) -> None:
    write(tmp_path, **changes)
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, tmp_path / "out")
    assert place in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)


def test_unseen_items_can_be_dropped(tmp_path: Path) -> None:
    write(tmp_path, finetune_click="0,12,13,7,,31\n")
    summary = prepare(tmp_path, tmp_path / "out", unseen="drop")
    assert open_dataset(tmp_path / "out").tasks[1].sequences.tolist() == [[0, 0, 3, 1]]
    assert any("clicking: 1 items" in note for note in summary.notes)


def test_length_pads_and_cuts(tmp_path: Path) -> None:
    prepare(write(tmp_path, pretrain="12,7\n7,9,100,12\n", finetune_click="7,,4\n"), tmp_path / "out", length=3)
    data = open_dataset(tmp_path / "out")
    assert data.tasks[0].sequences.tolist() == [[0, 3, 1], [2, 4, 3]]
    assert data.tasks[1].sequences.tolist() == [[0, 0, 1]]


def test_extended_and_with_buckets(tmp_path: Path) -> None:
    prepare(write(tmp_path), tmp_path / "old", min_count=2, buckets=3)
    old = open_dataset(tmp_path / "old")
    assert list(old.item_ids())[4:] == ["7", "9", "12", "100"], "all four occur twice"
    write(tmp_path, pretrain="5,5,12,7\n0,9,100,3\n", age="0,0,12,7,,2\n")
    prepare(tmp_path, tmp_path / "new", extend=tmp_path / "old", min_count=2)
    new = open_dataset(tmp_path / "new")
    assert list(new.item_ids()) == [*old.item_ids(), "5"]
    bucket = new.item_dictionary().bucket_of(np.array([3]))[0]
    assert new.tasks[0].sequences.tolist() == [[8, 8, 6, 4], [0, 5, 7, bucket]]
    assert list(new.tasks[3].label_ids()) == ["1", "3", "2"] and new.tasks[3].samples.tolist() == [[0, 2]]
