"""The driver of a task sequence, with the simplest method."""

from __future__ import annotations

from teracon_fast.data import TaskSequence, split_task
from teracon_fast.methods import SinMo, Sizes
from teracon_fast.methods.sequence import Settings, evaluate_method, learn_task

SETTINGS = Settings(lr=5e-3, batch_size=32, epochs=8, patience=3)


def test_two_tasks_are_learnt(tiny: TaskSequence, sizes: Sizes) -> None:
    splits = [split_task(data) for data in tiny.tasks]
    method = SinMo(sizes)
    first = learn_task(method, tiny, splits, 0, SETTINGS)
    before = evaluate_method(method, tiny.tasks[0], 0, splits[0].test)
    second = learn_task(method, tiny, splits, 1, SETTINGS)
    for epochs in (first, second):
        assert epochs[-1].loss < epochs[0].loss
    assert evaluate_method(method, tiny.tasks[0], 0, splits[0].test) == before
    assert before["mrr@5"] > 0.3, "better than chance"
    assert evaluate_method(method, tiny.tasks[1], 1, splits[1].test)["mrr@5"] > 0.3
