"""What is measured: four calls at the TTL shape, each by four sides that start from the same weights.

Sides: `eager`, the reference, which runs one dense pass for every (users, task) as the published program does; `eager-bf16`, the
same under autocast; `compile`, torch.compile of it; `torch`, ours on plain PyTorch operations, which shows what packing alone
brings; `ours`, what `teracon_fast` runs for its users, on the fastest backend of the machine; `ours-direct`, the same without
minimal filtering; `ours-bf16`, the same in bf16. A side is a function without arguments; what it returns is compared between the
sides before anything is timed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bench.operations import Network, Operations
from teracon_fast import FastTCN
from teracon_fast.data import TaskData
from teracon_fast.packing import Streams
from teracon_fast.reference import ReferenceTCN, clamp_task_embeddings, continual_step, t1_step, target_rank
from teracon_fast.reference import step as reference_step
from teracon_fast.train import loop as trainer
from teracon_fast.train.evaluation import target_ranks


@dataclass(frozen=True)
class Own:
    """How a side of ours runs."""

    backend: str = "auto"
    algorithm: Literal["auto", "direct"] = "auto"
    precision: trainer.Precision = "fp32"


OWN = {"torch": Own("torch"), "ours": Own(), "ours-direct": Own(algorithm="direct"), "ours-bf16": Own(precision="bf16")}
SIDES = ("eager", "eager-bf16", "compile", *OWN)
S_MAX = 50.0
S_TRAINING = 25.0  # half way through an epoch
ALPHA, RHO = 0.7, 0.02  # 5 of 256 users for each past task: rho's usual place, near its floor
# Real lengths of the sequences that the authors publish as an example.
REAL_LENGTHS = (46, 12, 100, 43, 100, 27, 100, 100, 37, 62, 26, 90, 30, 21, 45, 13, 13, 49, 20, 14)

Run = Callable[[], Tensor]


class NotMeasured(Exception):
    """A side that a case does not have; says why."""


def bf16(run: Run, device: str = "cpu") -> Run:
    """The same under autocast of a kind of device."""

    def cast() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return run().float()

    return cast


@dataclass(frozen=True)
class Shape:
    """Sizes: `batch` users for tasks after the first, `first_batch` for task 1, `evaluated` users in the evaluation."""

    length: int = 100
    channels: int = 256
    dilations: tuple[int, ...] = (1, 4) * 4
    kernel_size: int = 3
    labels: tuple[int, ...] = (20_000, 2_000, 8)  # of each task; further tasks have as many as the last one
    batch: int = 256
    first_batch: int = 32
    evaluated: int = 512
    compiler: str = "inductor"

    @property
    def network(self) -> Network:
        return Network(self.channels, self.dilations, self.kernel_size)

    def evaluating(self, users: int) -> Shape:
        """The same shape with so many users evaluated."""
        return replace(self, evaluated=users)

    def task_labels(self, tasks: int) -> list[int]:
        """Number of labels of each of so many tasks."""
        return [*self.labels[:tasks], *[self.labels[-1]] * (tasks - len(self.labels))]

    def model_para(self, tasks: int) -> dict[str, Any]:
        """The published constructor dict of the network of so many tasks."""
        para = {
            "item_size": self.labels[0], "dilated_channels": self.channels, "dilations": list(self.dilations),
            "kernel_size": self.kernel_size, "task_embs": [0.0, 2.0],
        }  # fmt: skip
        return para if tasks == 1 else para | {"num_task": tasks, "target_item_size": self.task_labels(tasks)}

    def lengths(self, users: int) -> np.ndarray:
        """Real lengths, int64 [users]."""
        return np.maximum(np.resize(REAL_LENGTHS, users) * self.length // 100, 1).astype(np.int64)

    def items(self, users: int) -> Tensor:
        """Random left-padded sequences, int64 [users, L]."""
        generator = torch.Generator().manual_seed(users)
        x = torch.randint(1, self.labels[0], (users, self.length), generator=generator)
        pads = self.length - torch.from_numpy(self.lengths(users))
        return x.masked_fill(torch.arange(self.length) < pads[:, None], 0)


TTL = Shape()
# Small enough for a test: every line of the suite in seconds. Its times mean nothing.
TINY = Shape(20, 16, (1, 2), 3, (60, 30, 8), batch=24, first_batch=8, evaluated=48, compiler="eager")


class Case(ABC):
    """A call to measure. `name` on the command line, `users` served by one call."""

    name: str

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    @property
    @abstractmethod
    def users(self) -> int: ...

    @property
    @abstractmethod
    def title(self) -> str: ...

    @abstractmethod
    def operations(self) -> Operations:
        """Operations of one call."""

    @abstractmethod
    def side(self, side: str) -> Run:
        """A side's call. Its state is its own, and begins with the same weights as every other side's."""

    def reference(self, tasks: int) -> ReferenceTCN:
        torch.manual_seed(tasks)
        return ReferenceTCN(self.shape.model_para(tasks))

    def fast(self, tasks: int, side: str) -> FastTCN:
        model = FastTCN(self.shape.model_para(tasks), backend=OWN[side].backend, algorithm=OWN[side].algorithm)
        model.load_state_dict(self.reference(tasks).state_dict())
        return model

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """torch.compile at its best: static shapes, one value of s."""
        return torch.compile(function, dynamic=False, backend=self.shape.compiler)


class Forward(Case):
    """Logits of the last position, without gradient: one batch of a service."""

    name = "forward"

    @property
    def users(self) -> int:
        return self.shape.batch

    @property
    def title(self) -> str:
        return f"forward, last position, task 3, B={self.users}"

    def operations(self) -> Operations:
        network, everyone = self.shape.network, [Streams(np.arange(self.users))]
        packed = network.pack(self.shape.lengths(self.users), self.shape.length, everyone)
        return network.encoder(packed, self.users * self.shape.length) + network.head(self.users, self.shape.labels[2])

    def side(self, side: str) -> Run:
        x = self.shape.items(self.users)
        model: Callable[..., Any] = self.fast(3, side) if side in OWN else self.reference(3)
        model = self.compiled(model) if side == "compile" else model

        @torch.no_grad()
        def run() -> Tensor:
            logits: Tensor = model(x, S_MAX, [], 2, onecall=True, new_task=2)[0]
            return logits

        return bf16(run) if side.endswith("bf16") else run


class ContinualStep(Case):
    """One optimiser step of the task after `past` others (task 3), with their retention, rho of the next step, Adam and the
    clamp."""

    name = "t3-step"

    def __init__(self, shape: Shape, past: int = 2) -> None:
        super().__init__(shape)
        self.past = past

    @property
    def users(self) -> int:
        return self.shape.batch

    @property
    def past_users(self) -> int:
        return max(1, int(RHO * self.users))

    @property
    def title(self) -> str:
        return f"training step of task {self.past + 1}, B={self.users}, {self.past_users} users per past task"

    def drawn(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randperm(self.users, generator=generator)[: self.past_users] for _ in range(self.past)]

    def operations(self) -> Operations:
        shape, network, lengths = self.shape, self.shape.network, self.shape.lengths(self.users)
        past = [Streams(users.numpy(), int(task == 0)) for task, users in enumerate(self.drawn())]
        past_positions = self.past_users * (self.past * shape.length - 1)
        *past_labels, labels = shape.task_labels(self.past + 1)
        teacher = network.encoder(network.pack(lengths, shape.length, past), past_positions)
        together = network.pack(lengths, shape.length, [Streams(np.arange(self.users)), *past])
        student = network.encoder(together, self.users * shape.length + past_positions)
        heads = network.head(self.past_users, sum(past_labels))
        return (student + heads + network.head(self.users, labels)) * 3 + teacher + heads

    def side(self, side: str) -> Run:
        x, users, rho = self.shape.items(self.users), self.drawn(), [RHO] * self.past
        tasks = self.past + 1
        y = torch.randint(self.shape.task_labels(tasks)[-1], (self.users,), generator=torch.Generator().manual_seed(1))
        if side in OWN:
            fast, fast_teacher = self.fast(tasks, side), self.fast(self.past, side).requires_grad_(False)
            optimizer = trainer.make_optimizer(fast, 1e-4)

            def run_ours() -> Tensor:
                result = trainer.continual_step(
                    fast, fast_teacher, optimizer, x, y, users, rho, S_TRAINING, ALPHA, precision=OWN[side].precision
                )
                assert result.retention_loss is not None and result.next_rho is not None
                return torch.tensor([result.class_loss, result.retention_loss, *result.next_rho.tolist()])

            return run_ours

        model, teacher = self.reference(tasks), self.reference(self.past).requires_grad_(False)
        adam = torch.optim.Adam(model.parameters(), lr=1e-4)
        if side == "compile":
            # What the compiler gets is the pass over the whole batch, 96 % of the work. The drawn users are another number
            # in every step of a real run, so compiling their passes would mean compiling again and again.
            whole_batch, eager = self.compiled(model.hidden), model.hidden
            model.hidden = lambda x, masks: (whole_batch if len(x) == self.users else eager)(x, masks)  # type: ignore

        def run() -> Tensor:
            result = continual_step(model, teacher, adam, x, y, users, rho, S_TRAINING, ALPHA)
            return torch.tensor([result.class_loss, result.retention_loss, *result.next_rho])

        return bf16(run) if side == "eager-bf16" else run


class FirstStep(Case):
    """One optimiser step of task 1: the next item at every position, among all items."""

    name = "t1-step"

    @property
    def users(self) -> int:
        return self.shape.first_batch

    @property
    def title(self) -> str:
        return f"training step of task 1, B={self.users}, {self.shape.labels[0]:,} items"

    def operations(self) -> Operations:
        network, seen = self.shape.network, self.shape.length - 1
        lengths = np.maximum(self.shape.lengths(self.users) - 1, 0)
        packed = network.pack(lengths, seen, [Streams(np.arange(self.users))], every=True)
        states = packed.convolutions[-1].taps.shape[0]
        positions = self.users * seen
        return (network.encoder(packed, positions) + network.head(states, self.shape.labels[0], positions)) * 3

    def side(self, side: str) -> Run:
        x = self.shape.items(self.users)
        if side in OWN:
            fast = self.fast(1, side)
            optimizer = trainer.make_optimizer(fast, 1e-3)
            precision = OWN[side].precision
            return lambda: trainer.t1_step(fast, optimizer, x, S_TRAINING, precision).class_loss.reshape(1)

        model = self.reference(1)
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        if side != "compile":

            def run() -> Tensor:
                return torch.tensor([t1_step(model, adam, x, S_TRAINING)])

            return bf16(run) if side == "eager-bf16" else run
        compiled = self.compiled(reference_step.next_item_loss)

        def run_compiled() -> Tensor:
            adam.zero_grad()
            loss = compiled(model, x, S_TRAINING)
            loss.backward()
            adam.step()
            clamp_task_embeddings(model)
            return torch.tensor([loss.item()])

        return run_compiled


class Evaluation(Case):
    """Rank of the last item among all items, from the items before it, for many users of a network of three tasks."""

    name = "evaluate"

    @property
    def users(self) -> int:
        return self.shape.evaluated

    @property
    def title(self) -> str:
        return f"evaluation of task 1, {self.users:,} users in batches of {self.shape.batch}"

    def operations(self) -> Operations:
        shape, network, total = self.shape, self.shape.network, Operations(0, 0)
        lengths = shape.lengths(self.users)
        for low in range(0, self.users, shape.batch):
            part = lengths[low : low + shape.batch]
            packed = network.pack(part, shape.length, [Streams(np.arange(len(part)), drop_last=1)])
            total += network.encoder(packed, len(part) * (shape.length - 1)) + network.head(len(part), shape.labels[0])
        return total

    def side(self, side: str) -> Run:
        if side.endswith("bf16"):
            raise NotMeasured("evaluation is fp32")
        x, batch = self.shape.items(self.users), self.shape.batch
        if side in OWN:
            fast, rows = self.fast(3, side), np.arange(self.users, dtype=np.int32)
            samples = np.stack([rows, x[:, -1].numpy().astype(np.int32)], axis=1)
            sequences, lengths = x.numpy().astype(np.int32), self.shape.lengths(self.users).astype(np.int32)
            groups = rows.astype(np.int64)
            data = TaskData("bench", "next_item", self.shape.labels[0], sequences, lengths, groups, samples, Path())
            return lambda: self._answer(target_ranks(fast, data, 0, groups, S_MAX, batch))

        model = self.reference(3)
        scores: Callable[..., Any] = self.compiled(model) if side == "compile" else model

        @torch.no_grad()
        def run() -> Tensor:
            ranks = [
                target_rank(scores(part[:, :-1], S_MAX, [], 0, onecall=True)[0], part[:, -1]) for part in x.split(batch)
            ]
            return self._answer(torch.cat(ranks))

        return run

    @staticmethod
    def _answer(ranks: Tensor) -> Tensor:
        # Single ranks move by a place or two where scores agree to rounding; their mean does not.
        return ranks.double().mean().reshape(1)


CASES: dict[str, type[Case]] = {case.name: case for case in (Forward, ContinualStep, FirstStep, Evaluation)}
