"""A task in training, kept on disk so that a stop in the middle of it loses little: FOLDER/task.pt beside sequence.pt."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teracon_fast.errors import CheckpointError, ConfigError
from teracon_fast.methods.base import Method
from teracon_fast.model.checkpoints import load_state, save_state
from teracon_fast.train.loop import Position


def require_same(file: Path, was: Sequence[dict[str, Any]], is_now: Sequence[dict[str, Any]]) -> None:
    """Refuse to go on with tasks that were learnt otherwise.

    Args:
        file: that says so. was, is_now: what decided each task.

    Raises:
        ConfigError: names the first task and what differs.
    """
    for task, (before, now) in enumerate(zip(was, is_now, strict=False)):
        for key, value in now.items():
            if before[key] != value:
                raise ConfigError(f"{file}: task {task + 1} was learnt with {key} {before[key]}, expected {value}")


@dataclass
class Unfinished:
    """What a phase of a task needs to go on between two of its steps, to the same bits.

    Attributes:
        phase: its name.
        position: of the next step in it.
        state, training: the method's, see `Method.training_state`.
        optimizer: its state.
        best: the best weights so far.
        epochs: of the task so far, as dicts.
    """

    phase: str
    position: Position
    state: dict[str, Tensor]
    training: dict[str, Any]
    optimizer: dict[str, Any]
    best: dict[str, Tensor]
    epochs: list[dict[str, Any]]

    def begin(self, method: Method, make: Callable[[], torch.optim.Optimizer]) -> torch.optim.Optimizer:
        """Bring a method whose task has started to where it was; returns the optimiser.

        Args:
            make: begins the phase, and makes the optimiser.
        """
        # What trains in a phase may follow from the state, and the state may have parameters that begin with the phase.
        method.load_state_dict(self.state, strict=False)
        optimizer = make()
        method.load_state_dict(self.state)
        optimizer.load_state_dict(self.optimizer)
        method.load_training_state(self.training)
        return optimizer


@dataclass
class Keeper:
    """Writes and reads the file of the task in training.

    Attributes:
        file: FOLDER/task.pt.
        plans: what decides each task.
        seconds: between two writes.
        poll: raises where the process was asked to stop.
    """

    file: Path
    plans: Sequence[dict[str, Any]]
    seconds: float
    poll: Callable[[], None]
    _written: float = field(default_factory=lambda: time.monotonic())
    _took: float = 0.0

    @property
    def due(self) -> bool:
        """Whether it is time to write: not so often that writing a large network takes more than a twentieth of the time."""
        return time.monotonic() - self._written >= max(self.seconds, 20 * self._took)

    def save(self, task: int, kept: Unfinished) -> None:
        """Replace the file, whole or not at all."""
        began = time.monotonic()
        save_state(self.file, {"plans": self.plans[: task + 1], **vars(kept), "position": asdict(kept.position)})
        self._written = time.monotonic()
        self._took = self._written - began

    def load(self, task: int) -> Unfinished | None:
        """What was kept of a task; None if there is nothing, or of an earlier task.

        Raises:
            ConfigError: the task was learnt otherwise. CheckpointError: the file is damaged.
        """
        if not self.file.exists():
            return None
        saved = load_state(self.file)
        try:
            plans, names = saved.pop("plans"), ("version",)
            found = Unfinished(**{key: value for key, value in saved.items() if key not in names})
            found.position = Position(**saved["position"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{self.file}: not a task in training ({error}); delete it to begin the task again") from None
        if len(plans) != task + 1:
            return None
        require_same(self.file, plans, self.plans)
        return found

    def forget(self) -> None:
        """The task is finished."""
        self.file.unlink(missing_ok=True)
