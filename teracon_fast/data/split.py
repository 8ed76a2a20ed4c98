"""Training, validation and test samples of a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from teracon_fast.data.store import TaskData, TaskSequence
from teracon_fast.errors import ConfigError

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Split:
    """Sample indices (rows of `TaskData.samples`) of the three parts: int64, ascending, a partition of all samples."""

    train: Indices
    valid: Indices
    test: Indices


def split_task(
    task: TaskData,
    by: Literal["sample", "user"] = "sample",
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.80, 0.05, 0.15),
) -> Split:
    """Split the samples of a task.

    Args:
        task: the task.
        by: "sample" shuffles samples, as the published program does; a user's samples may fall into several parts. "user" keeps
            all samples of a user (`TaskData.groups`) in one part, the same in every task, chosen by the seed and the user's id
            alone. The parts of a task then only approximate the fractions; if one would be empty, the nearest user moves to it.
        seed: non-negative. The same seed gives the same split on any machine.
        fractions: shares of train, validation and test, which sum to 1. Sample counts are rounded as in the published program:
            held = int((valid + test) n), of which int(held test / (valid + test)) are test; train gets the rest. A part with a
            positive share gets at least one sample (or user).

    Raises:
        ConfigError: unknown `by`, negative seed, fractions negative or not summing to 1, fewer samples (users) than parts.
    """
    if by not in ("sample", "user"):
        raise ConfigError(f"split: got {by!r}; expected 'sample' or 'user'")
    if seed < 0:
        raise ConfigError(f"got seed {seed}; expected a non-negative integer")
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ConfigError(f"got fractions {fractions}; expected three shares of train, valid and test that sum to 1")
    if by == "sample":
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(task.samples))
        parts = np.split(order, _cuts(len(order), fractions, "samples", task.name))
    else:
        groups, group_of = np.unique(task.groups[task.samples[:, 0]], return_inverse=True)
        points = _uniform_hash(groups, seed)
        order = np.argsort(points, kind="stable")
        wanted = np.searchsorted(points[order], [fractions[0], 1.0 - fractions[2]])
        cuts = _at_least_one(int(wanted[0]), int(wanted[1]), len(groups), fractions, "users", task.name)
        part_of = np.empty(len(groups), dtype=np.int64)
        part_of[order] = np.searchsorted(cuts, np.arange(len(groups)), side="right")
        parts = [np.flatnonzero(part_of[group_of] == part) for part in range(3)]
    train, valid, test = (np.sort(part).astype(np.int64, copy=False) for part in parts)
    return Split(train, valid, test)


def check_tasks(dataset: TaskSequence, splits: Sequence[Split]) -> None:
    """Check a task sequence before training.

    Raises:
        ConfigError: sequences too short, a task of the wrong kind, or an empty part of a split; names the task.
    """
    if dataset.length < 2:
        raise ConfigError(f"{dataset.path}: got sequences of length {dataset.length}, expected at least 2")
    for number, (data, split) in enumerate(zip(dataset.tasks, splits, strict=False), 1):
        where, kind = f"{dataset.path}, task {number} ({data.name})", "next_item" if number == 1 else "label"
        if data.kind != kind:
            raise ConfigError(f"{where}: got kind {data.kind!r}, expected {kind!r}")
        for part, samples in (("train", split.train), ("valid", split.valid), ("test", split.test)):
            if not len(samples):
                raise ConfigError(f"{where}: got no samples in the {part} split, expected at least one")


def _cuts(n: int, fractions: tuple[float, float, float], what: str, name: str) -> tuple[int, int]:
    """Start of validation and start of test."""
    held_share = fractions[1] + fractions[2]
    # 1e-9 undoes the rounding of the shares: 0.15 / 0.2 is 0.7499... in floating point.
    held = int(held_share * n + 1e-9)
    test = int(held * fractions[2] / held_share + 1e-9) if held_share else 0
    return _at_least_one(n - held, n - test, n, fractions, what, name)


def _at_least_one(
    valid: int, test: int, n: int, fractions: tuple[float, float, float], what: str, name: str
) -> tuple[int, int]:
    """The starts of validation and test, moved no further than gives each part with a positive share something."""
    wanted = [int(fraction > 0) for fraction in fractions]
    if n < sum(wanted):
        raise ConfigError(f"task {name!r}: got {n} {what}, expected at least {sum(wanted)} to split by {fractions}")
    valid = min(max(valid, wanted[0]), n - wanted[1] - wanted[2])
    return valid, min(max(test, valid + wanted[1]), n - wanted[2])


def _uniform_hash(groups: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each id: SplitMix64 with its stream chosen by the seed (Steele, Lea and Flood 2014)."""
    start = np.random.Generator(np.random.PCG64(seed)).integers(0, 2**64, dtype=np.uint64)
    z = groups.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) / 2.0**64
