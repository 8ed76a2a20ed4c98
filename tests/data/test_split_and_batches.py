"""Splits are partitions that respect users; batches are determined by (seed, epoch) and can be resumed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teracon_fast.data import TaskData, epoch_batches, fetch, split_task
from teracon_fast.errors import ConfigError


def task_of(groups: list[int], samples_per_row: int = 1) -> TaskData:
    """A task in memory whose label of sample i is i."""
    n = len(groups)
    rows = np.repeat(np.arange(n), samples_per_row)
    return TaskData(
        name="t",
        kind="label",
        num_labels=len(rows),
        sequences=np.arange(3 * n, dtype=np.int32).reshape(n, 3),
        lengths=np.full(n, 3, dtype=np.int32),
        groups=np.array(groups, dtype=np.int64),
        samples=np.stack([rows, np.arange(len(rows))], axis=1).astype(np.int32),
        path=Path("none"),
    )


@settings(max_examples=150, deadline=None)
@given(
    groups=st.lists(st.integers(-5, 30), min_size=1, max_size=120),
    per_row=st.integers(1, 3),
    by=st.sampled_from(["sample", "user"]),
    seed=st.integers(0, 2**40),
)
def test_split_is_a_partition_with_whole_groups(groups: list[int], per_row: int, by, seed: int) -> None:
    task = task_of(groups, per_row)
    units = len(task.samples) if by == "sample" else len(set(groups))
    if units < 3:
        with pytest.raises(ConfigError, match="expected at least 3"):
            split_task(task, by, seed)
        return
    split = split_task(task, by, seed)
    again = split_task(task, by, seed)
    parts = [split.train, split.valid, split.test]
    for part, same in zip(parts, [again.train, again.valid, again.test], strict=True):
        assert part.dtype == np.int64 and len(part)
        assert (np.diff(part) > 0).all()
        np.testing.assert_array_equal(part, same)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(task.samples)))
    if by == "user":
        sides = [set(task.groups[task.samples[part, 0]].tolist()) for part in parts]
        assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    held = max(int(0.2 * units + 1e-9), 2)
    test = min(max(int(held * 0.75), 1), held - 1)
    if by == "sample":
        assert list(map(len, parts)) == [units - held, held - test, test]


def test_counts_and_shuffle_of_the_published_split() -> None:
    task = task_of(list(range(1000)))
    split = split_task(task, seed=7)
    assert (len(split.train), len(split.valid), len(split.test)) == (800, 50, 150)
    order = np.random.Generator(np.random.PCG64(7)).permutation(1000)
    np.testing.assert_array_equal(split.train, np.sort(order[:800]))
    np.testing.assert_array_equal(split.valid, np.sort(order[800:850]))
    other = split_task(task, seed=8)
    assert not np.array_equal(split.test, other.test)


def test_split_by_user_gives_a_user_the_same_side_in_every_task() -> None:
    users = np.random.default_rng(0).permutation(5000)
    first, second = task_of(users.tolist(), 2), task_of(np.sort(users)[1000:].tolist())
    for part, share in (("train", 0.80), ("valid", 0.05), ("test", 0.15)):
        sides = [
            set(task.groups[task.samples[getattr(split_task(task, "user", 3), part), 0]].tolist())
            for task in (first, second)
        ]
        assert {user for user in sides[0] if user >= 1000} == sides[1]
        assert abs(len(sides[0]) / 5000 - share) < 0.02
    assert not np.array_equal(split_task(second, "user", 3).test, split_task(second, "user", 4).test)
    # The order is a shuffle: the test users are not a run of neighbouring ids.
    assert (np.diff(split_task(second, "user", 3).test) > 1).sum() > 40


def test_split_takes_other_fractions_and_refuses_wrong_ones() -> None:
    task = task_of(list(range(10)))
    split = split_task(task, seed=0, fractions=(0.5, 0.5, 0.0))
    assert (len(split.train), len(split.valid), len(split.test)) == (5, 5, 0)
    assert len(split_task(task, fractions=(1.0, 0.0, 0.0)).train) == 10
    for fractions in ((0.8, 0.1, 0.2), (1.1, -0.1, 0.0), (0.5, 0.5)):
        with pytest.raises(ConfigError, match="fractions"):
            split_task(task, fractions=fractions)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="split: got"):
        split_task(task, by="row")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="seed"):
        split_task(task, seed=-1)


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(0, 60),
    size=st.integers(1, 17),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 100),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_an_epoch_uses_every_sample_once_and_resumes(
    n: int, size: int, seed: int, epoch: int, shuffle: bool, drop_last: bool
) -> None:
    indices = np.random.default_rng(n).permutation(1000)[:n]
    batches = epoch_batches(indices, size, seed, epoch, shuffle, drop_last)
    used = np.concatenate([*batches, np.zeros(0, dtype=np.int64)])
    assert used.dtype == np.int64
    full = n // size * size
    assert len(batches) == (n // size if drop_last else -(-n // size))
    assert len(used) == (full if drop_last else n) == len(set(used.tolist())) and set(used) <= set(indices)
    assert all(len(batch) == size for batch in batches[: n // size])
    if not shuffle:
        np.testing.assert_array_equal(used, indices[: len(used)])
    again = epoch_batches(indices, size, seed, epoch, shuffle, drop_last)
    for k in range(len(batches) + 1):
        resumed = again[k:]
        assert len(resumed) == len(batches) - k
        for late, batch in enumerate(resumed):
            np.testing.assert_array_equal(batch, batches[k + late])


def test_epochs_and_seeds_differ_and_the_order_never_changes() -> None:
    indices = np.arange(8)
    orders = {
        (seed, epoch): epoch_batches(indices, 8, seed, epoch)[0].tolist() for seed in range(3) for epoch in range(3)
    }
    assert len({tuple(order) for order in orders.values()}) == 9
    # Fixed numbers: a resumed run must see the same order after an upgrade.
    assert orders[0, 0] == [4, 1, 5, 3, 6, 7, 2, 0]
    assert orders[2, 1] == [0, 1, 7, 4, 6, 3, 2, 5]


def test_batches_are_a_sequence_and_refuse_wrong_arguments() -> None:
    batches = epoch_batches(np.arange(5), 2, 0, 0, shuffle=False)
    assert batches[-1].tolist() == [4] and [batch.tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
    for index in (3, -4):
        with pytest.raises(IndexError):
            batches[index]
    for arguments, reason in [((0, 0, 0), "batch_size"), ((1, -1, 0), "seed"), ((1, 0, -1), "epoch")]:
        with pytest.raises(ConfigError, match=reason):
            epoch_batches(np.arange(5), *arguments)


def test_fetch_gives_int64_tensors_of_the_samples() -> None:
    task = task_of([1, 2, 3, 4], samples_per_row=2)
    x, y = fetch(task, np.array([7, 0, 7]))
    assert x.dtype == y.dtype == torch.int64
    assert x.tolist() == [[9, 10, 11], [0, 1, 2], [9, 10, 11]] and y.tolist() == [7, 0, 7]
    x[0, 0] = -1
    assert task.sequences[3, 0] == 9
    empty_x, empty_y = fetch(task, np.zeros(0, dtype=np.int64))
    assert empty_x.shape == (0, 3) and empty_y.shape == (0,)
    for wrong in (8, -1):
        with pytest.raises(IndexError):
            fetch(task, np.array([wrong]))
