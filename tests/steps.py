"""Single steps of TERACON on a given network, with given users, rates and scale: what tests compare with other programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from teracon_fast import FastTCN, packing
from teracon_fast.data import Batch
from teracon_fast.methods import StepContext, StepResult, Teracon
from teracon_fast.methods.base import Precision
from teracon_fast.train.loop import train_step


class FixedContext(StepContext):
    """A context whose mask scale is given."""

    def __init__(self, s: float, precision: Precision = "fp32", predictions: bool = False) -> None:
        super().__init__(precision=precision, predictions=predictions)
        self.s = s

    def scale(self, s_max: float) -> float:
        return self.s


@dataclass(frozen=True)
class Step:
    """What a step leaves on the device, and the method that took it."""

    result: StepResult
    method: Teracon

    @property
    def class_loss(self) -> Tensor:
        return self.result.losses["class_loss"]

    @property
    def retention_loss(self) -> Tensor:
        return self.result.losses["retention_loss"]

    @property
    def hit(self) -> Tensor | None:
        return self.result.log.get("hit@1")

    @property
    def next_rho(self) -> list[float]:
        """Rates of the next step; waits for the masks."""
        return self.method.rho


class GivenUsers(Teracon):
    """TERACON with given users and rates in place of drawn ones."""

    users: Sequence[Tensor] = ()
    rates: Sequence[float] = ()

    def draw_users(self, batch: int, rates: Sequence[float]) -> list[Tensor]:
        return list(self.users)


@lru_cache(maxsize=8)  # a phase begins once: it reads all parameters, and so all rows that lazy Adam has left behind
def method_of(model: FastTCN, teacher: FastTCN | None = None, graphs: Any = None, **options: Any) -> GivenUsers:
    """The method around a network, its phase begun. `graphs`: `StepGraphs` to replay steps with."""
    method = GivenUsers.around(model, teacher, **options)
    assert isinstance(method, GivenUsers)
    method.begin_phase("train")
    if graphs is not None:
        method._wants_graphs = True
        method._graphs = {"fp32": graphs, "bf16": graphs}
    return method


def t1_step(
    model: FastTCN, optimizer: torch.optim.Optimizer, x: Tensor, s: float, precision: Precision = "fp32",
    lengths: Any = None, predictions: bool = False, graphs: Any = None,
) -> Step:  # fmt: skip
    """A step of task 1."""
    return _step(method_of(model, graphs=graphs), optimizer, x, None, s, precision, lengths, predictions)


def continual_step(
    model: FastTCN, teacher: FastTCN, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, users: Sequence[Tensor],
    rho: Sequence[float], s: float, alpha: float, student_mask: str = "past", c: float = 6.0, precision: Precision = "fp32",
    lengths: Any = None, predictions: bool = False, graphs: Any = None,
) -> Step:  # fmt: skip
    """A step of a later task."""
    method = method_of(model, teacher, graphs=graphs, alpha=alpha, student_mask=student_mask, c=c)
    method.users, method.rho = users, rho
    return _step(method, optimizer, x, y, s, precision, lengths, predictions)


def _step(
    method: Teracon, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor | None, s: float, precision: Precision,
    lengths: Any, predictions: bool,
) -> Step:  # fmt: skip
    lengths = packing.real_lengths(x) if lengths is None else lengths
    y = x.new_empty(0) if y is None else y
    batch = Batch(x.to(method.device), y.to(method.device), lengths)
    return Step(train_step(method, optimizer, batch, FixedContext(s, precision, predictions)), method)
