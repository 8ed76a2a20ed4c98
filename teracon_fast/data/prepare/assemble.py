"""Task rows -> prepared folder and summary, the last step of every preparer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teracon_fast.data.layout import Kind
from teracon_fast.data.prepare.preparer import Summary, TaskSummary, WriterOptions
from teracon_fast.data.store import DatasetWriter, open_dataset
from teracon_fast.data.task_files import Unseen

_ROWS_PER_BLOCK = 65_536  # rows converted to raw ids at once


@dataclass(frozen=True)
class TaskRows:
    """One task, with items as codes.

    Attributes:
        name, kind: as in `DatasetWriter.add_task`.
        sequences: int32 [N, L]; 0 is the pad, code k stands for `item_ids[k - 1]`.
        groups: int64 [N], the user of each row.
        label_rows: int64 [S], the row of each label; None for a next_item task.
        labels: [S], raw labels, integers or strings.
        unseen: treatment of items that the first task does not have.
    """

    name: str
    kind: Kind
    sequences: NDArray[np.int32]
    groups: NDArray[np.int64]
    label_rows: NDArray[np.int64] | None = None
    labels: NDArray[Any] | None = None
    unseen: Unseen = "error"


def task_of_users(
    name: str, users: NDArray[Any], values: NDArray[Any], sequences: NDArray[np.int32], groups: NDArray[np.int64]
) -> TaskRows:
    """The label task of one value per user, on the rows of T1; rows of users without a value are left out.

    Args:
        name: of the task.
        users: integers [K], ascending. values: [K], the label of each, integers or strings.
        sequences, groups: of T1.
    """
    rows = np.flatnonzero(np.isin(groups, users))
    groups = groups[rows]
    labels = values[np.searchsorted(users, groups)]
    return TaskRows(name, "label", sequences[rows], groups, np.arange(len(rows), dtype=np.int64), labels)


def write_tasks(
    output: Path,
    writer: WriterOptions,
    name: str,
    item_ids: NDArray[Any],
    tasks: Sequence[TaskRows],
    source: Mapping[str, Any],
    notes: Sequence[str],
) -> Summary:
    """Write the tasks, in order, and summarize them.

    Args:
        output: prepared folder to create.
        writer: passed to the `DatasetWriter`.
        name: name of the data set.
        item_ids: [V - 1] raw ids (integers or strings) of the item codes 1, 2, ...
        tasks: the first of kind next_item, the others of kind label, all of one length.
        source: recorded in dataset.json.
        notes: recorded there too, and in the summary.
    """
    pad = np.zeros(1, np.int64) if item_ids.dtype.kind in "iu" else np.array(["0"], dtype=object)
    raw = np.concatenate([pad, item_ids])
    about = {**source, "notes": list(notes)}
    with DatasetWriter(output, name, tasks[0].sequences.shape[1], about, **asdict(writer)) as data:
        for task in tasks:
            labels = None if task.label_rows is None or task.labels is None else (task.label_rows, task.labels)
            blocks = _raw_blocks(raw, task.sequences)
            data.add_task(task.name, task.kind, blocks, labels, task.groups, unseen=task.unseen)
    return summarize(output, notes)


def _raw_blocks(raw: NDArray[Any], codes: NDArray[np.int32]) -> Iterator[NDArray[Any]]:
    for first in range(0, len(codes), _ROWS_PER_BLOCK):
        yield raw[codes[first : first + _ROWS_PER_BLOCK]]


def summarize(output: Path, notes: Sequence[str]) -> Summary:
    """The summary of a prepared folder; the notes of the writer follow those of the preparer."""
    data = open_dataset(output, validate=False)
    tasks, said = [], list(notes)
    for task in data.tasks:
        users, mean = len(np.unique(task.groups)), float(np.mean(task.lengths))
        sizes = users, len(task.lengths), len(task.samples), task.num_labels
        tasks.append(TaskSummary(task.name, task.kind, *sizes, mean, 1 - mean / data.length))
        said += [f"{task.name}: {note}" for note in task.notes]
    real = sum(task.mean_length * task.rows for task in tasks) / sum(task.rows for task in tasks)
    return Summary(data.name, output, data.length, data.num_items - 1, tasks[0].users, real, tuple(tasks), tuple(said))
