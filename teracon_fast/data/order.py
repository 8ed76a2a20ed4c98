"""The order of tasks, and the noisy task: data sets derived in memory from a prepared one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from teracon_fast.data.seeds import derived_seed
from teracon_fast.data.store import TaskData, TaskSequence
from teracon_fast.errors import ConfigError

NOISE = 0  # stands for the noisy task where tasks are numbers from 1
NOISE_NAME = "noise"
NOISE_SHARE = 0.5  # of the users
NOISE_LABELS = 50


def parse_order(text: str, num_tasks: int) -> tuple[int, ...]:
    """Numbers of the tasks, from 1, in the order of training.

    Args:
        text: "original"; "reversed", which is 1, M, ..., 2 as in the paper; or numbers such as "1,3,2".
        num_tasks: M.

    Raises:
        ConfigError: not all of 1..M once each, or another first one: every method begins with the next item.
    """
    if text == "original":
        return tuple(range(1, num_tasks + 1))
    if text == "reversed":
        return (1, *range(num_tasks, 1, -1))
    parts = [part.strip() for part in text.split(",")]
    order = tuple(int(part) for part in parts if part.isdecimal())
    if len(order) != len(parts) or sorted(order) != list(range(1, num_tasks + 1)) or order[0] != 1:
        raise ConfigError(
            f"order: got {text!r}, expected original, reversed, or the tasks 1 to {num_tasks} separated by commas, 1 first"
        )
    return order


def noisy_task(dataset: TaskSequence, seed: int) -> TaskData:
    """A task that cannot be learned: half of the users of task 1, each with a random one of 50 classes.

    Args:
        dataset: its first task has all the users (paper, Section 3.1). A user of several rows takes part with the first.
        seed: of users and classes.

    Raises:
        ConfigError: fewer than two users.
    """
    first = dataset.tasks[0]
    _, rows = np.unique(first.groups, return_index=True)
    if len(rows) < 2:
        raise ConfigError(f"{dataset.path}: task 1 has {len(rows)} users, expected at least 2 to draw half of them")
    random = np.random.Generator(np.random.PCG64(derived_seed(seed, 1, "noisy task")))
    chosen = np.sort(random.choice(rows, int(NOISE_SHARE * len(rows)), replace=False))
    labels = random.integers(0, NOISE_LABELS, len(chosen))
    return replace(
        first, name=NOISE_NAME, kind="label", num_labels=NOISE_LABELS, notes=[],
        names=tuple(f"noise {label}" for label in range(1, NOISE_LABELS + 1)),
        samples=np.stack([chosen, labels], axis=1).astype(np.int32),
    )  # fmt: skip


def arranged(dataset: TaskSequence, order: Sequence[int], seed: int = 0) -> TaskSequence:
    """The data set with the given tasks in the given order.

    Args:
        dataset: as prepared.
        order: task numbers from 1; `NOISE` puts the noisy task there.
        seed: of the noisy task.
    """
    tasks = [noisy_task(dataset, seed) if number == NOISE else dataset.tasks[number - 1] for number in order]
    return replace(dataset, tasks=tasks)


def with_noise(order: Sequence[int], place: int) -> tuple[int, ...]:
    """The order with the noisy task as the `place`th one, from 1; ConfigError if it would be the first, or after a gap."""
    if not 2 <= place <= len(order) + 1:
        raise ConfigError(f"noise-at: got {place}, expected 2 to {len(order) + 1}: task 1 stays first")
    return (*order[: place - 1], NOISE, *order[place - 1 :])
