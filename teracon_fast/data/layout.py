"""Reading a prepared folder: dataset.json, and checks of its arrays. The layout is described in store.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from teracon_fast.data.dictionaries import pyarrow
from teracon_fast.errors import DataError

FORMAT_VERSION = 1
Kind: TypeAlias = Literal["next_item", "label"]


@dataclass(frozen=True)
class TaskMeta:
    """What `dataset.json` records of one task.

    Attributes:
        name: "watch", "age", ...
        kind: "next_item" for the first task (one sample per row, whose label is the last item), "label" for later ones.
        num_rows, num_samples: N and S.
        num_labels: C (V for a next_item task).
        notes: oddities accepted during preparation (rows of only pads, repeated labels, ...), one sentence each.
    """

    name: str
    kind: Kind
    num_rows: int
    num_samples: int
    num_labels: int
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class About:
    """dataset.json, checked."""

    name: str
    length: int
    num_items: int
    tasks: list[TaskMeta]
    source: dict[str, Any]


def read_about(folder: Path) -> About:
    """Read dataset.json; DataError if it is missing, not JSON, of another format version, or lacks a field or its type."""
    path = folder / "dataset.json"
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(folder, f"not a prepared data set (dataset.json: {error.strerror})") from error
    except ValueError as error:
        raise DataError(path, f"not JSON: {error}") from error
    version = read.get("format_version") if isinstance(read, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(path, f"got format_version {version!r}; expected {FORMAT_VERSION}")
    _check_fields(path, read, {"name": str, "length": int, "num_items": int, "tasks": list, "source": dict})
    tasks = []
    kinds = {"name": str, "kind": str, "num_rows": int, "num_samples": int, "num_labels": int}
    for number, task in enumerate(read["tasks"], 1):
        _check_fields(path, task, kinds)
        expected = "next_item" if number == 1 else "label"
        if task["kind"] != expected:
            raise DataError(path, f"task {number}: got kind {task['kind']!r}; expected {expected!r}")
        tasks.append(TaskMeta(**{key: task[key] for key in kinds}, notes=list(task.get("notes", []))))
    if not tasks:
        raise DataError(path, "no tasks; expected at least one")
    return About(read["name"], read["length"], read["num_items"], tasks, read["source"])


def _check_fields(path: Path, read: Any, kinds: Mapping[str, type]) -> None:
    for key, kind in kinds.items():
        value = read.get(key) if isinstance(read, dict) else None
        if type(value) is not kind or (isinstance(value, int) and value < 1):
            raise DataError(path, f"got {key} = {value!r}; expected a {'positive ' if kind is int else ''}{kind.__name__}")


def open_array(path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """A .npy file, memory-mapped read-only; DataError if it is missing, not .npy, truncated or too long, or has another dtype,
    shape or memory order.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(path, f"missing, truncated or not a .npy file: {error}") from error
    if not isinstance(array, np.memmap):
        raise DataError(path, "got an archive of arrays; expected one array")
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        order = "" if array.flags.c_contiguous else " in Fortran order"
        raise DataError(path, f"got {array.dtype} {array.shape}{order}; expected {np.dtype(dtype)} {shape}")
    expected = array.offset + array.nbytes
    if path.stat().st_size != expected:
        raise DataError(path, f"got {path.stat().st_size} bytes; expected {expected}")
    return array


def check_dictionary(path: Path, size: int) -> None:
    """DataError unless a dictionary file is there, whole, Parquet, and has `size` ids."""
    pa = pyarrow()
    from pyarrow import parquet

    try:
        rows = parquet.read_metadata(path).num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(path, f"missing, truncated or not Parquet: {error}") from error
    if rows != size:
        raise DataError(path, f"got {rows} ids; expected {size}")


def check_values(folder: Path, meta: TaskMeta, length: int, num_items: int, values_per_block: int = 1 << 22) -> None:
    """Check every value of the arrays of a task, block by block. `open_array` must have accepted them.

    Raises:
        DataError: names the file and the first bad row.
    """
    lengths, samples = np.load(folder / "lengths.npy"), np.load(folder / "samples.npy")
    path = folder / "samples.npy"
    _check_range(path, samples[:, 0], meta.num_rows, "row")
    _check_range(path, samples[:, 1], meta.num_labels, "label")
    if meta.kind == "next_item" and not np.array_equal(samples[:, 0], np.arange(meta.num_rows)):
        raise DataError(path, "got other samples; expected one per row, in order, in a next_item task")
    path = folder / "sequences.npy"
    offset = np.load(path, mmap_mode="r").offset
    step = max(values_per_block // length, 1)
    for start in range(0, meta.num_rows, step):
        rows = min(step, meta.num_rows - start)
        # Read instead of mapped: mapped pages would count towards the memory of this process.
        block = np.fromfile(path, np.int32, rows * length, offset=offset + 4 * start * length).reshape(rows, length)
        _check_range(path, block, num_items, "item", start)
        counted = leading_to_lengths(block)
        wrong = counted != lengths[start : start + rows]
        if wrong.any():
            row = int(wrong.argmax())
            got = int(lengths[start + row])
            raise DataError(folder / "lengths.npy", f"got length {got}; the row has {counted[row]} items", start + row)
        if meta.kind == "next_item" and not np.array_equal(block[:, -1], samples[start : start + rows, 1]):
            row = int((block[:, -1] != samples[start : start + rows, 1]).argmax())
            raise DataError(folder / "samples.npy", "got a label other than the last item of its row", start + row)


def leading_to_lengths(block: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """int32 [n]: L minus the number of leading zeros of each row of int32 [n, L]."""
    real = block != 0
    width = block.shape[1]
    return np.where(real.any(axis=1), width - real.argmax(axis=1), 0).astype(np.int32)


def _check_range(path: Path, values: npt.NDArray[np.int32], size: int, what: str, first_row: int = 0) -> None:
    if values.min() < 0 or values.max() >= size:
        wrong = (values < 0) | (values >= size)
        row = int(np.nonzero(wrong)[0][0])
        raise DataError(path, f"got {what} {values[wrong][0]}; expected 0 to {size - 1}", first_row + row)
