"""A prepared data set on disk: written in blocks by `DatasetWriter`, opened memory-mapped by `open_dataset`.

    DATA/
      dataset.json      format_version, name, length L, num_items V (with the pad), tasks, source
      items.parquet     id (string), index (int64); row 0 is the pad "0"
      task1/            sequences.npy int32 [N, L], left-padded with 0    lengths.npy int32 [N] (L minus the leading zeros)
                        groups.npy int64 [N] (user ids)                   samples.npy int32 [S, 2] (row, label)
      task2/ ...        the same, and labels.parquet

Nothing in the folder is evaluated or unpickled.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from teracon_fast.data.blocks import LabelArrays, RawIds, Rows, as_blocks
from teracon_fast.data.dictionaries import PAD, Dictionary, bucket_names
from teracon_fast.data.layout import (
    FORMAT_VERSION,
    Kind,
    TaskMeta,
    check_dictionary,
    check_values,
    open_array,
    read_about,
)
from teracon_fast.data.task_files import Duplicates, TaskFiles, Unseen
from teracon_fast.errors import ConfigError, DataError
from teracon_fast.files import atomic_write

__all__ = ["DatasetWriter", "Duplicates", "Kind", "TaskData", "TaskMeta", "TaskSequence", "Unseen", "open_dataset"]

_log = logging.getLogger("teracon_fast.data")


@dataclass(frozen=True)
class Known:
    """Dictionaries of an earlier data set: its items, and by the name of each task its labels."""

    items: Dictionary | None = None
    labels: Mapping[str, Dictionary] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> Known:
        """Those of a prepared folder or a run folder.

        Raises:
            DataError: neither of them, or a dictionary is missing or damaged.
        """
        path = Path(path)
        tasks = enumerate(read_about(path).tasks, 1)
        labels = {
            task.name: Dictionary.load(path / f"task{number}" / "labels.parquet")
            for number, task in tasks
            if task.kind == "label"
        }
        return cls(Dictionary.load(path / "items.parquet"), labels)


def _with_buckets(known: Dictionary | None, min_count: int, buckets: int | None) -> Dictionary | None:
    """The item dictionary that task 1 extends: pad and buckets, where it is not given."""
    if min_count < 1 or (buckets is not None and buckets < 0):
        raise ConfigError(f"got min_count {min_count}, buckets {buckets}; expected at least 1 and at least 0")
    there = 0 if known is None else known.buckets
    wanted = there if buckets is None else buckets
    if known is not None and wanted != there:
        raise ConfigError(f"got {wanted} buckets; expected the {there} of the data set that is extended")
    if min_count > 1 and not wanted:
        raise ConfigError(f"got min_count {min_count} and no buckets; expected buckets for the rarer items")
    if known is None and wanted:
        if min_count == 1:
            raise ConfigError(f"got {wanted} buckets and min_count 1: nothing would train them; expected min_count above 1")
        return Dictionary([PAD, *bucket_names(wanted)])
    return known


class DatasetWriter:
    """Writes a prepared folder. Everything goes to a hidden temporary folder beside `path`, which gets the name `path` when the
    context ends without an error. After an error or a kill `path` is as it was (a killed process leaves the hidden folder).

        with DatasetWriter("data/ml", name="ml-1m", length=30) as writer:
            writer.add_task("watch", "next_item", sequences, groups=users)                  # raw ids [N, 30]
            writer.add_task("age", "label", sequences, labels=ages, groups=users)           # one label a row
            writer.add_task("like", "label", sequences, labels=(rows, items), groups=users) # any number of labels a row
            writer.add_task("click", "label", read_sequences_csv("click.csv", labels=True)) # streamed, block by block

    Ids given to the writer are RAW ids (integers, or strings); the writer makes the dictionaries. Task 1 defines the item
    dictionary (all its ids, ascending, 0 stays the pad); later tasks must use its ids. Every task has its own label dictionary.

    Args:
        path: folder to make. Its parent is created when missing.
        name: name of the data set.
        length: L, the number of columns of every task's sequences; None takes it from the first block of the first task.
        source: where the data came from, kept in dataset.json; must be JSON-serialisable.
        items: an existing item dictionary (for instance the published program's); then task 1 is also held to it.
        extend: a prepared folder or a run folder. Its items, and the labels of its tasks (by name), keep their indices, whether
            or not they occur; new ones follow them, ascending.
        min_count: items that occur less often than this in task 1 get no index of their own but share buckets.
        buckets: number of buckets, indices 1 to `buckets`; an item's bucket follows from its raw id (`bucket_number`). Later
            tasks' items that task 1 does not have go to their buckets too, whatever `unseen` says. None: those of `extend`.
        overwrite: replace an existing folder at `path`, which must be a prepared data set; otherwise it is refused.

    Raises:
        DataError: on bad data, see `add_task`; at the end, when no task was added.
        ConfigError: min_count without buckets or buckets without min_count, or other buckets than those of `extend`.
    """

    def __init__(
        self,
        path: str | Path,
        name: str,
        length: int | None = None,
        source: Mapping[str, Any] | None = None,
        *,
        items: Dictionary | None = None,
        extend: str | Path | None = None,
        min_count: int = 1,
        buckets: int | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path, self.name, self.length = Path(path), name, length
        if length is not None and length < 1:
            raise DataError(self.path, f"got length {length}; expected at least 1")
        self.source: dict[str, Any] = dict(source or {})
        self.items = items
        if items is not None and (extend is not None or min_count > 1 or buckets):
            raise ConfigError("got an item dictionary and extend, min_count or buckets; expected either")
        self._known = Known() if extend is None else Known.read(extend)
        if extend is not None:
            self.source["extends"] = str(extend)
        self._known_items = _with_buckets(self._known.items, min_count, buckets)
        self._min_count = min_count
        self.tasks: list[TaskMeta] = []
        self._overwrite = overwrite
        if self.path.exists():
            if not overwrite:
                raise DataError(self.path, "exists already; expected a new folder, or overwrite=True")
            if not (self.path / "dataset.json").is_file():
                raise DataError(self.path, "exists and is not a prepared data set: not overwritten")
        json.dumps(self.source)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(dir=self.path.parent, prefix=f".{self.path.name}.", suffix=".tmp"))

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            try:
                self.close()
                return
            except BaseException:
                self.abort()
                raise
        self.abort()

    def add_task(
        self,
        name: str,
        kind: Kind,
        sequences: npt.NDArray[Any] | Iterable[Rows],
        labels: RawIds | LabelArrays | None = None,
        groups: npt.NDArray[Any] | None = None,
        *,
        unseen: Unseen = "error",
        duplicates: Duplicates = "keep",
    ) -> TaskMeta:
        """Write one task.

        Args:
            name: name of the task, unique in the data set.
            kind: "next_item" for the first task and only for it (takes no labels), "label" for the others.
            sequences: RAW item ids [N, L], left-padded with 0 (`pad_left` makes that from ragged lists), oldest first: one array
                of integers (or strings), or an iterable of such arrays [n, L] or of `Block`s (which may carry labels and groups).
            labels: raw labels (integers or strings): [N], one a row, or a pair (rows [S] integer row numbers counted over the
                whole task, values [S]). None when blocks carry them.
            groups: [N] integers, the user of each row: the split by user keeps a user's rows on one side. Use the same ids in all
                tasks. None: what the blocks carry, else every row is its own user.
            unseen: an item id that task 1 does not have: "error" refuses it, "pad" puts the pad in its place, "drop" takes it out
                of its row and shifts the older items right.
            duplicates: a label given twice to one row: "keep" both as samples (the published program does), "drop", or "error".

        Returns:
            what is recorded of the task.

        Raises:
            DataError: naming file and line (or row): sequences not 2-D or not L wide, ids that are neither integers nor
                strings, an unseen item, a label for a row that does not exist, no labels, no rows.
        """
        number = len(self.tasks) + 1
        if (kind == "next_item") != (number == 1):
            raise DataError(
                self.path, f"task {number} {name!r} is {kind!r}; expected 'next_item' for task 1, 'label' after it"
            )
        if name in (task.name for task in self.tasks):
            raise DataError(self.path, f"two tasks are named {name!r}; expected different names")
        if kind == "next_item" and labels is not None:
            raise DataError(
                self.path, f"task {name!r} is 'next_item' but got labels; its label is the last item of each row"
            )
        if unseen not in ("error", "pad", "drop"):
            raise DataError(self.path, f"got unseen={unseen!r}; expected 'error', 'pad' or 'drop'")
        if duplicates not in ("keep", "drop", "error"):
            raise DataError(self.path, f"got duplicates={duplicates!r}; expected 'keep', 'drop' or 'error'")
        task = TaskFiles(
            self._folder / f"task{number}", kind, self.length, self.items, unseen, duplicates,
            known_items=self._known_items, known_labels=self._known.labels.get(name), min_count=self._min_count,
        )  # fmt: skip
        for block in as_blocks(sequences, labels, groups):
            if len(block.items):
                task.add(block)
        meta = task.finish(name)
        self.length, self.items = task.length, task.items
        self.tasks.append(meta)
        for note in meta.notes:
            _log.warning("task %s: %s", name, note)
        return meta

    def close(self) -> None:
        """Write the dictionary and dataset.json, and give the folder its name."""
        if not self.tasks or self.items is None:
            raise DataError(self.path, "no task was added")
        self.items.save(self._folder / "items.parquet")
        about = {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "length": self.length,
            "num_items": len(self.items),
        }
        text = json.dumps({**about, "tasks": [asdict(task) for task in self.tasks], "source": self.source}, indent=2)
        with atomic_write(self._folder / "dataset.json", "w") as file:
            file.write(text + "\n")
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(self._folder, 0o777 & ~umask)
        old = None
        if self._overwrite and self.path.exists():
            old = Path(tempfile.mkdtemp(dir=self.path.parent, prefix=f".{self.path.name}.", suffix=".old"))
            os.replace(self.path, old)
        os.replace(self._folder, self.path)
        if old is not None:
            shutil.rmtree(old)

    def abort(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self._folder, ignore_errors=True)


@dataclass(frozen=True, eq=False)
class TaskData:
    """One task of an opened data set. The arrays are memory-mapped and read-only.

    Attributes:
        name, kind: see `TaskMeta`.
        num_labels: C (V for a next_item task).
        sequences: int32 [N, L] dense item indices, left-padded with 0.
        lengths: int32 [N], L minus the number of leading zeros.
        groups: int64 [N] user ids.
        samples: int32 [S, 2], (row, label); for next_item the label is the last item of the row.
        path: the folder of the task.
        names: of the labels, where no file has them.
    """

    name: str
    kind: Kind
    num_labels: int
    sequences: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    groups: npt.NDArray[np.int64]
    samples: npt.NDArray[np.int32]
    path: Path
    names: tuple[str, ...] = ()

    def label_ids(self) -> npt.NDArray[np.object_]:
        """[C] raw label of every index (raw item ids for a next_item task), of type str."""
        if self.kind == "next_item":
            return Dictionary.load(self.path.parent / "items.parquet").ids
        if self.names:
            return np.array(self.names, dtype=object)
        return Dictionary.load(self.path / "labels.parquet").ids


@dataclass(frozen=True, eq=False)
class TaskSequence:
    """An opened data set.

    Attributes:
        path, name: folder and name.
        length: L.
        num_items: V, with the pad.
        tasks: in order of training.
        metas: what dataset.json records of each task, with the notes.
        source: where the data came from.
    """

    path: Path
    name: str
    length: int
    num_items: int
    tasks: list[TaskData]
    metas: list[TaskMeta]
    source: dict[str, Any]

    def item_ids(self) -> npt.NDArray[np.object_]:
        """[V] raw id of every item index, of type str; index 0 is the pad "0"."""
        return self.item_dictionary().ids

    def item_dictionary(self) -> Dictionary:
        """The item dictionary, for encoding raw ids."""
        return Dictionary.load(self.path / "items.parquet")


def open_dataset(path: str | Path, validate: bool = True) -> TaskSequence:
    """Open a prepared folder, memory-mapped.

    Args:
        path: the folder.
        validate: also read all arrays once and check every value: items in [0, V), labels in [0, C), rows of samples in [0, N),
            lengths equal to L minus the leading zeros, dictionaries of the recorded sizes.

    Raises:
        DataError: naming the file: no prepared data set, another format version, missing, truncated or foreign files,
            shapes, dtypes or values that do not fit.
    """
    path = Path(path)
    about = read_about(path)
    check_dictionary(path / "items.parquet", about.num_items)
    tasks = []
    for number, meta in enumerate(about.tasks, 1):
        folder, rows = path / f"task{number}", meta.num_rows
        if meta.kind == "label":
            check_dictionary(folder / "labels.parquet", meta.num_labels)
        elif meta.num_labels != about.num_items:
            reason = f"task 1 has num_labels {meta.num_labels}; expected num_items {about.num_items}"
            raise DataError(path / "dataset.json", reason)
        tasks.append(
            TaskData(
                name=meta.name,
                kind=meta.kind,
                num_labels=meta.num_labels,
                sequences=open_array(folder / "sequences.npy", np.int32, (rows, about.length)),
                lengths=open_array(folder / "lengths.npy", np.int32, (rows,)),
                groups=open_array(folder / "groups.npy", np.int64, (rows,)),
                samples=open_array(folder / "samples.npy", np.int32, (meta.num_samples, 2)),
                path=folder,
            )
        )
        if validate:
            check_values(folder, meta, about.length, about.num_items)
    return TaskSequence(path, about.name, about.length, about.num_items, tasks, about.tasks, about.source)
