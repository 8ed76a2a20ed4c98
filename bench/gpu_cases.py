"""What `bench/gpu.py` measures: the cases of the bench on a GPU, at the full TTL shape, and each side's call.

Sides: `eager`, the dense reference in float32 with TF32 allowed; `eager-bf16`, the same under autocast; `compile-bf16`, that
compiled, where asked for; `torch`, `torch-bf16`, ours on plain PyTorch operations; `ours-fp32`, `ours-bf16`, ours on the
backend that is measured; `ours-bf16-graphs`, training steps replayed as CUDA graphs. The reference gets its best settings:
TF32, cudnn.benchmark, fused Adam, its inputs on the device. Ours gets its inputs as the trainer does, on the host.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import traffic
from bench.cases import ALPHA, RHO, S_MAX, S_TRAINING, TINY, TTL, Case, ContinualStep, FirstStep, Own, Run, Shape, bf16
from bench.measure import DifferentAnswers, check
from bench.operations import Operations
from bench.traffic import Traffic
from teracon_fast import FastTCN, Request
from teracon_fast.methods.teracon_graphs import StepGraphs
from teracon_fast.packing import PackedBatch, Streams
from teracon_fast.reference import ReferenceTCN, clamp_task_embeddings, continual_step
from teracon_fast.reference import step as reference_step
from teracon_fast.train import loop as trainer

FULL = replace(TTL, labels=(646_000, 17_880, 8), batch=1024)
QUICK = replace(TINY, labels=(90, 30, 8))
OURS, REPLAYED = "ours-bf16", "ours-bf16-graphs"
# Of the difference from the eager side's states, as a whole.
STATE_ERRORS = {"bf16": 0.05, "fp32": 2e-3}


class GpuCase(Case):
    """A case on a device.

    Attributes:
        own: how each side of ours runs.
        notes: what is to be said of a side's measurement.
    """

    def __init__(self, shape: Shape, device: torch.device, backend: str) -> None:
        super().__init__(shape)
        self.device = device
        self.own = {
            "torch": Own("torch"), "torch-bf16": Own("torch", precision="bf16"),
            "ours-fp32": Own(backend), OURS: Own(backend, precision="bf16"),
        }  # fmt: skip
        self.notes: dict[str, str] = {}
        self.read: dict[str, list[float]] = {}

    def sides(self, compiled: bool = False) -> tuple[str, ...]:
        """Names, the first is what answers are compared with."""
        return ("eager", "eager-bf16", *(("compile-bf16",) if compiled else ()), *self.own)

    @abstractmethod
    def traffic(self) -> Traffic:
        """Bytes that one call in bf16 has to move."""

    def told(self, side: str, answer: Tensor) -> Tensor:
        """A call's answer on the host, with what the call had read there already."""
        return torch.cat([answer.detach().cpu().float().flatten(), torch.tensor(self.read.get(side, []))])

    def check(self, answers: Mapping[str, Tensor]) -> None:
        """Compare every answer with the first side's.

        Raises:
            DifferentAnswers: they differ by more than rounding.
        """
        check(self, beside_eager(answers))

    def reference(self, tasks: int) -> ReferenceTCN:
        torch.manual_seed(tasks)
        with self.device:
            return ReferenceTCN(self.shape.model_para(tasks))

    def fast(self, tasks: int, side: str) -> FastTCN:
        with self.device:
            model = FastTCN(self.shape.model_para(tasks), backend=self.own[side].backend)
        model.load_state_dict(self.reference(tasks).state_dict())
        return model

    def dense(self, side: str, tasks: int, users: int) -> ReferenceTCN:
        """The model of a dense side; what is compiled is the pass over the whole batch."""
        model = self.reference(tasks)
        if side == "compile-bf16":
            whole_batch, eager = self.compiled(model.hidden), model.hidden
            model.hidden = lambda x, masks: (whole_batch if len(x) == users else eager)(x, masks)  # type: ignore
        return model

    def adam(self, model: torch.nn.Module, lr: float) -> torch.optim.Adam:
        return torch.optim.Adam(model.parameters(), lr=lr, fused=self.device.type == "cuda" or None)

    def cast(self, side: str, run: Run) -> Run:
        """Under autocast, where the side has it."""
        return bf16(run, self.device.type) if side.endswith("bf16") else run


def beside_eager(answers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The answers with one of "eager": the first side's, where that one did not fit. If it is a half precision's, so are all."""
    first = next(iter(answers), "eager")
    named = {f"{name}, bf16" if first.endswith("bf16") else name: answer for name, answer in answers.items()}
    return {"eager": answers[first], **named} if answers else {}


def compare_states(title: str, answers: Mapping[str, Tensor]) -> None:
    """Compare states with the first side's, as a whole.

    Raises:
        DifferentAnswers: the difference's norm is above `STATE_ERRORS` of the state's.
    """
    answers = beside_eager(answers)
    for side, answer in answers.items():
        expected = answers["eager"]
        error = float((answer - expected).norm() / expected.norm())
        limit = STATE_ERRORS["bf16" if side.endswith("bf16") else "fp32"]
        if not error <= limit:
            raise DifferentAnswers(f"{title}: {side} is off by {error:.3g} of what is expected, at most {limit:g}")


class _Step(GpuCase):
    """A training step, which can be replayed where there are CUDA graphs."""

    def __init__(self, shape: Shape, device: torch.device, backend: str) -> None:
        super().__init__(shape, device, backend)
        if device.type == "cuda" and backend == "triton":
            self.own[REPLAYED] = self.own[OURS]

    def graphs(self, side: str, model: FastTCN, teacher: FastTCN | None = None) -> StepGraphs | None:
        return StepGraphs(model, teacher, ALPHA, precision=self.own[side].precision) if side == REPLAYED else None


class TrainingStep(_Step, ContinualStep):
    """The step of task 3 with retention, the next rho, Adam and the clamp. Ours reads rho after each step, as training does."""

    def side(self, side: str) -> Run:
        x, users, rho = self.shape.items(self.users), self.drawn(), [RHO] * self.past
        tasks = self.past + 1
        y = torch.randint(self.shape.task_labels(tasks)[-1], (self.users,), generator=torch.Generator().manual_seed(1))
        if side in self.own:
            model, teacher = self.fast(tasks, side), self.fast(self.past, side).requires_grad_(False)
            optimizer, lengths = trainer.make_optimizer(model, 1e-4), self.shape.lengths(self.users)
            graphs = self.graphs(side, model, teacher)

            def run_ours() -> Tensor:
                result = trainer.continual_step(
                    model, teacher, optimizer, x, y, users, rho, S_TRAINING, ALPHA,
                    precision=self.own[side].precision, lengths=lengths, graphs=graphs,
                )  # fmt: skip
                assert result.retention_loss is not None and result.next_rho is not None
                self.read[side] = result.next_rho.tolist()
                return torch.stack([result.class_loss, result.retention_loss])

            return run_ours
        dense, frozen = self.dense(side, tasks, self.users), self.reference(self.past).requires_grad_(False)
        adam = self.adam(dense, 1e-4)
        x, y, users = x.to(self.device), y.to(self.device), [rows.to(self.device) for rows in users]

        def run() -> Tensor:
            result = continual_step(dense, frozen, adam, x, y, users, rho, S_TRAINING, ALPHA)
            return torch.tensor([result.class_loss, result.retention_loss, *result.next_rho])

        return self.cast(side, run)

    def passes(self) -> tuple[PackedBatch, PackedBatch]:
        """Tables of the student's pass and of the teacher's."""
        shape, network, lengths = self.shape, self.shape.network, self.shape.lengths(self.users)
        past = [Streams(users.numpy(), int(task == 0)) for task, users in enumerate(self.drawn())]
        together = [Streams(np.arange(self.users)), *past]
        return network.pack(lengths, shape.length, together), network.pack(lengths, shape.length, past)

    def traffic(self) -> Traffic:
        f, (*past, current) = self.shape.channels, self.shape.task_labels(self.past + 1)
        student, teacher = self.passes()
        items = len(self.shape.items(self.users).unique())
        moved = traffic.encoder(student, f, 2, train=True) + traffic.encoder(teacher, f, 2)
        moved += traffic.head(sum(past), f, 2) + traffic.head(current, f, 2)  # student and teacher; twice in cross-entropy
        moved += traffic.adam("Adam, past heads", float(f * sum(past)), dense_gradient=False)
        moved += traffic.adam("Adam, embedding", float(f * items))
        return moved + traffic.adam("Adam, backbone and current head", float(f * current + backbone_numbers(self.shape)))


class FirstTaskStep(_Step, FirstStep):
    """The step of task 1. Where a dense side's logits do not fit, it takes the batch in parts and says so."""

    name = "t1-step"

    def side(self, side: str) -> Run:
        x = self.shape.items(self.users)
        if side in self.own:
            model, lengths = self.fast(1, side), self.shape.lengths(self.users)
            optimizer, precision = trainer.make_optimizer(model, 1e-3), self.own[side].precision
            graphs = self.graphs(side, model)
            return lambda: trainer.t1_step(
                model, optimizer, x, S_TRAINING, precision, lengths, graphs=graphs
            ).class_loss.reshape(1)
        dense, x, parts = self.dense(side, 1, self.users), x.to(self.device), 1
        adam = self.adam(dense, 1e-3)

        def step() -> Tensor:
            adam.zero_grad()
            total = torch.zeros(1, device=self.device)
            for part in x.chunk(parts):
                loss = reference_step.next_item_loss(dense, part, S_TRAINING) * (len(part) / len(x))
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
            adam.step()
            clamp_task_embeddings(dense)
            return total

        def run() -> Tensor:
            nonlocal parts
            while True:
                try:
                    return step()
                except torch.OutOfMemoryError:
                    if parts >= len(x):
                        raise
                parts *= 2
                self.notes[side] = f"batch in {parts} parts, whose logits fit"

        return self.cast(side, run)

    def traffic(self) -> Traffic:
        shape, f, labels = self.shape, self.shape.channels, self.shape.labels[0]
        lengths = np.maximum(shape.lengths(self.users) - 1, 0)
        packed = shape.network.pack(lengths, shape.length - 1, [Streams(np.arange(self.users))], every=True)
        items = len(shape.items(self.users)[:, :-1].unique())
        moved = traffic.encoder(packed, f, 2, train=True) + traffic.head(labels, f, 2)
        moved += traffic.adam("Adam, head", float(f * labels)) + traffic.adam("Adam, embedding", float(f * items))
        return moved + traffic.adam("Adam, backbone", backbone_numbers(shape))


class LargeFirstTaskStep(FirstTaskStep):
    """The step of task 1 with as many users as the later tasks take: does it fit?"""

    name = "t1-step-large"

    @property
    def users(self) -> int:
        return self.shape.batch

    def sides(self, compiled: bool = False) -> tuple[str, ...]:
        return (OURS,)

    def check(self, answers: Mapping[str, Tensor]) -> None:
        """Nothing else fits: the loss of a new model is near that of guessing.

        Raises:
            DifferentAnswers: it is not.
        """
        for side, answer in answers.items():
            guess = float(np.log(self.shape.labels[0]))
            if not 0.5 * guess < float(answer) < 2 * guess:
                raise DifferentAnswers(f"{self.title}: {side} computes {float(answer):.4g}, expected about {guess:.4g}")


class Embedding(GpuCase):
    """Representations of all three tasks, without gradient. Masks are those of inference and computed once."""

    name = "embed"
    tasks = 3

    @property
    def users(self) -> int:
        return self.shape.batch

    @property
    def title(self) -> str:
        return f"embedding of all {self.tasks} tasks, B={self.users:,}"

    def packed(self) -> PackedBatch:
        everyone = [Streams(np.arange(self.users))] * self.tasks
        return self.shape.network.pack(self.shape.lengths(self.users), self.shape.length, everyone)

    def operations(self) -> Operations:
        return self.shape.network.encoder(self.packed(), self.tasks * self.users * self.shape.length)

    def traffic(self) -> Traffic:
        return traffic.encoder(self.packed(), self.shape.channels, 2)

    def check(self, answers: Mapping[str, Tensor]) -> None:
        compare_states(self.title, answers)

    def side(self, side: str) -> Run:
        x, lengths = self.shape.items(self.users), self.shape.lengths(self.users)
        if side in self.own:
            model, requests = self.fast(self.tasks, side), [Request(task) for task in range(self.tasks)]
            with torch.no_grad():
                masks = model.masks(S_MAX)

            @torch.no_grad()
            def run_ours() -> Tensor:
                return torch.cat(model.encode(trainer.to_device(x, model), requests, masks=masks, lengths=lengths))

            return self.cast(side, run_ours)
        dense, x = self.dense(side, self.tasks, self.users), x.to(self.device)
        with torch.no_grad():
            every = dense.all_masks(S_MAX)

        @torch.no_grad()
        def run() -> Tensor:
            return torch.cat([dense.hidden(x, every[:, task])[:, -1] for task in range(self.tasks)])

        return self.cast(side, run)


class Convolutions(GpuCase):
    """All convolutions of the student's pass of task 3, forward and alone: masked_conv, its rows already packed."""

    name = "masked-conv"

    @property
    def users(self) -> int:
        return self.shape.batch

    @property
    def title(self) -> str:
        return f"masked_conv forward, the {2 * len(self.shape.dilations)} convolutions of task 3's step, B={self.users:,}"

    def sides(self, compiled: bool = False) -> tuple[str, ...]:
        return ("torch", "torch-bf16", "ours-fp32", OURS)

    def packed(self) -> PackedBatch:
        return TrainingStep(self.shape, self.device, "torch").passes()[0]

    def operations(self) -> Operations:
        return self.shape.network.encoder(self.packed(), self.users * self.shape.length)

    def traffic(self) -> Traffic:
        return traffic.encoder(self.packed(), self.shape.channels, 2, embedding=False)

    def check(self, answers: Mapping[str, Tensor]) -> None:
        compare_states(self.title, answers)

    def side(self, side: str) -> Run:
        model, packed = self.fast(3, side), self.packed().to(self.device)
        low = side.endswith("bf16")
        with torch.no_grad():
            masks = model.masks(S_TRAINING)[:, [2, 0, 1]]
            rows = model.embeding.rows(self.shape.items(self.users).to(self.device).reshape(-1)[packed.cells])
            rows = rows.to(torch.bfloat16) if low else rows

        @torch.no_grad()
        def run() -> Tensor:
            hidden = rows
            for hidden in model.layers(rows, masks, packed):  # noqa: B007
                pass
            return hidden

        return run


class AdamStep(GpuCase):
    """Adam alone on embedding and heads: the embedding's gradient is formed from the batch's rows, the heads' are dense."""

    name = "adam"

    @property
    def users(self) -> int:
        return self.shape.batch

    @property
    def title(self) -> str:
        return f"Adam on an embedding and heads of {sum(self.shape.labels):,} labels, gradients of B={self.users:,}"

    def sides(self, compiled: bool = False) -> tuple[str, ...]:
        return ("eager", OURS)

    def operations(self) -> Operations:
        return Operations(0, 0)

    def traffic(self) -> Traffic:
        f, items = self.shape.channels, len(self.shape.items(self.users).unique())
        return traffic.adam("embedding", float(f * items)) + traffic.adam("heads", float(f * sum(self.shape.labels)))

    def check(self, answers: Mapping[str, Tensor]) -> None:
        compare_states(self.title, answers)

    def side(self, side: str) -> Run:
        items = self.shape.items(self.users).to(self.device).reshape(-1)
        model = self.fast(3, side) if side in self.own else self.reference(3)
        optimizer = trainer.make_optimizer(model, 1e-3) if side in self.own else self.adam(model, 1e-3)
        embedding: Any = model.embeding
        rows = embedding.rows if isinstance(model, FastTCN) else embedding
        with torch.random.fork_rng(), self.device:
            torch.manual_seed(1)
            slope = torch.randn(len(items), self.shape.channels)
            for head in model.task_classifier:
                for parameter in head.parameters():
                    parameter.grad = torch.randn_like(parameter)
        weights: list[Any] = [head.weight for head in model.task_classifier]
        start = [weight.detach().clone() for weight in (embedding.weight, *weights)]

        def run() -> Tensor:
            for parameter in embedding.parameters():
                parameter.grad = None
            rows(items).backward(slope)
            optimizer.step()
            return items

        def moved() -> Tensor:
            now: list[Any] = [embedding.weight, *weights]
            return torch.cat([(a.detach() - b).flatten() for a, b in zip(now, start, strict=True)])

        self.moved[side] = moved
        return run

    def __init__(self, shape: Shape, device: torch.device, backend: str) -> None:
        super().__init__(shape, device, backend)
        self.moved: dict[str, Callable[[], Tensor]] = {}

    def told(self, side: str, answer: Tensor) -> Tensor:
        """How far parameters have moved; its first steps are compared."""
        return self.moved.pop(side)().cpu()


def backbone_numbers(shape: Shape) -> float:
    """Parameters of the convolutions with their LayerNorms."""
    return 2.0 * len(shape.dilations) * (shape.kernel_size * shape.channels**2 + 3 * shape.channels)


def cases(shape: Shape, device: torch.device, backend: str, many: int) -> list[GpuCase]:
    """All cases; `many` is the larger number of users that is embedded at once."""
    large = Embedding(replace(shape, batch=many), device, backend)
    large.name = "embed-large"
    kinds: list[type[GpuCase]] = [TrainingStep, Embedding, FirstTaskStep, LargeFirstTaskStep, Convolutions, AdamStep]
    found = [kind(shape, device, backend) for kind in kinds]
    return [*found[:2], large, *found[2:]]
