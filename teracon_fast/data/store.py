"""A prepared data set on disk: written in blocks by `DatasetWriter`, opened memory-mapped by `open_dataset`.

    DATA/
      dataset.json      format_version, name, length L, num_items V (with the pad), tasks, source
      items.parquet     id (string), index (int64); index 0 is the pad "0"
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
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from teracon_fast.data.blocks import LabelArrays, RawIds, Rows, as_blocks
from teracon_fast.data.dictionaries import PAD, Dictionary, DictionaryBuilder, bucket_names
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
from teracon_fast.files import atomic_write, make_public

_log = logging.getLogger("teracon_fast.data")


def read_dictionaries(path: str | Path) -> tuple[Dictionary, dict[str, Dictionary]]:
    """Those of the items, and of the labels by task name, of a prepared folder or a run folder; DataError if it is neither, or
    one is missing or damaged.
    """
    path = Path(path)
    later = enumerate(read_about(path).tasks[1:], 2)
    labels = {task.name: Dictionary.load(path / f"task{number}" / "labels.parquet") for number, task in later}
    return Dictionary.load(path / "items.parquet"), labels


def _with_buckets(known: Dictionary | None, min_count: int, buckets: int | None) -> Dictionary | None:
    """The item dictionary that task 1 extends: `known`, or one of the pad and buckets."""
    if min_count < 1 or (buckets is not None and buckets < 0):
        raise ConfigError(f"--min-count {min_count}, --buckets {buckets}: expected at least 1 and at least 0")
    there = 0 if known is None else known.buckets
    wanted = there if buckets is None else buckets
    if known is not None and wanted != there:
        raise ConfigError(f"--buckets {wanted}: expected the {there} of the data set that is extended")
    if min_count > 1 and not wanted:
        raise ConfigError(f"--min-count {min_count} without --buckets: expected buckets for the rarer items")
    if known is None and wanted:
        if min_count == 1:
            raise ConfigError(f"--buckets {wanted} without --min-count above 1: no item would train them")
        return Dictionary([PAD, *bucket_names(wanted)])
    return known


def check_output(output: Path, overwrite: bool) -> None:
    """DataError if `output` exists, and `overwrite` is False or it is not a prepared data set."""
    if not output.exists():
        return
    if not overwrite:
        raise DataError(output, "already exists; expected a new folder, or --overwrite")
    if not (output / "dataset.json").is_file():
        raise DataError(output, "not a prepared data set, so not overwritten; expected a new folder")


class DatasetWriter:
    """Writes a prepared folder atomically: to a hidden temporary folder beside `path`, renamed to `path` when the context ends
    without an error. A killed process leaves the hidden folder behind and `path` untouched.

        with DatasetWriter("data/ml", name="ml-1m", length=30) as writer:
            writer.add_task("watch", "next_item", sequences, groups=users)                  # raw ids [N, 30]
            writer.add_task("age", "label", sequences, labels=ages, groups=users)           # one label per row
            writer.add_task("like", "label", sequences, labels=(rows, items), groups=users) # any number of labels per row
            writer.add_task("click", "label", read_sequences_csv("click.csv", labels=True)) # streamed, block by block

    The writer takes raw ids (integers or strings) and makes the dictionaries. Task 1 defines the item dictionary (all its ids,
    ascending, 0 is the pad); later tasks must use its ids. Every task has its own label dictionary.

    Args:
        path: folder to create, with its parents.
        name: name of the data set.
        length: L, the number of columns of every task's sequences; None takes it from the first block of the first task.
        source: origin of the data, recorded in dataset.json; must be JSON-serializable.
        items: an existing item dictionary (such as the published program's), which task 1 must use too.
        extend: a prepared folder or a run folder. Its items, and the labels of its tasks (by name), keep their indices, whether
            or not they occur; new ones follow in ascending order.
        min_count: items that occur less often in task 1 get no index of their own but share buckets.
        buckets: number of buckets, indices 1 to `buckets`; the raw id of an item decides its bucket (`bucket_number`). Items of
            later tasks that task 1 lacks go to buckets too, whatever `unseen` is. None: the buckets of `extend`.
        overwrite: replace an existing prepared folder at `path`.

    Raises:
        DataError: bad data, see `add_task`; no task was added; `path` exists and may not be replaced.
        ConfigError: `min_count` without buckets or the reverse, or other buckets than those of `extend`.
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
            raise ConfigError("got an item dictionary and options that make another (extend, min_count, buckets)")
        known: Dictionary | None = None
        self._known_labels: dict[str, Dictionary] = {}
        if extend is not None:
            known, self._known_labels = read_dictionaries(extend)
            self.source["extends"] = str(extend)
        self._known_items = _with_buckets(known, min_count, buckets)
        self._min_count = min_count
        self.tasks: list[TaskMeta] = []
        self._overwrite = overwrite
        check_output(self.path, overwrite)
        json.dumps(self.source)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(dir=self.path.parent, prefix=f".{self.path.name}.", suffix=".tmp"))

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)  # not there any more if it was renamed

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
            kind: "next_item" (without labels) for the first task, "label" for all others.
            sequences: raw item ids [N, L], oldest first, left-padded with 0 (`pad_left` pads ragged lists): one array of integers
                or strings, or an iterable of such arrays [n, L] or of `Block`s (which may carry labels and groups).
            labels: raw labels (integers or strings): [N], one per row, or a pair (rows [S], integer rows of the whole task, and
                values [S]). None if the blocks carry them.
            groups: [N] integers, the user of each row, for the split by user; the same ids in all tasks. None: those of the
                blocks, else each row is its own user.
            unseen: an item id that task 1 does not have: "error" refuses it, "pad" replaces it by the pad, "drop" removes it
                and shifts the older items right.
            duplicates: a label given twice to a row: "keep" both as samples (as the published program does), "drop" or "error".

        Returns:
            The record of the task in dataset.json.

        Raises:
            DataError: names file and line (or row): sequences not 2-D or not L wide, ids that are neither integers nor
                strings, an unseen item, a label for a row that does not exist, no labels, no rows.
        """
        number = len(self.tasks) + 1
        where = f"task {number} ({name})"
        if (kind == "next_item") != (number == 1):
            raise DataError(self.path, f"{where}: got kind {kind!r}; expected 'next_item' for task 1, 'label' for the others")
        if name in (task.name for task in self.tasks):
            raise DataError(self.path, f"got two tasks named {name!r}; expected distinct names")
        if kind == "next_item" and labels is not None:
            raise DataError(self.path, f"{where}: got labels; expected none, since the last item of each row is the label")
        if unseen not in get_args(Unseen):
            raise DataError(self.path, f"unseen items: got {unseen!r}; expected 'error', 'pad' or 'drop'")
        if duplicates not in get_args(Duplicates):
            raise DataError(self.path, f"duplicate labels: got {duplicates!r}; expected 'keep', 'drop' or 'error'")
        items = DictionaryBuilder(True, self._known_items, self._min_count) if self.items is None else self.items
        new_labels = DictionaryBuilder(False, self._known_labels.get(name))
        task = TaskFiles(self._folder / f"task{number}", kind, self.length, items, new_labels, unseen, duplicates)
        for block in as_blocks(sequences, labels, groups):
            if len(block.items):
                task.add(block)
        meta = task.finish(name)
        self.length, self.items = task.length, task.items
        self.tasks.append(meta)
        for note in meta.notes:
            _log.warning("task %s: %s", name, note)
        return meta

    def _finish(self) -> None:
        """Write the item dictionary and dataset.json, and rename the folder."""
        if not self.tasks or self.items is None:
            raise DataError(self.path, "got no tasks; expected at least one")
        self.items.save(self._folder / "items.parquet")
        about = {"format_version": FORMAT_VERSION, "name": self.name, "length": self.length, "num_items": len(self.items)}
        about |= {"tasks": [asdict(task) for task in self.tasks], "source": self.source}
        with atomic_write(self._folder / "dataset.json", "w") as file:
            file.write(json.dumps(about, indent=2) + "\n")
        make_public(self._folder, 0o777)
        old = None
        if self._overwrite and self.path.exists():
            old = Path(tempfile.mkdtemp(dir=self.path.parent, prefix=f".{self.path.name}.", suffix=".old"))
            os.replace(self.path, old)
        os.replace(self._folder, self.path)
        if old is not None:
            shutil.rmtree(old)


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
        notes: see `TaskMeta`.
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
    notes: list[str] = field(default_factory=list)
    names: tuple[str, ...] = ()

    @property
    def meta(self) -> TaskMeta:
        """The record of the task in dataset.json."""
        sizes = len(self.sequences), len(self.samples), self.num_labels
        return TaskMeta(self.name, self.kind, *sizes, self.notes)

    def label_ids(self) -> npt.NDArray[np.object_]:
        """[C] str: the raw label of each index (raw item ids for a next_item task)."""
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
        source: origin of the data.
    """

    path: Path
    name: str
    length: int
    num_items: int
    tasks: list[TaskData]
    source: dict[str, Any]

    def item_ids(self) -> npt.NDArray[np.object_]:
        """[V] str: the raw id of each item index; index 0 is the pad "0"."""
        return self.item_dictionary().ids

    def item_dictionary(self) -> Dictionary:
        """The item dictionary, which encodes raw ids."""
        return Dictionary.load(self.path / "items.parquet")


def open_dataset(path: str | Path, validate: bool = True) -> TaskSequence:
    """Open a prepared folder, memory-mapped.

    Args:
        path: the folder.
        validate: also check every value: items in [0, V), labels in [0, C), rows of samples in [0, N), lengths equal to L minus
            the leading zeros.

    Raises:
        DataError: names the file: not a prepared data set, another format version, missing or truncated files, wrong shapes,
            dtypes, values or sizes of dictionaries.
    """
    path = Path(path)
    about = read_about(path)
    check_dictionary(path / "items.parquet", about.num_items)
    tasks = []
    for number, meta in enumerate(about.tasks, 1):
        folder, rows = path / f"task{number}", meta.num_rows
        if number > 1:
            check_dictionary(folder / "labels.parquet", meta.num_labels)
        elif meta.num_labels != about.num_items:
            reason = f"task 1: got {meta.num_labels} labels; expected {about.num_items}, one per item"
            raise DataError(path / "dataset.json", reason)
        sequences = open_array(folder / "sequences.npy", np.int32, (rows, about.length))
        lengths = open_array(folder / "lengths.npy", np.int32, (rows,))
        groups = open_array(folder / "groups.npy", np.int64, (rows,))
        samples = open_array(folder / "samples.npy", np.int32, (meta.num_samples, 2))
        arrays = sequences, lengths, groups, samples
        tasks.append(TaskData(meta.name, meta.kind, meta.num_labels, *arrays, folder, meta.notes))
        if validate:
            check_values(folder, meta, about.length, about.num_items)
    return TaskSequence(path, about.name, about.length, about.num_items, tasks, about.source)
