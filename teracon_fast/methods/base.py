"""What a method of learning tasks one after the other is: how a task begins, what a step trains, what is kept for inference."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from teracon_fast.data import Batch
from teracon_fast.errors import ConfigError
from teracon_fast.model.backbone import Backbone, Convolution, head_loss, init_linear, next_item_inputs
from teracon_fast.model.masks import Parity, annealed_scale

Group = dict[str, Any]  # of parameters, as optimisers take them: "params", and "lr" where it is not the task's
AnyBackbone = TypeVar("AnyBackbone", bound=Backbone)


@dataclass(frozen=True)
class Sizes:
    """Shape of the networks of a method, see `Backbone`. The defaults are the paper's.

    Attributes:
        num_items: V, with the pad, item 0.
        channels: f.
        dilations: one per residual block.
        kernel_size: K.
        backend, algorithm: of the operations.
    """

    num_items: int
    channels: int = 256
    dilations: tuple[int, ...] = (1, 4) * 4
    kernel_size: int = 3
    backend: str = "auto"
    algorithm: str = "auto"


@dataclass(frozen=True)
class Place:
    """Where a step stands in its epoch.

    Attributes:
        batch: index of the batch, from 0.
        num_batches: samples / batch size, not rounded.
        parity: of the annealing, see `masks.annealed_scale`.
    """

    batch: int
    num_batches: float
    parity: Parity = "official"

    def scale(self, s_max: float) -> float:
        """The mask scale s of the step (Eq. 19)."""
        return annealed_scale(self.batch, self.num_batches, s_max, self.parity)


class Method(nn.Module, ABC):
    """A method in the middle of a sequence of tasks. Task 0 is the next item over all items, later ones classify sequences.

    What a driver does with it, for each task:

        method.start(task, labels, generator)
        for phase in method.phases():
            groups = method.begin_phase(phase)           # what the optimiser trains; nothing else has a gradient
            for every step:
                method.loss(batch, place, companions).backward()
                method.after_backward(); optimizer.step(); method.after_step()
            method.load_state_dict(the best)
            method.end_phase(phase)
        method.encode(x, any task so far), method.head(any task so far)

    Its state dict is all that inference on the tasks so far, and going on with the next, need: `restore` reads it.

    Subclasses implement `_start`, `_groups`, `loss` and `encode`, and override what else they need.

    Public attributes that are numbers, strings or tuples of such are taken for settings (`settings`); what changes while a task
    is trained and is none of the state has a name with an underscore.

    Args:
        sizes: of its networks.

    Attributes:
        name: of the method, as in `methods.METHODS`.
        sizes: of its networks.
        task: the one in training, counted from 0; -1 before the first.
        heads: one linear layer per task so far.
    """

    name: ClassVar[str]

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes, self.task = sizes, -1
        self.heads = nn.ModuleList()
        # Tells where the method is, and in what dtype, before it has a parameter.
        self._here: Tensor
        self.register_buffer("_here", torch.empty(0), persistent=False)

    # The sequence of tasks

    def start(self, task: int, labels: int, generator: torch.Generator | None = None) -> None:
        """Make what a task begins with: its head, masks, copies. Afterwards `self.task == task`.

        Args:
            task: counted from 0, the one after the last started.
            labels: how many the task has; V for task 0.
            generator: CPU generator that seeds the new parameters; None draws from torch's global one.

        Raises:
            ConfigError: another task is next, or no labels.
        """
        if task != self.task + 1:
            raise ConfigError(f"{self.name}: got task {task}, expected {self.task + 1} (tasks are counted from 0)")
        if labels < 1:
            raise ConfigError(f"{self.name}: task {task} has {labels} labels, expected at least one")
        seed = int(torch.randint(2**62, (), generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.task = task
            self._add_head(labels)
            self._start(task)
        # New parameters are made on the CPU, so that one seed gives the same ones anywhere.
        self.to(device=self._here.device, dtype=self._here.dtype)

    def _add_head(self, labels: int) -> None:
        """Make the present task's head, as `_start` makes the rest. Where heads are kept elsewhere, `head` and `labels` know."""
        self.heads.append(self.new_head(labels))

    @abstractmethod
    def _start(self, task: int) -> None:
        """Make what the task needs besides its head, drawing from torch's global generator, on the CPU and in float32."""

    def phases(self) -> Sequence[str]:
        """In what phases the present task is trained, each with an optimiser and best weights of its own."""
        return ("train",)

    def begin_phase(self, phase: str) -> list[Group]:
        """Parameter groups for the optimiser of a phase. From here on these parameters have gradients, and no others."""
        if phase not in self.phases():
            raise ConfigError(f"{self.name}: got phase {phase!r}, expected one of {list(self.phases())}")
        groups = self._groups(phase)
        self.requires_grad_(False)
        self.zero_grad(set_to_none=True)
        for group in groups:
            group["params"] = list(group["params"])
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        return groups

    @abstractmethod
    def _groups(self, phase: str) -> list[Group]:
        """Parameter groups of a phase; called once as it begins."""

    def end_phase(self, phase: str) -> None:
        """Called once the best weights of the phase are back."""

    # A step

    @abstractmethod
    def loss(self, batch: Batch, place: Place, companions: Mapping[int, Batch]) -> Tensor:
        """The loss of a batch of the present task, a scalar.

        Args:
            batch: where the method is.
            place: of the step in its epoch.
            companions: a batch of each task that `companions()` asks for.
        """

    def companions(self) -> tuple[int, ...]:
        """Earlier tasks of which each step needs a batch too."""
        return ()

    def after_backward(self) -> None:
        """Called between the backward pass and the optimiser's step: the place to change gradients. They may be sparse."""

    def after_step(self) -> None:
        """Called after the optimiser's step: the place to clamp, or to put back what must not move."""

    # Inference

    @abstractmethod
    def encode(self, x: Tensor, task: int, drop_last: int = 0, lengths: np.ndarray | None = None) -> Tensor:
        """User representations of any task so far, `[B, f]`, without gradient, as they are kept for inference.

        Args:
            x: int64 `[B, L]` item ids, oldest first, left-padded with 0.
            task: counted from 0.
            drop_last: items dropped from the end of each sequence first.
            lengths: real lengths int64 `[B]` on the host, if known.
        """

    def head(self, task: int) -> nn.Linear:
        """The head of any task so far: `Linear(f, labels)`."""
        self.check_task(task)
        return cast(nn.Linear, self.heads[task])

    @property
    def labels(self) -> list[int]:
        """Number of labels of each task so far."""
        return [self.head(task).out_features for task in range(len(self.heads))]

    @property
    def device(self) -> torch.device:
        """Where the method is."""
        return self._here.device

    def inference_state(self) -> dict[str, Tensor]:
        """What of the state dict inference on the tasks so far needs: what a method is charged for in comparisons."""
        return self.state_dict()

    def restore(self, labels: Sequence[int], state: Mapping[str, Any]) -> None:
        """Bring a method that has started no task to where another's state dict was taken, after so many tasks.

        Args:
            labels: of each task so far.
            state: from `state_dict()` of a method with the same settings.

        Raises:
            ConfigError: a task has been started already. RuntimeError: the state is of another form.
        """
        generator = torch.Generator().manual_seed(0)
        for task, count in enumerate(labels):
            self.start(task, count, generator)
            self.requires_grad_(False)
        self.load_state_dict(dict(state))

    def training_state(self) -> dict[str, Any]:
        """What the next step of a task in training needs besides the state dict and what `begin_phase` makes; plain values."""
        return {}

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `training_state` gave, after `start`, `begin_phase` and `load_state_dict`."""

    def settings(self) -> dict[str, Any]:
        """Name, sizes and own settings: the public attributes that are numbers, strings or tuples of such."""
        own = {name: value for name, value in vars(self).items() if not name.startswith("_") and _is_plain(value)}
        return {"name": self.name, **asdict(self.sizes), **{k: v for k, v in own.items() if k not in ("task", "training")}}

    # For subclasses

    def check_task(self, task: int) -> None:
        """Raise ConfigError unless the task has been started."""
        if not 0 <= task <= self.task:
            raise ConfigError(f"{self.name}: got task {task}, expected 0..{self.task} (tasks are counted from 0)")

    def new_backbone(self, kind: type[AnyBackbone] = Backbone) -> AnyBackbone:  # type: ignore[assignment]
        """A new network of the method's sizes."""
        sizes = self.sizes
        return kind(
            sizes.num_items, sizes.channels, sizes.dilations, sizes.kernel_size, sizes.backend, sizes.algorithm
        )

    def new_head(self, labels: int) -> nn.Linear:
        """A new head: weight N(0, 0.01), bias 0.1."""
        head = nn.Linear(self.sizes.channels, labels)
        init_linear(head)
        return head

    def task_loss(
        self, task: int, backbone: Backbone, batch: Batch, head: nn.Linear | None = None, masks: Tensor | None = None,
        weights: Sequence[Tensor] | None = None, convolve: Convolution | None = None,
    ) -> Tensor:  # fmt: skip
        """Cross-entropy of a task: of task 0 over the next items at all positions, pads counted, of others over labels.

        Args:
            task: counted from 0.
            backbone: that encodes.
            batch: of the task.
            head: None: that of the task.
            masks, weights, convolve: as `Backbone.run`.
        """
        head = self.head(task) if head is None else head
        how = {"weights": weights, "convolve": convolve}
        if task == 0:
            seen, lengths = next_item_inputs(batch.x, batch.lengths)
            found = backbone.positions(seen, masks, lengths, **how)  # type: ignore[arg-type]
            targets, rows = batch.x[:, 1:].reshape(-1), found.row_of.reshape(-1)
            return head_loss(head, found.hidden, targets, rows, backend=self.sizes.backend).loss
        hidden = backbone.represent(batch.x, masks, 0, batch.lengths, **how)  # type: ignore[arg-type]
        return head_loss(head, hidden, batch.y, backend=self.sizes.backend).loss

    @contextmanager
    def inference(self, task: int) -> Iterator[None]:
        """What `encode` runs in: no gradient, and the task is one so far."""
        self.check_task(task)
        with torch.no_grad():
            yield


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, bool | int | float | str)


def group(*modules: nn.Module | Iterable[nn.Parameter], **options: Any) -> Group:
    """A parameter group of all parameters of some modules, and of some parameters."""
    parts = [part.parameters() if isinstance(part, nn.Module) else part for part in modules]
    return {"params": [parameter for part in parts for parameter in part], **options}
