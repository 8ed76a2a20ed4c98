"""Training in memory, without a run folder: what tests of methods share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teracon_fast.data import TaskSequence, split_task
from teracon_fast.data.seeds import derived_seed
from teracon_fast.methods import Method, StepResult
from teracon_fast.train.evaluation import evaluate
from teracon_fast.train.loop import Callbacks, LoopSettings, TaskSettings, Trainer


class Epochs(Callbacks):
    """Keeps the events of epochs."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[dict[str, Any]] = []

    def on_epoch_end(self, trainer: Trainer, event: dict[str, Any]) -> None:
        self.events.append(event)


def learn_task(method: Method, data: TaskSequence, task: int, settings: TaskSettings, seed: int = 0) -> list[dict[str, Any]]:
    """Start a task (from 0) and train it; returns what is logged of its epochs."""
    generator = torch.Generator().manual_seed(derived_seed(seed, task + 1, "initial weights"))
    method.start(task, data.tasks[task].num_labels, generator)
    epochs, splits = Epochs(), [split_task(one) for one in data.tasks[: task + 1]]
    Trainer(method, data, splits, settings, LoopSettings(seed), epochs).train()
    return epochs.events


def metrics_of(method: Method, data: TaskSequence, task: int) -> dict[str, float]:
    """Test metrics of a task (from 0)."""
    return evaluate(method, data.tasks[task], task, split_task(data.tasks[task]).test)


def total(result: StepResult) -> Tensor:
    """The loss that a step minimizes."""
    return torch.stack([result.weights.get(name, 1.0) * loss for name, loss in result.losses.items()]).sum()
