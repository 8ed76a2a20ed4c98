"""What a continual-learning method is: how a task starts, what a step trains, what is kept for inference."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from teracon_fast import ops
from teracon_fast.data import Batch
from teracon_fast.errors import ConfigError
from teracon_fast.methods.options import options_of
from teracon_fast.model.backbone import Backbone, Convolution, EncodeUsers, head_loss, init_linear, next_item_inputs
from teracon_fast.model.masks import Parity, annealed_scale
from teracon_fast.ops import low_rank

Precision = Literal["fp32", "bf16"]
Group = dict[str, Any]  # of parameters, as optimizers take them: "params", and "lr" where it is not the task's


@dataclass(frozen=True)
class Sizes:
    """Shape of the networks of a method, see `Backbone`. The defaults are the paper's.

    Attributes:
        num_items: V, with the pad, item 0. channels: f. dilations: one per residual block. kernel_size: K.
        backend, algorithm: of the operations.
    """

    num_items: int
    channels: int = 256
    dilations: tuple[int, ...] = (1, 4) * 4
    kernel_size: int = 3
    backend: str = "auto"
    algorithm: str = "auto"


@dataclass
class StepContext:
    """What a step knows besides its batch.

    Attributes:
        batch: index of the batch in its epoch, from 0.
        num_batches: samples / batch size, not rounded.
        parity: of the annealing, see `masks.annealed_scale`.
        precision: of matrix products; "bf16" keeps weights, masks, statistics and losses in fp32.
        predictions: whether to count hits too.
        companions: a batch of each task that `Method.companions()` asks for.
    """

    batch: int = 0
    num_batches: float = 1.0
    parity: Parity = "official"
    precision: Precision = "fp32"
    predictions: bool = False
    companions: Mapping[int, Batch] = field(default_factory=dict)

    def scale(self, s_max: float) -> float:
        """The mask scale s of the step (Eq. 19)."""
        return annealed_scale(self.batch, self.num_batches, s_max, self.parity)


@dataclass
class StepResult:
    """Losses of a step, left on the device, and what else there is to log of it.

    Attributes:
        losses: scalars by name; the first is the present task's.
        weights: what each is multiplied with in the sum that is minimized; 1 where nothing is said.
        log: numbers, or lists of them, by name: "scale", "rho"; tensors are read when the step is logged.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    log: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, loss: Tensor, weight: float = 1.0) -> None:
        """Record a part of the loss."""
        self.losses[name] = loss.detach()
        if weight != 1.0:
            self.weights[name] = weight


class Method(nn.Module, ABC):
    """A method in the middle of a sequence of tasks. Task 0 is the next item over all items, later ones classify sequences.

    What `train.loop.Trainer` does with it, for each task:

        method.configure(options of the task)
        method.start(task, labels, generator)
        for phase in method.phases():
            groups = method.begin_phase(phase)           # what the optimizer trains; nothing else has a gradient
            for every step:
                method.step(batch, context)              # loss and backward pass
                method.after_backward(); optimizer.step(); method.after_step()
            method.load_state_dict(the best)
            method.end_phase(phase)
        method.encoder(any task so far), method.head(any task so far)

    Its state dict is all that inference on the tasks so far, and training the next one, need: `restore` reads it.

    Subclasses implement `_start`, `_groups`, `loss` and `encoder`, and override what else they need. Arguments of the constructor
    after `sizes` are its options, see `Option`; each is kept as a public attribute of its name.

    Args:
        sizes: of its networks.

    Attributes:
        name: of the method, as in `methods.METHODS`.
        order_seed: purpose that the seed of the order of samples is derived for, see `data.derived_seed`.
        growth_refusal: why a run of the method cannot grow; "" if it can, see `grown`.
        sizes: of its networks.
        task: the one in training, counted from 0; -1 before the first.
        heads: one linear layer per task so far.
        draws: CPU generator for what is drawn while a task trains. The driver seeds it at the start of each task.
        result: what the present step reports; `loss` adds to it.
    """

    name: ClassVar[str]
    order_seed: ClassVar[str] = "order {phase}"
    growth_refusal: ClassVar[str] = ""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes, self.task = sizes, -1
        self.heads = nn.ModuleList()
        self.draws = torch.Generator()
        self.result = StepResult()
        self._in_training: list[nn.Parameter] = []  # in the present phase
        self._changed: set[str] = set()  # names of the parameters trained so far in the present task
        # Tells where the method is, and in what dtype, before it has a parameter.
        self._here: Tensor
        self.register_buffer("_here", torch.empty(0), persistent=False)

    # The sequence of tasks

    def configure(self, options: Mapping[str, Any]) -> None:
        """Set per-task options for the task that starts next.

        Raises:
            ConfigError: an option that is not declared per task, or a value out of its range.
        """
        declared = options_of(type(self))
        for name, value in options.items():
            if name not in declared or not declared[name].per_task:
                known = [option.name for option in declared.values() if option.per_task]
                raise ConfigError(f"{self.name}: got {name!r} for one task, expected one of {known}")
            setattr(self, name, value)
        self.check_options()

    def check_options(self) -> None:
        """Raise ConfigError if an option is out of its range; called by constructors and `configure`."""
        for name, option in options_of(type(self)).items():
            option.check(self.name, getattr(self, name, option.default))

    def start(self, task: int, labels: int, generator: torch.Generator | None = None) -> None:
        """Make what a task starts with: its head, masks, copies. Afterwards `self.task == task`.

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
        seed = self._initial_seed(generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.task = task
            self._add_head(labels)
            self._start(task)
        self.draws.manual_seed(seed)
        self._changed.clear()
        # New parameters are made on the CPU, so that one seed gives the same ones anywhere.
        self.to(device=self._here.device, dtype=self._here.dtype)

    def _initial_seed(self, generator: torch.Generator | None) -> int:
        return int(torch.randint(2**62, (), generator=generator))

    def _add_head(self, labels: int) -> None:
        """Make the present task's head. Where heads live elsewhere, override this with `head` and `labels`."""
        self.heads.append(self.new_head(labels))

    @abstractmethod
    def _start(self, task: int) -> None:
        """Make what the task needs besides its head, drawing from torch's global generator, on the CPU and in float32."""

    def phases(self) -> Sequence[str]:
        """The phases that the present task is trained in, each with an optimizer and best weights of its own."""
        return ("train",)

    def begin_phase(self, phase: str) -> list[Group]:
        """Parameter groups for the optimizer of a phase. From here on these parameters have gradients, and no others."""
        if phase not in self.phases():
            raise ConfigError(f"{self.name}: got phase {phase!r}, expected one of {list(self.phases())}")
        groups = self._groups(phase)
        self.requires_grad_(False)
        self.zero_grad(set_to_none=True)
        for group in groups:
            group["params"] = list(group["params"])
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        self._in_training = [parameter for group in groups for parameter in group["params"]]
        self._changed |= {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return groups

    @abstractmethod
    def _groups(self, phase: str) -> list[Group]:
        """Parameter groups of a phase; called once as it begins."""

    def end_phase(self, phase: str) -> None:
        """Called once the best weights of the phase are back."""

    # A step

    def step(self, batch: Batch, context: StepContext) -> StepResult:
        """Loss and backward pass of one step of the present task; its gradients replace those of the step before."""
        self.result = StepResult()
        if self.task == 0:
            self.clear_gradients()  # one of them is as large as the item embedding
        with torch.autocast(self.device.type, torch.bfloat16, enabled=context.precision == "bf16"):
            loss = self.loss(batch, context)
        if not self.result.losses:
            self.result.add("class_loss", loss)
        self.clear_gradients()  # not earlier in later tasks: memory given back takes time to get again
        loss.backward(ops.unit_gradient(loss))  # type: ignore[no-untyped-call]
        return self.result

    def clear_gradients(self) -> None:
        """Drop the gradients of the parameters in training, also those that were left as factors."""
        for parameter in self._in_training:
            parameter.grad = None
            low_rank.clear(parameter)

    @abstractmethod
    def loss(self, batch: Batch, context: StepContext) -> Tensor:
        """The loss of a batch of the present task, a scalar. Parts of it, and what else to log, go to `self.result`."""

    def companions(self) -> tuple[int, ...]:
        """Earlier tasks of which each step needs a batch too."""
        return ()

    def after_backward(self) -> None:
        """Called between the backward pass and the optimizer's step, to change gradients. They may be sparse."""

    def after_step(self) -> None:
        """Called after the optimizer's step, to clamp, or to restore what must not move."""

    # Inference

    @abstractmethod
    def encoder(self, task: int) -> EncodeUsers:
        """Representations of any task so far, without gradient, for many calls: what does not depend on users is computed once.

        Good for as long as the parameters stay as they are.

        Args:
            task: counted from 0.

        Returns:
            `encode(x, drop_last, lengths)` gives `[B, f]`: x int64 `[B, L]` item ids, oldest first, left-padded with 0; items
            dropped from the end of each sequence first; real lengths int64 `[B]` on the host, or None.
        """

    def encoders(self, tasks: Sequence[int]) -> dict[int, EncodeUsers]:
        """`encoder` of several tasks; override it where they share constants."""
        return {task: self.encoder(task) for task in tasks}

    def encode(self, x: Tensor, task: int, drop_last: int = 0, lengths: np.ndarray | None = None) -> Tensor:
        """User representations of one batch, `[B, f]`; arguments as `encoder` and what it returns."""
        return self.encoder(task)(x, drop_last, lengths)

    def describe(self) -> dict[str, Any]:
        """What the log keeps of the method after each epoch: numbers, or lists with one a task."""
        return {}

    def summarize(self) -> dict[str, Any]:
        """What the log keeps of the method at the end of a task, besides `describe`."""
        return {}

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
            labels: of each task so far. state: from `state_dict()` of a method with the same settings.

        Raises:
            ConfigError: a task has been started already. RuntimeError: the state is of another form.
        """
        generator = torch.Generator().manual_seed(0)
        for task, count in enumerate(labels):
            self.start(task, count, generator)
            self.requires_grad_(False)
        self.load_state_dict(dict(state))

    def grown(self, num_items: int, labels: Sequence[int], generator: torch.Generator | None = None) -> Method:
        """A copy with more items and labels: the old rows, then those of a new method. One seed gives the same after any task.

        Args:
            num_items: V of the copy. labels: of each task so far; V for task 0.
            generator: CPU generator that seeds the new rows; None draws from torch's global one.

        Raises:
            ConfigError: the method cannot grow, or there would be fewer items or labels.
        """
        self._check_growth(num_items, labels)
        new = type(self)(replace(self.sizes, num_items=num_items), **self._options()).to(self._here)
        for task, count in enumerate(labels):
            new.start(task, count, generator)
            new.requires_grad_(False)
        larger = new.state_dict()
        for key, value in self.state_dict().items():
            if key not in larger or larger[key].shape[1:] != value.shape[1:] or len(larger[key]) < len(value):
                raise ConfigError(f"{self.name}: {key} of shape {list(value.shape)} cannot grow by rows")
            larger[key][: len(value)] = value
        return new

    def _check_growth(self, num_items: int, labels: Sequence[int]) -> None:
        if self.growth_refusal:
            raise ConfigError(f"{self.name} cannot grow: {self.growth_refusal}")
        old, new = [self.sizes.num_items, *self.labels], [num_items, *labels]
        if len(new) != len(old) or any(count < before for count, before in zip(new, old, strict=True)):
            got, least = (f"{items} items and {counts} labels" for items, *counts in (new, old))
            raise ConfigError(f"{self.name}: got {got}, expected one count per task, at least {least}")

    def next_item_loss(self, batch: Batch) -> Tensor:
        """Loss of task 0 with the weights and masks of inference, for fitting the rows of new items after growth.

        Raises:
            ConfigError: the method does not implement it.
        """
        raise ConfigError(f"{self.name}: has no next_item_loss, so rows of new items cannot be fitted")

    def training_state(self) -> dict[str, Any]:
        """What the next step of a task in training needs besides the state dict and what `begin_phase` makes; plain values."""
        return {"draws": self.draws.get_state()}

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `training_state` gave, after `start`, `begin_phase` and `load_state_dict`."""
        self.draws.set_state(state["draws"])

    def changing_state(self) -> dict[str, Tensor]:
        """What of the state dict the present task changes: buffers, and the parameters trained in it so far. Not copied."""
        kept = {name for name, _ in self.named_parameters()} - self._changed
        return {name: value for name, value in self.state_dict().items() if name not in kept}

    def load_changing_state(self, state: Mapping[str, Tensor]) -> list[str]:
        """Load what `changing_state` gave; returns the names in it that the method does not have."""
        self._changed |= {name for name, _ in self.named_parameters()} & set(state)
        return list(self.load_state_dict(dict(state), strict=False).unexpected_keys)

    def enable_graphs(self) -> None:
        """Replay steps as CUDA graphs from the next `begin_phase` on.

        Raises:
            ConfigError: the method, its backend or its device has none.
        """
        raise ConfigError(f"cuda_graphs: {self.name} has no CUDA graphs, expected teracon or parameter_masks")

    def settings(self) -> dict[str, Any]:
        """Name, sizes and options."""
        return {"name": self.name, **asdict(self.sizes), **self._options()}

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in options_of(type(self))}

    # For subclasses

    def check_task(self, task: int) -> None:
        """Raise ConfigError unless the task has been started."""
        if not 0 <= task <= self.task:
            raise ConfigError(f"{self.name}: got task {task}, expected 0..{self.task} (tasks are counted from 0)")

    def new_backbone(self, kind: type[Backbone] = Backbone) -> Backbone:
        """A new network of the method's sizes."""
        return kind(**vars(self.sizes))

    def new_head(self, labels: int) -> nn.Linear:
        """A new head: weight N(0, 0.01), bias 0.1."""
        head = nn.Linear(self.sizes.channels, labels)
        init_linear(head)
        return head

    def task_loss(
        self, task: int, backbone: Backbone, batch: Batch, context: StepContext | None = None, head: nn.Linear | None = None,
        masks: Tensor | None = None, weights: Sequence[Tensor] | None = None, convolve: Convolution | None = None,
    ) -> Tensor:  # fmt: skip
        """Cross-entropy of a task: of task 0 over the next items at all positions, pads counted, of others over labels.

        Args:
            task: counted from 0.
            backbone: that encodes.
            batch: of the task.
            context: where it asks for predictions, hit@1 of the batch goes to `self.result`; None: nothing does.
            head: None: that of the task.
            masks, weights, convolve: as `Backbone.run`.
        """
        head = self.head(task) if head is None else head
        how: dict[str, Any] = {"weights": weights, "convolve": convolve}
        predictions, counts = context is not None and context.predictions, None
        if task == 0:
            seen, lengths = next_item_inputs(batch.x, batch.lengths)
            states = backbone.positions(seen, masks, lengths, **how)
            targets, rows = batch.x[:, 1:].reshape(-1), states.row_of.reshape(-1)
            found = head_loss(head, states.hidden, targets, rows, predictions, self.sizes.backend)
            counts = targets != 0
        else:
            hidden = backbone.represent(batch.x, masks, 0, batch.lengths, **how)
            found = head_loss(head, hidden, batch.y, None, predictions, self.sizes.backend)
        if predictions:
            self.report_hits(found.rank, counts)
        return found.loss

    def report_hits(self, rank: Tensor, counts: Tensor | None = None) -> None:
        """Log hit@1 of a step: the share of ranks of 0, where `counts` (default: everywhere); 0 where nothing counts."""
        hits = rank == 0
        self.result.log["hit@1"] = (
            hits.float().mean() if counts is None else (hits & counts).sum() / counts.sum().clamp_min(1)
        )


def group(*modules: nn.Module | Iterable[nn.Parameter], **options: Any) -> Group:
    """A parameter group of all parameters of some modules, and of some parameters."""
    parts = [part.parameters() if isinstance(part, nn.Module) else part for part in modules]
    return {"params": [parameter for part in parts for parameter in part], **options}
