"""What every method keeps to: its options, its state, its encoders."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from parameters import snapshot
from some_batches import some_batch

from teracon_fast import FastTCN
from teracon_fast.data import TaskSequence, split_task
from teracon_fast.errors import ConfigError
from teracon_fast.methods import (
    HAT,
    METHODS,
    Conure,
    Method,
    PeterRec,
    Piggyback,
    SinMo,
    Sizes,
    StepContext,
    options_of,
)
from teracon_fast.train.evaluation import evaluate
from teracon_fast.train.loop import make_optimizer, train_step

SIZES = Sizes(23, channels=8, dilations=(1, 2))
LABELS = (23, 5, 7)


def learn(method: Method, task: int, steps: int = 2) -> None:
    """Start a task, and take some steps in each phase."""
    method.start(task, LABELS[task], torch.Generator().manual_seed(task))
    first = some_batch(23, 23, seed=9)
    for phase in method.phases():
        optimizer = make_optimizer(method, 1e-2, method.begin_phase(phase))
        for step in range(steps):
            context = StepContext(step, 3.0, companions={0: first})
            train_step(method, optimizer, some_batch(23, LABELS[task], seed=step), context)
        method.end_phase(phase)


@pytest.mark.parametrize("name", METHODS)
def test_a_state_dict_is_enough_to_continue(name: str) -> None:
    method, other = METHODS[name](SIZES), METHODS[name](SIZES)
    for task in range(2):
        learn(method, task)
    other.restore(LABELS[:2], snapshot(method))
    x = some_batch(23, 5).x
    for task in range(2):
        assert torch.equal(other.encode(x, task), method.encode(x, task))
        assert torch.equal(other.head(task).weight, method.head(task).weight)
    learn(method, 2)
    learn(other, 2)
    assert other.labels == list(LABELS)
    for key, value in method.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


@pytest.mark.parametrize("name", METHODS)
def test_the_changing_state_is_all_that_a_task_changes(name: str) -> None:
    """So it is enough for the best weights and for checkpoints; and networks that stay are not in it."""
    method = METHODS[name](SIZES)
    learn(method, 0)
    before = snapshot(method)
    learn(method, 1)
    changing = method.changing_state()
    for key, value in method.state_dict().items():
        assert key in changing or torch.equal(value, before[key]), key
    if name in ("sinmo", "fine_all", "mtl", "peterrec"):
        assert not [key for key in changing if key.startswith(("backbone.", "backbones.0.", "heads.0."))]


@pytest.mark.parametrize("name", METHODS)
def test_options_are_declared_with_a_help_text_and_kept_under_their_names(name: str) -> None:
    method, declared = METHODS[name](SIZES), options_of(METHODS[name])
    assert list(declared) == list(inspect.signature(METHODS[name]).parameters)[1:]
    for key, option in declared.items():
        assert option.help and option.type is not Any, key
        assert getattr(method, key) == option.default == method.settings()[key]
    assert method.settings()["name"] == name and method.settings()["channels"] == 8
    with pytest.raises(ConfigError, match=f"{name}: got 'depth' for one task"):
        method.configure({"depth": 3})


def test_options_per_task_are_set_between_tasks_and_checked() -> None:
    method = METHODS["teracon"](SIZES)
    method.configure({"alpha": 0.1, "s_max": 9.0})
    assert (method.settings()["alpha"], method.settings()["s_max"]) == (0.1, 9.0)
    with pytest.raises(ConfigError, match="alpha is -1.0, expected at least 0"):
        method.configure({"alpha": -1.0})
    with pytest.raises(ConfigError, match="got 'mask' for one task"):
        method.configure({"mask": "none"})


CONSTANTS = {
    "piggyback": (Piggyback, "backbone_options"), "conure": (Conure, "backbone_options"), "hat": (HAT, "masks"),
    "teracon": (FastTCN, "masks"), "parameter_masks": (FastTCN, "masks"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_of_inference_are_computed_once(
    name: str, tiny: TaskSequence, sizes: Sizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many batches are evaluated."""
    method = METHODS[name](sizes)
    for task in range(2):
        method.start(task, tiny.tasks[task].num_labels)
    owner, function = CONSTANTS[name]
    calls, plain = [], getattr(owner, function)
    monkeypatch.setattr(owner, function, lambda *given: calls.append(1) or plain(*given))
    evaluate(method, tiny.tasks[1], 1, split_task(tiny.tasks[1]).test, batch_size=8)
    assert len(calls) == 1


def test_frozen_parameters_keep_no_gradient() -> None:
    method = PeterRec(SIZES)
    method.start(0, SIZES.num_items)
    method.begin_phase("train")
    for parameter in method.parameters():
        parameter.grad = torch.ones_like(parameter)
    method.start(1, 4)
    method.begin_phase("train")
    assert all(parameter.grad is None for parameter in method.parameters())


def test_bad_input_is_refused() -> None:
    method = SinMo(SIZES)
    with pytest.raises(ConfigError, match="got task 1, expected 0"):
        method.start(1, 3)
    method.start(0, 23)
    with pytest.raises(ConfigError, match="task 1 has 0 labels"):
        method.start(1, 0)
    with pytest.raises(ConfigError, match="got phase 'prune'"):
        method.begin_phase("prune")
    with pytest.raises(ConfigError, match="got task 1, expected 0..0"):
        method.encode(torch.zeros(1, 8, dtype=torch.int64), 1)
    with pytest.raises(ConfigError, match="sinmo has no CUDA graphs"):
        method.enable_graphs()
