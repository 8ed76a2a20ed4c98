"""The whole training step of task 1 over a large catalogue: its time, memory, and where the time goes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.profiler import profile
from torch.autograd.profiler_util import FunctionEvent

from bench.cases import S_TRAINING, Shape
from bench.heads import QUICK, Sizes, trim
from bench.measure import Side
from teracon_fast import FastTCN
from teracon_fast.train import loop as trainer
from teracon_fast.train.memory import forget_highest_resident, highest_resident_mib

PARTS = ("encoder forward and the rest", "cross-entropy", "encoder backward", "optimiser")


@dataclass
class Step(Side):
    """Measurements of the step.

    Attributes:
        peak_mib: highest resident memory of the timed steps, less what parameters, Adam's state and the gradients take.
        total_mib: the same with them: all but what importing takes.
        parameters_mib, gradients_mib, state_mib: what they take.
        parts: seconds of each of `PARTS` in the last step, which is profiled.
        loss: of the last step.
    """

    total_mib: float = 0.0
    parameters_mib: float = 0.0
    gradients_mib: float = 0.0
    state_mib: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    loss: float = 0.0


class _Training:
    """A network, its optimiser and one batch."""

    def __init__(self, precision: trainer.Precision, sizes: Sizes) -> None:
        shape = Shape(length=sizes.length, labels=(sizes.catalogue,))
        torch.manual_seed(0)
        self.model = FastTCN(num_items=sizes.catalogue, channels=sizes.channels, dilations=sizes.dilations)
        self.optimizer = trainer.make_optimizer(self.model, 1e-3)
        self.x, self.precision = shape.items(sizes.sequences), precision

    def step(self) -> float:
        return float(trainer.t1_step(self.model, self.optimizer, self.x, S_TRAINING, self.precision).class_loss)

    def gradients_mib(self) -> float:
        """Of the gradients that are there now; of sparse ones their rows and values."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        sparse = [part for g in gradients if g.is_sparse for part in (g._indices(), g._values())]
        return _mib([g for g in gradients if not g.is_sparse] + sparse)


def _mib(tensors: Iterable[Tensor]) -> float:
    return sum(tensor.nbytes for tensor in tensors) / 2**20


def measure(precision: trainer.Precision, sizes: Sizes, steps: int) -> Step:
    """Steps on one batch of random items with the example lengths, the last one profiled. For a process of its own."""
    _Training(precision, QUICK).step()  # libraries load, threads start
    trim()
    forget_highest_resident()
    empty = highest_resident_mib()
    training = _Training(precision, sizes)
    training.step()  # makes the state of Adam; not timed
    found = Step()
    found.parameters_mib = _mib(training.model.parameters())
    found.gradients_mib = training.gradients_mib()
    found.state_mib = _mib(value for state in training.optimizer.state.values() for value in state.values())
    training.optimizer.zero_grad(set_to_none=True)
    trim()
    forget_highest_resident()
    before = highest_resident_mib()

    def timed() -> None:
        start = time.perf_counter()
        found.loss = training.step()
        found.seconds.append(time.perf_counter() - start)

    for _ in range(steps - 1):
        timed()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells of itself on the terminal
    with profile(use_kineto=False) as profiler:
        timed()
    highest = highest_resident_mib()
    found.peak_mib, found.total_mib = max(0.0, highest - before - found.gradients_mib), highest - empty
    found.parts = parts(list(profiler.function_events or []), found.seconds[-1])
    return found


def parts(events: Iterable[FunctionEvent], seconds: float) -> dict[str, float]:
    """Seconds of each of `PARTS` in a profiled step that took so long."""
    loss = optimiser = backward = loss_in_backward = 0.0
    for event in events:
        taken, above = event.cpu_time_total / 1e6, list(_ancestors(event))
        if _is_loss(event) and not any(map(_is_loss, above)):
            loss += taken
            loss_in_backward += taken * any(map(_is_backward, above))
        elif _is_backward(event) and not any(map(_is_backward, above)):
            backward += taken
        elif event.name.startswith("Optimizer.step"):
            optimiser += taken
    own_backward = backward - loss_in_backward
    return dict(zip(PARTS, (seconds - loss - own_backward - optimiser, loss, own_backward, optimiser), strict=True))


def _ancestors(event: FunctionEvent) -> Iterator[FunctionEvent]:
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event


def _is_loss(event: FunctionEvent) -> bool:
    return event.name.startswith("teracon_fast::linear_cross_entropy")


def _is_backward(event: FunctionEvent) -> bool:
    return event.name.startswith("autograd::engine::evaluate_function")
