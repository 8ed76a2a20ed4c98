"""The order of tasks and the noisy task."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_data import write_tiny

from teracon_fast.data import TaskSequence, split_task
from teracon_fast.data.order import NOISE, arranged, noisy_task, parse_order, with_noise
from teracon_fast.errors import ConfigError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TaskSequence:
    """Three tasks of 80 users: the next item, 30 classes, 4 classes; sequences of 6 items."""
    return write_tiny(tmp_path_factory.mktemp("order") / "tiny", tasks=3, rows=80, length=6)


def test_orders() -> None:
    assert parse_order("original", 4) == (1, 2, 3, 4)
    assert parse_order("reversed", 6) == (1, 6, 5, 4, 3, 2), "as in the paper's Table 3 (b)"
    assert parse_order("1, 3,2", 3) == (1, 3, 2)


@pytest.mark.parametrize("text", ["2,1,3", "1,2", "1,2,2", "1,2,4", "1,2,3,4", "1,two,3", "", "backwards", "1,-2,3"])
def test_another_order_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="order: got"):
        parse_order(text, 3)


def test_the_noisy_task_is_half_of_the_users_with_random_labels_of_50(tiny: TaskSequence) -> None:
    noise = noisy_task(tiny, seed=3)
    first = tiny.tasks[0]
    assert (noise.kind, noise.num_labels) == ("label", 50) and noise.sequences is first.sequences
    rows, labels = noise.samples.T
    assert len(rows) == len(set(noise.groups[rows])) == len(np.unique(first.groups)) // 2
    assert noise.samples.dtype == np.int32 and labels.min() >= 0 and labels.max() < 50 and len(set(labels)) > 10
    again, other = noisy_task(tiny, seed=3), noisy_task(tiny, seed=4)
    assert np.array_equal(noise.samples, again.samples) and not np.array_equal(noise.samples, other.samples)
    assert abs(np.corrcoef(first.samples[rows, 1], labels)[0, 1]) < 0.5, "labels know nothing of the items"


def test_a_user_of_several_rows_has_one_noisy_label(tiny: TaskSequence) -> None:
    from dataclasses import replace

    first = replace(tiny.tasks[0], groups=np.arange(80) // 4)
    noise = noisy_task(replace(tiny, tasks=[first, *tiny.tasks[1:]]), 0)
    assert len(noise.samples) == 10 and len(set(first.groups[noise.samples[:, 0]])) == 10


def test_tasks_move_with_their_samples(tiny: TaskSequence) -> None:
    order = with_noise(parse_order("reversed", 3), 2)
    assert order == (1, NOISE, 3, 2)
    data = arranged(tiny, order, seed=1)
    assert [task.name for task in data.tasks] == ["next", "noise", "task 3", "task 2"] == [task.meta.name for task in data.tasks]
    assert data.num_items == tiny.num_items and len(tiny.tasks) == 3
    for place, number in ((2, 3), (3, 2)):
        assert np.array_equal(split_task(data.tasks[place]).test, split_task(tiny.tasks[number - 1]).test)
    assert with_noise((1, 2, 3), 4) == (1, 2, 3, NOISE)


@pytest.mark.parametrize("place", [0, 1, 5])
def test_the_noisy_task_is_neither_first_nor_after_a_gap(place: int) -> None:
    with pytest.raises(ConfigError, match=f"noise-at: got {place}, expected 2 to 4"):
        with_noise((1, 2, 3), place)
