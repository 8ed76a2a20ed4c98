"""One backbone for all tasks, of whose convolution weights each task uses some: what CONURE and Piggyback have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from teracon_fast.data import Batch
from teracon_fast.methods.base import Group, Method, Place, Sizes
from teracon_fast.model.backbone import Backbone

Weights = Sequence[Tensor]  # S tensors [f, f, 1, K], in network order


class MaskedWeights(Method):
    """One backbone, frozen after task 0 but for what a subclass says; tasks differ in which convolution weights are zero.

    Biases of convolutions, LayerNorms and the item embedding are trained with task 0 and shared by all tasks: each of them enters
    what every task computes, so a later change would change earlier tasks.

    Args:
        sizes: of the network.
        kind: of the network.

    Attributes:
        backbone: the network.
    """

    def __init__(self, sizes: Sizes, kind: type[Backbone] = Backbone) -> None:
        super().__init__(sizes)
        self._kind = kind
        self._phase = ""  # the present one; "" between phases
        self._kept: dict[int, tuple[tuple[int, ...], Weights | None]] = {}

    def _start(self, task: int) -> None:
        self._phase = ""
        if task == 0:
            self.backbone = self.new_backbone(self._kind)

    @property
    def convolutions(self) -> list[nn.Parameter]:
        """The weights of the convolutions, `[f, f, 1, K]` each, in network order."""
        return [cast(nn.Parameter, self.backbone.site(site)[0].weight) for site in range(self.backbone.num_sites)]

    @abstractmethod
    def step_weights(self) -> Weights | None:
        """The weights of a training step of the present task, with gradients where they train; None: the backbone's own."""

    @abstractmethod
    def _weights_of(self, task: int) -> Weights | None:
        """The weights of a task at inference; None: the backbone's own."""

    @abstractmethod
    def _sources(self, task: int) -> Sequence[Tensor]:
        """What `_weights_of` computes from, besides the convolutions."""

    def kept_weights(self, task: int) -> Weights | None:
        """The weights that a task has at inference; None: the backbone's own.

        Between phases, and of earlier tasks, they are formed once and kept.
        """
        self.check_task(task)
        with torch.inference_mode(False), torch.no_grad():
            if self._phase and task == self.task:
                return self._weights_of(task)  # optimisers may write to parameters without counting up their version
            sources = (*self.convolutions, *self._sources(task))
            stamp = tuple(number for tensor in sources for number in (tensor.data_ptr(), tensor._version))
            if task not in self._kept or self._kept[task][0] != stamp:
                self._kept[task] = stamp, self._weights_of(task)
            return self._kept[task][1]

    def begin_phase(self, phase: str) -> list[Group]:
        """As `Method.begin_phase`."""
        groups = super().begin_phase(phase)
        self._phase = phase
        self._kept.clear()
        return groups

    def end_phase(self, phase: str) -> None:
        """As `Method.end_phase`."""
        self._phase = ""
        self._kept.clear()

    def _apply(self, *args: Any, **kwargs: Any) -> MaskedWeights:
        self._kept.clear()
        super()._apply(*args, **kwargs)
        return self

    def loss(self, batch: Batch, place: Place, companions: Mapping[int, Batch]) -> Tensor:
        """Cross-entropy of the present task."""
        return self.task_loss(self.task, self.backbone, batch, weights=self.step_weights())

    def encode(self, x: Tensor, task: int, drop_last: int = 0, lengths: np.ndarray | None = None) -> Tensor:
        """With the task's own weights; those of the present task as they are in its phase of training."""
        with self.inference(task):
            return self.backbone.represent(x, None, drop_last, lengths, self.kept_weights(task))
