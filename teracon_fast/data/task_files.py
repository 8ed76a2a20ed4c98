"""Writing the arrays of one task block by block; ids are numbered at the end, once all are known."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from teracon_fast.data.blocks import Block
from teracon_fast.data.dictionaries import Dictionary, DictionaryBuilder
from teracon_fast.data.layout import Kind, TaskMeta, leading_to_lengths
from teracon_fast.data.npy import NpyWriter, remap
from teracon_fast.errors import DataError
from teracon_fast.files import atomic_write

Unseen: TypeAlias = Literal["error", "pad", "drop"]
Duplicates: TypeAlias = Literal["keep", "drop", "error"]


class TaskFiles:
    """The arrays of one task, being written.

    Args:
        folder: folder of the task, created here.
        kind, unseen, duplicates: see `DatasetWriter.add_task`.
        length: L; None takes it from the first block.
        items: the item dictionary, or what builds it from this task: `finish` then sets `items`.
        labels: builds the label dictionary.
    """

    def __init__(
        self,
        folder: Path,
        kind: Kind,
        length: int | None,
        items: Dictionary | DictionaryBuilder,
        labels: DictionaryBuilder,
        unseen: Unseen,
        duplicates: Duplicates,
    ) -> None:
        self.folder, self.kind, self.length = folder, kind, length
        self.unseen, self.duplicates = unseen, duplicates
        folder.mkdir()
        self.new_items = items if isinstance(items, DictionaryBuilder) else None
        self.items = items if isinstance(items, Dictionary) else None
        self.label_builder = labels
        self.sequences: NpyWriter | None = None
        self.lengths = NpyWriter(folder / "lengths.npy", np.int32)
        self.groups = NpyWriter(folder / "groups.npy", np.int64)
        self.samples: list[npt.NDArray[np.int32]] = []
        self.rows = 0
        self.counts = dict.fromkeys(("empty", "inner", "ending", "unseen", "bucket", "rare", "repeated"), 0)

    def add(self, block: Block) -> None:
        """Append the rows of a block."""
        if block.items.ndim != 2:
            raise block.error(0, f"got sequences of shape {block.items.shape}; expected [rows, length]")
        rows, width = block.items.shape
        if self.length is None:
            self.length = width
        if width != self.length or width < 1:
            raise block.error(0, f"got rows of {width} items; expected {self.length}")
        codes = self._encode_items(block)
        real = codes != 0
        lengths = leading_to_lengths(codes)
        self.counts["empty"] += int((lengths == 0).sum())
        self.counts["ending"] += int(((lengths > 0) & ~real[:, -1]).sum())
        self.counts["inner"] += int((np.count_nonzero(real, axis=1) < lengths).sum())
        if self.sequences is None:
            self.sequences = NpyWriter(self.folder / "sequences.npy", np.int32, (width,))
        self.sequences.append(codes)
        self.lengths.append(lengths)
        groups = np.arange(self.rows, self.rows + rows) if block.groups is None else np.asarray(block.groups)
        if groups.shape != (rows,) or groups.dtype.kind not in "iu":
            raise block.error(0, f"got groups {groups.dtype} {groups.shape}; expected {rows} integers")
        self.groups.append(groups)
        if self.kind == "label":
            self._add_labels(block)
        else:
            last = np.stack([np.arange(self.rows, self.rows + rows), codes[:, -1]], axis=1)
            self.samples.append(last.astype(np.int32))
        self.rows += rows
        if self.rows > np.iinfo(np.int32).max:
            raise block.error(rows - 1, f"got more than {np.iinfo(np.int32).max} rows")

    def _encode_items(self, block: Block) -> npt.NDArray[np.int32]:
        try:
            if self.new_items is not None:
                return self.new_items.add(block.items)
            assert self.items is not None
            codes = self.items.encode(block.items)
        except TypeError as error:
            raise block.error(0, f"items: {error}") from error
        missing = codes < 0
        if not missing.any():
            return codes
        if self.items.buckets:
            self.counts["bucket"] += int(missing.sum())
            codes[missing] = self.items.bucket_of(block.items[missing])
            return codes
        if self.unseen == "error":
            row, column = np.argwhere(missing)[0]
            got = str(block.items[row, column])
            expected = f"one of its {len(self.items)} ids; --unseen pad or drop accepts others"
            raise block.error(int(row), f"got item {got!r}, which task 1 does not have; expected {expected}")
        self.counts["unseen"] += int(missing.sum())
        codes[missing] = 0
        if self.unseen == "drop":
            # A stable sort moves dropped items to the front, as pads, and keeps the order of the others.
            codes = np.take_along_axis(codes, np.argsort(~missing, axis=1, kind="stable"), axis=1)
        return codes

    def _add_labels(self, block: Block) -> None:
        if block.label_rows is None or block.label_values is None:
            raise block.error(0, "got no labels; expected at least one per row in a task of kind 'label'")
        try:
            codes = self.label_builder.add(np.asarray(block.label_values))
        except TypeError as error:
            raise block.error(0, f"labels: {error}") from error
        rows = np.asarray(block.label_rows)
        if rows.shape != codes.shape or (len(rows) and not 0 <= rows.min() <= rows.max() < len(block.items)):
            reason = f"got {rows.shape} label rows and {codes.shape} labels; expected a row of the block for each label"
            raise block.error(0, reason)
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
            row = int(pairs[again, 0]) - self.rows
            raise block.error(row, f"got label {str(block.label_values[again])!r} twice")
        self.counts["repeated"] += repeated
        return pairs if self.duplicates == "keep" else pairs[np.sort(first)]

    def finish(self, name: str) -> TaskMeta:
        """Number the ids, write samples and label dictionary, close the files."""
        if self.sequences is None:
            raise DataError(self.folder, f"task {name!r}: got no rows")
        index_of_item: npt.NDArray[np.int32] | None = None
        if self.new_items is not None:
            self.items, index_of_item = self.new_items.finish()
            self.counts["rare"] = self.new_items.rare[0]
            remap(self.sequences, index_of_item)
        for array in (self.sequences, self.lengths, self.groups):
            array.close()
        assert self.items is not None
        samples = np.concatenate(self.samples)
        if self.kind == "next_item":
            if index_of_item is not None:
                samples[:, 1] = index_of_item[samples[:, 1]]
            num_labels = len(self.items)
        else:
            if not len(samples):
                raise DataError(self.folder, f"task {name!r}: got no labels")
            labels, index_of_label = self.label_builder.finish()
            samples[:, 1] = index_of_label[samples[:, 1]]
            num_labels = len(labels)
            labels.save(self.folder / "labels.parquet")
        with atomic_write(self.folder / "samples.npy") as file:
            np.save(file, samples)
        return TaskMeta(name, self.kind, self.rows, len(samples), num_labels, self._notes())

    def _notes(self) -> list[str]:
        occurrences = 0 if self.new_items is None else self.new_items.rare[1]
        unseen = {"pad": "replaced by the pad", "drop": "dropped"}.get(self.unseen, "")
        repeated = {"keep": "kept as samples", "drop": "dropped"}.get(self.duplicates, "")
        words = {
            "empty": "rows have only pads",
            "inner": "rows have the pad 0 after their first item; it is embedded like any item",
            "ending": "rows end with the pad 0; sequences should be padded on the left, newest item last",
            "bucket": "items without an index of their own were replaced by their buckets",
            "rare": f"rare items share the buckets ({occurrences} occurrences)",
            "unseen": f"items that task 1 does not have were {unseen}",
            "repeated": f"labels given twice to a row were {repeated}",
        }
        return [f"{count} {words[what]}" for what, count in self.counts.items() if count]
