"""CONURE (Yuan et al. 2021, "One Person, One Model, One World", SIGIR): iterative pruning and retraining of one network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from teracon_fast.errors import ConfigError
from teracon_fast.methods.base import Group, Sizes, group
from teracon_fast.methods.options import Option
from teracon_fast.methods.preactivation import PreActivationBackbone
from teracon_fast.methods.shared_backbone import SharedBackbone
from teracon_fast.model.backbone import Backbone

PRUNING = (0.7, 0.8, 0.9, 0.8, 0.9, 0.9)  # pruning ratios of TTL's tasks, from the appendix of the TERACON paper
FREE = 127  # owner of a weight that no task has kept: above every task, and the largest int8
_BLOCKS: dict[str, type[Backbone]] = {"post-norm": Backbone, "pre-activation": PreActivationBackbone}

Block = Literal["post-norm", "pre-activation"]
Pruned = Literal["zero", "as-is"]


class Conure(SharedBackbone):
    """Parameter isolation: each task keeps the largest of the convolution weights that are still free, and freezes them.

    A task is trained in two phases. "train" trains all free weights, those of earlier tasks frozen and taking part (Eq. 4 of the
    TERACON paper), and the head. At its end the largest (1 - p) of the free weights of each convolution are kept (Eq. 5), the
    others pruned: they take no part from here on, and stay free for later tasks. "retrain" trains the kept ones and the head. A
    task is encoded by the weights that tasks 0 to itself have kept. With p = 0 nothing is pruned, and there is no "retrain".

    Biases, LayerNorms and the item embedding train in "train" of task 0 only, as in the authors' program: its later runs, and
    the retraining of task 0, train "weight" and "softmax" variables alone, and read task 0's LayerNorms. Each phase needs an
    optimizer of its own, without weight decay, or frozen weights would move.

    Args:
        sizes: of the network.
        pruning: p of each task in order, or one for all, each in [0, 1).
        block: "post-norm", the block of the other methods, or "pre-activation", that of CONURE's authors.
        pruned: where the next task finds weights that were pruned: "as-is", where they were when they were pruned, as in the
            authors' program, or at "zero", as in PackNet (Mallya and Lazebnik 2018).

    Attributes:
        backbone: the network.
        owners: int8 `[S, f, f, 1, K]`, the task that keeps each convolution weight; `FREE` where none does.

    Raises:
        ConfigError: a setting is out of its range; at `start`, there is no ratio for the task.
    """

    name = "conure"
    owners: Tensor

    def __init__(
        self,
        sizes: Sizes,
        pruning: Annotated[
            float | tuple[float, ...],
            Option("share of the free weights that a task prunes; a list has one a task", per_task=True),
        ] = PRUNING,
        block: Annotated[
            Block, Option("LayerNorm after the convolution, or before it as in CONURE's own program")
        ] = "post-norm",
        pruned: Annotated[
            Pruned, Option("where later tasks find pruned weights: as they were, or at zero as in PackNet")
        ] = "as-is",
    ) -> None:
        super().__init__(sizes)
        self.pruning, self.block, self.pruned = pruning, block, pruned
        self._phase = ""  # the present one; "" between phases
        self.check_options()

    def check_options(self) -> None:
        super().check_options()
        ratios = (self.pruning,) if isinstance(self.pruning, int | float) else tuple(self.pruning)
        if not ratios or not all(0 <= ratio < 1 for ratio in ratios):
            raise ConfigError(f"conure: pruning is {self.pruning}, expected ratios from 0 to below 1, at least one")

    def ratio(self, task: int) -> float:
        """p of a task: the share of the free weights that it prunes."""
        if isinstance(self.pruning, int | float):
            return float(self.pruning)
        if task >= len(self.pruning):
            raise ConfigError(f"conure: task {task} is one too many for the pruning ratios {list(self.pruning)}")
        return self.pruning[task]

    def start(self, task: int, labels: int, generator: torch.Generator | None = None) -> None:
        if task >= FREE:
            raise ConfigError(f"conure: got task {task}, expected at most {FREE - 1}")
        self.ratio(max(task, 0))
        super().start(task, labels, generator)

    def _start(self, task: int) -> None:
        self._phase = ""
        if task == 0:
            self.backbone = self.new_backbone(_BLOCKS[self.block])
            shape = (self.backbone.num_sites, *self.convolutions[0].shape)
            self.register_buffer("owners", torch.full(shape, FREE, dtype=torch.int8))

    def phases(self) -> Sequence[str]:
        """"train", and "retrain" where weights are pruned."""
        return ("train", "retrain") if self.ratio(self.task) else ("train",)

    def _groups(self, phase: str) -> list[Group]:
        self._phase, head = phase, self.head(self.task)
        if self.task == 0 and phase == "train":
            return [group(self.backbone, head)]
        if not bool((self.owners == self._trained()).any()):
            return [group(head)]  # no weight is left
        return [group(self.convolutions, head)]

    def _trained(self) -> int:
        """Owner of the weights that train in the present phase."""
        return FREE if self._phase == "train" else self.task

    @torch.no_grad()
    def end_phase(self, phase: str) -> None:
        """After "train", prune."""
        self._phase = ""
        if phase == "train":
            for owner, weight in zip(self.owners, self.convolutions, strict=True):
                owner[largest(weight, owner == FREE, self.ratio(self.task))] = self.task
                if self.pruned == "zero":
                    weight.masked_fill_(owner == FREE, 0)

    @torch.no_grad()
    def after_backward(self) -> None:
        """Weights that do not train have a gradient of exactly 0, with which Adam leaves them as they are, bit by bit."""
        if self.task == 0 and self._phase == "train":
            return
        trained = self._trained()
        for owner, weight in zip(self.owners, self.convolutions, strict=True):
            if weight.grad is not None:
                weight.grad.masked_fill_(owner != trained, 0)

    def backbone_options(self, task: int) -> dict[str, Any]:
        """The weights kept up to a task, the others zero; in "train" every weight takes part."""
        if task == self.task and self._phase == "train":
            return {}
        pairs = zip(self.owners, self.convolutions, strict=True)
        return {"weights": [torch.where(owner <= task, weight, 0) for owner, weight in pairs]}

    def describe(self) -> dict[str, Any]:
        """Share of the convolution weights that no task keeps so far: what is left for later tasks."""
        return {"free_weights": float((self.owners == FREE).float().mean())}


def largest(weight: Tensor, free: Tensor, ratio: float) -> Tensor:
    """The free weights that remain when a share of them is pruned: the largest by magnitude, of equal ones the first.

    Args:
        weight: any shape.
        free: bool, as weight.
        ratio: share that is pruned, in [0, 1).

    Returns:
        bool, as weight; true for `n - round(ratio * n)` of the n free ones, halves to even.
    """
    count = int(free.sum())
    remain = count - round(ratio * count)
    magnitude = weight.abs().masked_fill(~free, -1).flatten()
    order = magnitude.sort(descending=True, stable=True).indices
    kept = torch.zeros_like(free).flatten()
    kept[order[:remain]] = True
    return kept.view_as(free)
