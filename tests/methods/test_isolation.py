"""Methods that give each task weights of its own, through a sequence of six tasks: nothing is forgotten, and stops do no harm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_data import write_tiny

from teracon_fast.data import TaskSequence
from teracon_fast.methods import Conure, Method, Piggyback, Sizes
from teracon_fast.methods.sequence import Settings, learn_sequence

METHODS: dict[str, Callable[[Sizes], Method]] = {
    "conure": Conure,
    "conure, pre-activation": lambda sizes: Conure(sizes, block="pre-activation", pruned="zero"),
    "piggyback": lambda sizes: Piggyback(sizes, mask_lr=1e-3),
}


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> TaskSequence:
    return write_tiny(tmp_path_factory.mktemp("isolation") / "six", tasks=6, rows=120)


@pytest.mark.parametrize("kind", METHODS)
def test_backward_transfer_is_exactly_zero(kind: str, six: TaskSequence, tmp_path: Path) -> None:
    def settings(task: int) -> Settings:
        return Settings(lr=5e-3, batch_size=32, epochs=6 if task == 0 else 2)

    def new() -> Method:
        return METHODS[kind](Sizes(six.num_items, channels=16, dilations=(1, 2)))

    whole = new()
    learnt = learn_sequence(whole, six, settings)
    bwt = learnt.results.bwt[:-1]
    assert len(bwt) == 5 and all(value in (0.0, None) for value in bwt)
    assert sum(value is not None for value in bwt) >= 2, "some tasks had something to forget"
    for row in learnt.tests:
        for task, metrics in enumerate(row):
            assert metrics == learnt.tests[task][task]

    stopped = new()
    learn_sequence(stopped, six, settings, num_tasks=3, folder=tmp_path)
    gone_on = new()
    again = learn_sequence(gone_on, six, settings, folder=tmp_path)
    assert again.tests == learnt.tests
    state = gone_on.state_dict()
    assert state.keys() == whole.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())
