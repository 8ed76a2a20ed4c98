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
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from teracon_fast.data.blocks import Block, LabelArrays, RawIds, Rows, as_blocks
from teracon_fast.data.dictionaries import PAD, Dictionary, DictionaryBuilder
from teracon_fast.data.npy import NpyWriter, remap
from teracon_fast.errors import DataError
from teracon_fast.files import atomic_write

FORMAT_VERSION = 1
Kind: TypeAlias = Literal["next_item", "label"]
Unseen: TypeAlias = Literal["error", "pad", "drop"]
Duplicates: TypeAlias = Literal["keep", "drop", "error"]

_log = logging.getLogger("teracon_fast.data")


@dataclass(frozen=True)
class TaskMeta:
    """What `dataset.json` says of one task.

    Attributes:
        name: "watch", "age", ...
        kind: "next_item" for the first task (one sample a row, its label the last item), "label" for all later ones.
        num_rows, num_samples: N and S.
        num_labels: C; of a next_item task, V.
        notes: oddities that were accepted while preparing (rows of only pads, repeated labels, ...), in words.
    """

    name: str
    kind: Kind
    num_rows: int
    num_samples: int
    num_labels: int
    notes: list[str] = field(default_factory=list)


class DatasetWriter:
    """Writes a prepared folder. Everything goes to a temporary folder beside `path`, renamed to `path` when the context ends
    without an error; after an error or a kill, `path` is as it was.

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
        overwrite: replace an existing folder at `path`, which must be a prepared data set; otherwise it is refused.

    Raises:
        DataError: on bad data, see `add_task`; at the end, when no task was added.
    """

    def __init__(
        self,
        path: str | Path,
        name: str,
        length: int | None = None,
        source: Mapping[str, Any] | None = None,
        *,
        items: Dictionary | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path, self.name, self.length = Path(path), name, length
        if length is not None and length < 1:
            raise DataError(self.path, f"got length {length}; expected at least 1")
        self.source: dict[str, Any] = dict(source or {})
        self.items = items
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
        task = _TaskFiles(self, self._folder / f"task{number}", kind, unseen, duplicates)
        for block in as_blocks(sequences, labels, groups):
            if len(block.items):
                task.add(block)
        meta = task.finish(name)
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


class _TaskFiles:
    """The arrays of one task while they are written."""

    def __init__(self, writer: DatasetWriter, folder: Path, kind: Kind, unseen: Unseen, duplicates: Duplicates) -> None:
        self.writer, self.folder, self.kind, self.unseen, self.duplicates = writer, folder, kind, unseen, duplicates
        folder.mkdir()
        self.new_items = DictionaryBuilder(pad=True) if writer.items is None else None
        self.label_builder = DictionaryBuilder(pad=False)
        self.sequences: NpyWriter | None = None
        self.lengths = NpyWriter(folder / "lengths.npy", np.int32)
        self.groups = NpyWriter(folder / "groups.npy", np.int64)
        self.samples: list[npt.NDArray[np.int32]] = []
        self.rows = 0
        self.counts = dict.fromkeys(("empty", "inner", "ending", "unseen", "repeated"), 0)

    def add(self, block: Block) -> None:
        writer = self.writer
        if block.items.ndim != 2:
            raise block.error(0, f"got sequences of shape {block.items.shape}; expected [rows, length]")
        rows, width = block.items.shape
        if writer.length is None:
            writer.length = width
        if width != writer.length or width < 1:
            raise block.error(0, f"got rows of {width} items; expected {writer.length}")
        codes = self._encode_items(block)
        real = codes != 0
        leading = np.where(real.any(axis=1), real.argmax(axis=1), width)
        lengths = (width - leading).astype(np.int32)
        self.counts["empty"] += int((lengths == 0).sum())
        self.counts["ending"] += int(((lengths > 0) & ~real[:, -1]).sum())
        self.counts["inner"] += int((real.sum(axis=1) < lengths).sum())
        if self.sequences is None:
            self.sequences = NpyWriter(self.folder / "sequences.npy", np.int32, (width,))
        self.sequences.append(codes)
        self.lengths.append(lengths)
        groups = np.arange(self.rows, self.rows + rows) if block.groups is None else np.asarray(block.groups)
        if groups.shape != (rows,) or groups.dtype.kind not in "iu":
            raise block.error(0, f"got groups {groups.dtype}{groups.shape}; expected {rows} integers")
        self.groups.append(groups)
        if self.kind == "label":
            self._add_labels(block)
        else:
            last = np.stack([np.arange(self.rows, self.rows + rows), codes[:, -1]], axis=1)
            self.samples.append(last.astype(np.int32))
        self.rows += rows
        if self.rows > np.iinfo(np.int32).max:
            raise block.error(rows - 1, f"more than {np.iinfo(np.int32).max} rows")

    def _encode_items(self, block: Block) -> npt.NDArray[np.int32]:
        try:
            if self.new_items is not None:
                return self.new_items.add(block.items)
            assert self.writer.items is not None
            codes = self.writer.items.encode(block.items)
        except TypeError as error:
            raise block.error(0, f"items: {error}") from error
        missing = codes < 0
        if not missing.any():
            return codes
        if self.unseen == "error":
            row, column = np.argwhere(missing)[0]
            raise block.error(int(row), f"item {str(block.items[row, column])!r} is not in the item dictionary (made from task 1, "
                              f"{len(self.writer.items)} ids); expected known items, or unseen='pad' or 'drop'")  # fmt: skip
        self.counts["unseen"] += int(missing.sum())
        codes[missing] = 0
        if self.unseen == "drop":
            # Stable sort by "kept": the dropped places come first, as pads, and the rest keep their order.
            codes = np.take_along_axis(codes, np.argsort(~missing, axis=1, kind="stable"), axis=1)
        return codes

    def _add_labels(self, block: Block) -> None:
        if block.label_rows is None or block.label_values is None:
            raise block.error(0, "no labels; expected at least one label a row for a task of kind 'label'")
        try:
            codes = self.label_builder.add(np.asarray(block.label_values))
        except TypeError as error:
            raise block.error(0, f"labels: {error}") from error
        rows = np.asarray(block.label_rows)
        if rows.shape != codes.shape or (len(rows) and not 0 <= rows.min() <= rows.max() < len(block.items)):
            raise block.error(
                0, f"got {rows.shape} label rows and {codes.shape} labels; expected one row of the block per label"
            )
        pairs = np.stack([rows + self.rows, codes], axis=1).astype(np.int32)
        if len(rows) and not (np.diff(rows) > 0).all():
            pairs = self._without_duplicates(block, pairs)
        self.samples.append(pairs)

    def _without_duplicates(self, block: Block, pairs: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        _, first = np.unique(pairs, axis=0, return_index=True)
        repeated = len(pairs) - len(first)
        if not repeated:
            return pairs
        if self.duplicates == "error":
            again = int(np.setdiff1d(np.arange(len(pairs)), first)[0])
            assert block.label_values is not None
            raise block.error(
                int(pairs[again, 0]) - self.rows, f"label {str(block.label_values[again])!r} occurs twice"
            )
        self.counts["repeated"] += repeated
        return pairs if self.duplicates == "keep" else pairs[np.sort(first)]

    def finish(self, name: str) -> TaskMeta:
        writer = self.writer
        if self.sequences is None:
            raise DataError(writer.path, f"task {name!r} has no rows")
        index_of_item: npt.NDArray[np.int32] | None = None
        if self.new_items is not None:
            writer.items, index_of_item = self.new_items.finish()
            remap(self.sequences, index_of_item)
        for array in (self.sequences, self.lengths, self.groups):
            array.close()
        assert writer.items is not None
        samples = np.concatenate(self.samples)
        if self.kind == "next_item":
            if index_of_item is not None:
                samples[:, 1] = index_of_item[samples[:, 1]]
            num_labels = len(writer.items)
        else:
            if not len(samples):
                raise DataError(writer.path, f"task {name!r} has no labels")
            labels, index_of_label = self.label_builder.finish()
            samples[:, 1] = index_of_label[samples[:, 1]]
            num_labels = len(labels)
            labels.save(self.folder / "labels.parquet")
        file = NpyWriter(self.folder / "samples.npy", np.int32, (2,))
        file.append(samples)
        file.close()
        return TaskMeta(name, self.kind, self.rows, len(samples), num_labels, self._notes())

    def _notes(self) -> list[str]:
        unseen = {"pad": "replaced by the pad", "drop": "dropped"}.get(self.unseen, "")
        repeated = {"keep": "kept as samples", "drop": "dropped"}.get(self.duplicates, "")
        words = {
            "empty": "rows hold only pads",
            "inner": "rows hold the pad 0 after their first item; it is embedded like any item",
            "ending": "rows end with the pad 0; sequences must be padded on the left, newest item last",
            "unseen": f"items that task 1 does not have were {unseen}",
            "repeated": f"labels given twice to one row were {repeated}",
        }
        return [f"{count} {words[what]}" for what, count in self.counts.items() if count]
