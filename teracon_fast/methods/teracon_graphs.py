"""Training steps recorded once and replayed: CUDA graphs, one for each bucket of a batch's table sizes.

On a GPU a step is some hundreds of short launches, and queueing them can take the host longer than they take the GPU. A graph
queues the encoders, the heads, the losses and their backward passes at once. What comes before stays outside: the masks, whose
sampling rates the host reads while the graph runs, and the tables. So does what comes after: the optimizer.

A graph reads and writes fixed memory. A batch's tables are padded to the sizes of its bucket (`padding`), retention's users to
a multiple of `USERS`, and all of it is copied to where the graph reads it; rates and numbers of users are read on the GPU too.
What is padded adds nothing but zeros to any result.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from teracon_fast import ops
from teracon_fast.errors import ConfigError
from teracon_fast.methods.base import Precision
from teracon_fast.methods.teracon_loss import loss_of_states
from teracon_fast.model.backbone import PackedPositions
from teracon_fast.model.fast_tcn import FastTCN
from teracon_fast.ops import backends
from teracon_fast.ops.task_masks import of_tasks
from teracon_fast.optim import lazy_rows
from teracon_fast.packing import PackedBatch, Streams, transfers
from teracon_fast.packing.buckets import sizes

# Retention's users are padded to a multiple of so many.
USERS = 64

# Makes of a function one that does the same again, by other means.
Recorder = Callable[[Callable[[], None]], Callable[[], None]]


@dataclass
class Inputs:
    """Everything that differs from step to step, where the model is.

    Attributes:
        x: int64 `[B, L]`. y: int64 `[B]`, empty for task 1.
        student: padded tables of the student's pass. teacher: of the teacher's.
        masks: `[S, requests, f]`, of the student's requests. teacher_masks: of the teacher's.
        rates: float64 `[J]`, that retention's users were drawn with. users: int32 `[J]`, how many they are.
    """

    x: Tensor
    y: Tensor
    student: PackedBatch
    masks: Tensor
    teacher: PackedBatch | None = None
    teacher_masks: Tensor | None = None
    rates: Tensor | None = None
    users: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All of them, each once, in an order that equal shapes have in common."""
        own = [self.x, self.y, self.masks, self.teacher_masks, self.rates, self.users]
        tables = [t for packed in (self.student, self.teacher) if packed is not None for t in packed.tensors()]
        return list({id(t): t for t in (*own, *tables) if t is not None}.values())

    def copied(self) -> Inputs:
        """The same in memory of its own."""
        own = {id(t): t.detach().clone() for t in self.tensors()}

        def of(value: Any) -> Any:
            if isinstance(value, PackedBatch):
                return value.mapped(lambda t: own[id(t)])
            return None if value is None else own[id(value)]

        return Inputs(**{name: of(value) for name, value in vars(self).items()})


@dataclass
class _Recorded:
    """A step that can be replayed: where it reads, and what it leaves there."""

    inputs: Inputs
    replay: Callable[[], None] = lambda: None
    losses: tuple[ops.CrossEntropy, Tensor] | None = None
    d_masks: Tensor | None = None
    gradients: list[tuple[nn.Parameter, Tensor]] | None = None


def cuda_graphs() -> Recorder:
    """Records CUDA graphs, whose memory comes from one pool: they take turns."""
    pool = torch.cuda.graph_pool_handle()

    def record(function: Callable[[], None]) -> Callable[[], None]:
        # What a first call compiles or allocates must not be in the graph.
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            function()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            function()
        return graph.replay

    return record


class StepGraphs:
    """Forward and backward passes of the steps of one task, for `Teracon.step`.

    The optimizer must leave the parameters where they are, as those of PyTorch and `optim.Adam` do.

    Args:
        model: in training, with the backend "triton": other backends read on the host what differs from step to step.
        teacher: None for task 1.
        alpha: weight of the retention loss. one_mask: as `teracon_loss.step_states`. precision: of matrix products.
        most: graphs that are kept; the least recently used one goes first. Each holds the gradients of its step.
        record: how a step is recorded; None: as a CUDA graph.

    Raises:
        ConfigError: for a model with another backend, or without a CUDA device where that is needed.
    """

    def __init__(
        self, model: FastTCN, teacher: FastTCN | None = None, alpha: float = 0.0, one_mask: bool = False,
        precision: Precision = "fp32", most: int = 4, record: Recorder | None = None,
    ) -> None:  # fmt: skip
        self.check(model.backend, model.device, record)
        self._model, self._teacher, self._alpha = model, teacher, alpha
        self._one_mask, self._bf16, self._most = one_mask, precision == "bf16", most
        self._record = cuda_graphs() if record is None else record
        self._recorded: OrderedDict[Hashable, _Recorded] = OrderedDict()
        self.recordings = 0  # so far

    @staticmethod
    def check(backend: str, device: torch.device, record: Recorder | None = None) -> None:
        """Raise ConfigError unless steps of a backend on a device can be recorded."""
        chosen = backends.resolve(backend, "masked_conv", device, torch.float32)
        if chosen != "triton" or (record is None and device.type != "cuda"):
            raise ConfigError(f"got a model with backend {chosen!r} on {device}, expected 'triton' on cuda for CUDA graphs")

    def next_item(
        self, x: Tensor, masks: Tensor, lengths: NDArray[np.int64], predictions: bool = False
    ) -> ops.CrossEntropy:
        """Task 1's loss, with its gradients added to the parameters; ranks too with `predictions`. Shapes as in `continual`."""
        streams = [Streams(np.arange(len(x)))]
        packed = self._model.pack(x.shape[1] - 1, np.maximum(lengths - 1, 0), streams, every_position=True, padded=True)
        return self._run(Inputs(x, x.new_empty(0), packed, of_tasks(masks, [0])), predictions)[0]

    def continual(
        self, x: Tensor, y: Tensor, users: Sequence[Tensor], rho: Sequence[float], masks: Tensor, teacher_masks: Tensor,
        lengths: NDArray[np.int64], predictions: bool = False,
    ) -> tuple[ops.CrossEntropy, Tensor]:  # fmt: skip
        """The class loss of a later task and its retention loss times alpha (or 1), with the gradients of both together.

        Args:
            x: int64 `[B, L]`. y: int64 `[B]`. Both where the model is.
            users: on the host, for each past task the rows of x drawn for it. rho: the rates that they were drawn with.
            masks: `[S, T, f]`, differentiable. teacher_masks: `[S, J, f]`.
            lengths: real lengths int64 `[B]`. predictions: whether ranks are wanted.
        """
        model, teacher = self._model, self._teacher
        assert teacher is not None
        current, past = model.num_tasks - 1, list(range(len(users)))
        drawn = [Streams(rows.numpy(), int(j == 0)) for j, rows in enumerate(users)]
        everyone = [Streams(np.arange(len(x))), *drawn]
        student = _with_padded_users(model.pack(x.shape[1], lengths, everyone, padded=True), 1)
        pseudo = _with_padded_users(teacher.pack(x.shape[1], lengths, drawn, padded=True), 0)
        chosen = of_tasks(masks, [current, *([current] * len(past) if self._one_mask else past)])
        numbers = np.array(rho, np.float64).view(np.int64), np.array([len(rows) for rows in users], np.int32)
        rates, counts = transfers.together(numbers, x.device)
        return self._run(
            Inputs(x, y, student, chosen, pseudo, teacher_masks, rates.view(torch.float64), counts), predictions
        )

    def _run(self, inputs: Inputs, predictions: bool) -> tuple[ops.CrossEntropy, Tensor]:
        # A graph cannot know how far the optimizer has left a row behind.
        lazy_rows.catch_up(self._model.embeding.stored, inputs.x)
        recorded = self._recording(inputs, predictions)
        with torch.no_grad():
            torch._foreach_copy_(recorded.inputs.tensors(), inputs.tensors())
        recorded.replay()
        assert recorded.gradients is not None and recorded.d_masks is not None and recorded.losses is not None
        for parameter, gradient in recorded.gradients:
            parameter.grad = gradient
        torch.autograd.backward(inputs.masks, recorded.d_masks)
        # Losses are read later, when the memory that the graph writes holds those of another step.
        found, retention = recorded.losses
        return ops.CrossEntropy(*(t.detach().clone() for t in found)), retention.detach().clone()

    def _recording(self, inputs: Inputs, predictions: bool) -> _Recorded:
        tables = tuple(sizes(packed) for packed in (inputs.student, inputs.teacher) if packed is not None)
        key = tuple(inputs.x.shape), tables, predictions
        if key not in self._recorded:
            self._recorded[key] = self._new(inputs.copied(), predictions)
            self.recordings += 1
            if len(self._recorded) > self._most:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(key)
        return self._recorded[key]

    def _new(self, held: Inputs, predictions: bool) -> _Recorded:
        recorded, model = _Recorded(held), self._model
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def step() -> None:
            masks = held.masks.detach().requires_grad_()
            with torch.enable_grad(), lazy_rows.caught_up(model.embeding.stored):
                # Copies that autocast keeps would be those of the first step.
                with torch.autocast(held.x.device.type, torch.bfloat16, enabled=self._bf16, cache_enabled=False):
                    loss, recorded.losses = self._loss(held, masks, predictions)
                recorded.d_masks, *gradients = torch.autograd.grad(
                    loss, [masks, *parameters], ops.unit_gradient(loss), allow_unused=True
                )
            pairs = zip(parameters, gradients, strict=True)
            recorded.gradients = [(parameter, gradient) for parameter, gradient in pairs if gradient is not None]

        recorded.replay = self._record(step)
        return recorded

    def _loss(self, held: Inputs, masks: Tensor, predictions: bool) -> tuple[Tensor, tuple[ops.CrossEntropy, Tensor]]:
        """The loss to take gradients of; the class loss and that of retention."""
        model, teacher = self._model, self._teacher
        if teacher is None:
            positions = PackedPositions(model.states(held.x[:, :-1], held.student, masks), held.student.outputs[0])
            found = model.next_item_of(positions, held.x, predictions)
            return found.loss, (found, found.loss)
        assert held.teacher is not None and held.teacher_masks is not None and held.rates is not None
        with torch.no_grad():
            pseudo = _outputs(teacher, held.x, held.teacher, held.teacher_masks)
        hidden, *student = _outputs(model, held.x, held.student, masks)
        loss, found, retention = loss_of_states(
            model, teacher, hidden, student, pseudo, held.y, held.rates, self._alpha, predictions, valid=held.users
        )
        return loss, (found, retention)


def _outputs(model: FastTCN, x: Tensor, packed: PackedBatch, masks: Tensor) -> list[Tensor]:
    rows = model.states(x, packed, masks)
    return [ops.gather_rows(rows, numbers) for numbers in packed.outputs]


def _with_padded_users(packed: PackedBatch, first: int) -> PackedBatch:
    """The outputs from request `first` on padded to a multiple of `USERS`, by a row that there is."""
    outputs = [
        rows if number < first else F.pad(rows, (0, -len(rows) % USERS)) for number, rows in enumerate(packed.outputs)
    ]
    return replace(packed, outputs=outputs)
