"""Metrics of a trained run on prepared data: its own, or data with other dictionaries, read by raw id."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from teracon_fast.data import TaskSequence, open_dataset
from teracon_fast.data.order import arranged
from teracon_fast.data.user_input import Unseen, check_unseen, encode_items, fit
from teracon_fast.errors import ConfigError
from teracon_fast.infer.open import TrainedRun, TrainedTask
from teracon_fast.train.evaluation import evaluate
from teracon_fast.train.run import task_split

if TYPE_CHECKING:
    from teracon_fast.data import TaskData


def measure(
    run: TrainedRun, data: str | Path | None = None, split: str = "test", batch_size: int = 1024,
    progress: Callable[[int, str, int, int], None] | None = None, unseen: Unseen = "error",
    say: Callable[[str], None] | None = None,
) -> dict[int, dict[str, float]]:  # fmt: skip
    """Metrics of every task that a run has learned: a row of R with all its metrics.

    Args:
        data: prepared folder; None: the one that the run was trained on. Its tasks are taken in the run's order.
        split: "test", "valid" or "train", split as in training.
        batch_size: sequences encoded at a time.
        progress: called with (task, split, samples done, samples in all).
        unseen: what to do with data of other dictionaries than the run's: "error" refuses them; otherwise they are read by raw
            id, see `Inputs`, and samples whose label the run does not have (for task 1, a bucket may stand for it) are left out.
        say: called with how many unseen items there were, and how many samples were left out.

    Returns:
        task number (from 1) -> metrics.

    Raises:
        ConfigError: another split, data that are not those of the run, no buckets, or no samples left.
    """
    if split not in ("test", "valid", "train"):
        raise ConfigError(f"split: got {split!r}, expected test, valid or train")
    dataset = open_dataset(run.config.data if data is None else data)
    if len(dataset.tasks) < max(run.order):
        raise ConfigError(f"{dataset.path}: got {len(dataset.tasks)} tasks, expected the {max(run.order)} of {run.path}")
    dataset = arranged(dataset, run.order, run.config.seed)
    strangers = _Strangers(run, dataset, unseen) if unseen != "error" else None
    for task, data_of in zip(run.tasks, dataset.tasks, strict=True):
        # The indices in a prepared folder mean nothing without the dictionaries they were made with.
        if strangers is None and not np.array_equal(data_of.label_ids(), task.labels.ids):
            what = "items" if task.kind == "next_item" else f"labels of {task}"
            raise ConfigError(
                f"{dataset.path}: its {what} are not those of {run.path}, expected the data it was trained on; "
                "--unseen pad, drop or bucket reads others by raw id"
            )
    encoders, found = run.method.encoders(range(len(run.tasks))), {}
    for task, samples_of in zip(run.tasks, dataset.tasks, strict=True):
        samples = getattr(task_split(run.config, samples_of), split)
        if strangers is not None:
            samples_of, note = strangers.read(task, samples_of, samples)
            samples = np.arange(len(samples_of.samples))
            if say is not None and note:
                say(note)
        show = None if progress is None else partial(progress, task.number, split)
        at = task.number - 1
        found[task.number] = evaluate(run.method, samples_of, at, samples, batch_size, show, encoders[at])
    return found


class _Strangers:
    """Samples of a data set with other dictionaries than the run's, read by raw id."""

    def __init__(self, run: TrainedRun, dataset: TaskSequence, unseen: Unseen) -> None:
        check_unseen(unseen, run.items)
        self._run, self._unseen = run, unseen
        self._codes = encode_items(run.items, unseen, dataset.item_ids())

    def read(self, task: TrainedTask, data: TaskData, samples: NDArray[np.int64]) -> tuple[TaskData, str]:
        """The samples of a task in the run's indices, and a sentence on what was unseen of them."""
        chosen = np.asarray(data.samples[samples])
        if task.kind == "next_item":
            label_of = np.where(self._codes < -1, -1 - self._codes, self._codes)
        else:
            label_of = task.labels.encode(data.label_ids())
        labels = label_of[chosen[:, 1]]
        kept = labels >= 0
        rows, row = np.unique(chosen[kept, 0], return_inverse=True)
        codes = self._codes[data.sequences[rows]]
        read = replace(
            data, num_labels=len(task.labels), sequences=fit(codes, self._unseen, self._run.length),
            samples=np.stack([row, labels[kept]], 1).astype(np.int32),
        )  # fmt: skip
        unseen, left_out = int((codes < 0).sum()), int((~kept).sum())
        note = f"T{task.number} {task.name}: {unseen:,} unseen items, {left_out:,} samples left out because of their labels"
        return read, note if unseen or left_out else ""
