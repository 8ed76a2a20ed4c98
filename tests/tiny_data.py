"""Small learnable data sets for tests of training, evaluation and the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from teracon_fast.data import DatasetWriter, TaskSequence, open_dataset


def walks(rows: int, length: int, items: int, seed: int) -> np.ndarray:
    """Raw item ids 1..items `[rows, length]`, left-padded with 0: most steps go from item i to i + 1."""
    random = np.random.default_rng(seed)
    steps = np.where(random.random((rows, length)) < 0.9, 1, random.integers(0, items, (rows, length)))
    steps[:, 0] = random.integers(0, items, rows)
    sequences = np.cumsum(steps, axis=1) % items + 1
    pads = random.integers(0, length - 1, rows)
    sequences[np.arange(length)[None, :] < pads[:, None]] = 0
    return sequences


def write_tiny(
    path: Path, tasks: int = 3, rows: int = 240, length: int = 8, items: int = 30, seed: int = 0, name: str = "tiny"
) -> TaskSequence:
    """Task 1: the next item. Later tasks: classes of the last item; even ones with all `items` labels and two labels a
    row, odd ones with few labels."""
    with DatasetWriter(path, name=name, length=length) as writer:
        sequences = walks(rows, length, items, seed)
        sequences[:items, -1] = np.arange(1, items + 1)  # every item occurs
        writer.add_task("next", "next_item", sequences, groups=np.arange(rows))
        for task in range(2, tasks + 1):
            own = walks(rows, length, items, seed + task)
            own[:items, -1] = np.arange(1, items + 1)
            last = own[:, -1]
            if task % 2 == 0:
                wanted = (
                    np.repeat(np.arange(rows), 2),
                    np.stack([(last * 7 + task) % items, last % items], 1).reshape(-1),
                )
            else:
                wanted = (np.arange(rows), last % 4)
            writer.add_task(f"task {task}", "label", own, labels=wanted, groups=np.arange(rows) + rows * task)
    return open_dataset(path)
