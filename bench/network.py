"""TERACON's forward pass, training steps and evaluation, on the CPU and on a GPU.

PyTorch's sides run the dense reference of this package, one pass for every (users, task) as the published program does:
`eager` in fp32, `eager-bf16` under autocast, `compile` and `compile-bf16` the same through torch.compile with static shapes.
Ours: `torch` on plain PyTorch operations, which shows what packing alone brings; `ours` on the fastest backend of the machine
(on a GPU, Triton); `ours-direct` without minimal filtering; `ours-bf16`; `ours-bf16-graphs`, steps replayed as CUDA graphs. On a
GPU TF32 is allowed while calls are timed, cudnn.benchmark is on, and the reference has its inputs there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from bench import steps
from bench.device import replayed
from bench.harness import CPU, Call, Case, Operations, precision
from bench.shapes import TINY, Shape
from bench.steps import ALPHA, S_TRAINING
from teracon_fast import FastTCN, Request
from teracon_fast.data import TaskData
from teracon_fast.methods import Teracon
from teracon_fast.packing import PackedBatch, Streams
from teracon_fast.reference import ReferenceTCN, clamp_task_embeddings, continual_step, target_rank
from teracon_fast.reference.step import next_item_loss
from teracon_fast.train.evaluation import target_ranks

PYTORCH = ("eager", "eager-bf16", "compile", "compile-bf16")
ON_CPU = (*PYTORCH, "torch", "ours-direct", "ours", "ours-bf16")
ON_GPU = (*PYTORCH, "torch", "torch-bf16", "ours", "ours-bf16")
S_MAX = 50.0
RHO = 0.02  # 5 of 256 users for each past task: rho's usual place, near its floor


class NetworkCase(Case):
    """A call of a network.

    Args:
        backend: of our sides.
        compiled: with the sides of torch.compile.

    Attributes:
        what: title, with fields of the case.
        users_of: the number of a shape that tells the users of a call.
        only: sides, where they are not those of all cases.
        trains: a step, which can be replayed where there are CUDA graphs.
    """

    what: ClassVar[str]
    users_of: ClassVar[str] = "batch"
    only: ClassVar[tuple[str, ...]] = ()
    trains: ClassVar[bool] = False

    def __init__(self, shape: Shape, device: torch.device = CPU, backend: str = "auto", compiled: bool = True) -> None:
        self.shape, self.device, self.backend = shape, device, backend
        self.users: int = getattr(shape, self.users_of)
        names = self.only or (ON_CPU if device.type == "cpu" and backend == "auto" else ON_GPU)
        names += ("ours-bf16-graphs",) if self.trains and device.type == "cuda" else ()
        self.sides = tuple(name for name in names if compiled or not name.startswith("compile"))

    @property
    def title(self) -> str:
        return self.what.format_map({**vars(self), "past_users": getattr(self, "past_users", 0)})

    def tiny(self) -> Case:
        return type(self)(TINY, self.device, self.backend)

    def reference(self, tasks: int) -> ReferenceTCN:
        torch.manual_seed(tasks)
        with self.device:
            return ReferenceTCN(self.shape.model_para(tasks))

    def fast(self, tasks: int, side: str) -> FastTCN:
        """The network of a side of ours, with the reference's weights."""
        backend = "torch" if side.startswith("torch") else self.backend
        algorithm: Literal["auto", "direct"] = "direct" if side == "ours-direct" else "auto"
        with self.device:
            model = FastTCN(self.shape.model_para(tasks), backend=backend, algorithm=algorithm)
        model.load_state_dict(self.reference(tasks).state_dict())
        return model

    def is_fast(self, side: str) -> bool:
        return side not in PYTORCH

    def compiled(self, side: str, function: Any) -> Any:
        """Compiled with static shapes, if the side is."""
        compiles = side.startswith("compile")
        return torch.compile(function, backend=self.shape.compiler, dynamic=False) if compiles else function

    def adam(self, side: str, model: torch.nn.Module, lr: float) -> torch.optim.Adam:
        """The published program's optimizer; fused, where the side is PyTorch at its best."""
        fused = True if side.startswith("compile") or self.device.type == "cuda" else None
        return torch.optim.Adam(model.parameters(), lr=lr, fused=fused)

    def cast(self, side: str, run: Callable[[], dict[str, Tensor]]) -> Call:
        """The call, under autocast if the side's precision is bf16."""

        def cast() -> dict[str, Tensor]:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=precision(side) == "bf16"):
                return run()

        return Call(cast)


class Forward(NetworkCase):
    """Logits of the last position, without gradient: one batch of a service."""

    name, what = "forward", "forward, last position, task 3, B={users}"

    def operations(self, side: str) -> Operations:
        shape = self.shape
        packed = shape.pack(shape.lengths(self.users))
        return shape.encoder(packed, self.users * shape.length) + shape.head(self.users, shape.labels[2])

    def side(self, name: str) -> Call:
        x, model = self.shape.items(self.users), self.fast(3, name) if self.is_fast(name) else self.reference(3)
        call = self.compiled(name, model)

        @torch.no_grad()
        def run() -> dict[str, Tensor]:
            return {"logits": call(x, S_MAX, [], 2, onecall=True, new_task=2)[0]}

        return self.cast(name, run)


class LaterStep(NetworkCase):
    """One optimizer step of the task after `past` others, with their retention, rho of the next step, Adam and the clamp."""

    name, what = "t3-step", "training step of task {task}, B={users}, {past_users} users per past task"
    trains = True
    # Retention is a difference of nearly equal logits, and rho near its floor one of nearly equal masks, which autocast rounds.
    limits = {"": (1e-3, 5e-2), "retention": (1e-2, 0.5), "rho": (1e-3, 1.0)}

    def __init__(
        self, shape: Shape, device: torch.device = CPU, backend: str = "auto", compiled: bool = True, past: int = 2
    ) -> None:
        super().__init__(shape, device, backend, compiled)
        self.past, self.task = past, past + 1

    @property
    def past_users(self) -> int:
        return max(1, int(RHO * self.users))

    def drawn(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randperm(self.users, generator=generator)[: self.past_users] for _ in range(self.past)]

    def passes(self) -> tuple[PackedBatch, PackedBatch]:
        """The rows of the student's pass and of the teacher's."""
        lengths = self.shape.lengths(self.users)
        past = [Streams(users.numpy(), int(task == 0)) for task, users in enumerate(self.drawn())]
        return self.shape.pack(lengths, [Streams(np.arange(self.users)), *past]), self.shape.pack(lengths, past)

    def operations(self, side: str) -> Operations:
        shape, (student, teacher) = self.shape, self.passes()
        positions = self.past_users * (self.past * shape.length - 1)
        *past_labels, labels = shape.task_labels(self.past + 1)
        heads = shape.head(self.past_users, sum(past_labels))
        own = shape.encoder(student, self.users * shape.length + positions) + shape.head(self.users, labels)
        return (own + heads) * 3 + shape.encoder(teacher, positions) + heads

    def side(self, name: str) -> Call:
        x, users, rho, tasks = self.shape.items(self.users), self.drawn(), [RHO] * self.past, self.past + 1
        y = torch.randint(self.shape.task_labels(tasks)[-1], (self.users,), generator=torch.Generator().manual_seed(1))
        if self.is_fast(name):
            fast, fast_teacher = self.fast(tasks, name), self.fast(self.past, name).requires_grad_(False)
            low, graphs = precision(name) == "bf16", name.endswith("graphs")
            return Call(steps.later_step(fast, fast_teacher, x, y, users, rho, 1e-4, low, graphs))
        model, teacher = self.reference(tasks), self.reference(self.past).requires_grad_(False)
        adam = self.adam(name, model, 1e-4)
        x, y, users = x.to(self.device), y.to(self.device), [rows.to(self.device) for rows in users]
        # The compiler gets the pass over the whole batch, 96 % of the work. How many users are drawn changes from step to step of
        # a real run, and each number would be compiled anew.
        whole_batch, eager = self.compiled(name, model.hidden), model.hidden
        model.hidden = lambda x, masks: (whole_batch if len(x) == self.users else eager)(x, masks)  # type: ignore

        def run() -> dict[str, Tensor]:
            found = continual_step(model, teacher, adam, x, y, users, rho, S_TRAINING, ALPHA)
            losses = {"loss": torch.tensor(found.class_loss), "retention": torch.tensor(found.retention_loss)}
            return losses | {"rho": torch.tensor(found.next_rho)}

        return self.cast(name, run)


class FirstStep(NetworkCase):
    """One optimizer step of task 1: the next item at every position, among all items."""

    name, what = "t1-step", "training step of task 1, B={users}, {shape.labels[0]:,} items"
    users_of, trains = "first_batch", True

    def operations(self, side: str) -> Operations:
        return self.shape.next_item(self.users) * 3

    def side(self, name: str) -> Call:
        x = self.shape.items(self.users)
        if self.is_fast(name):
            return Call(steps.first_step(self.fast(1, name), x, 1e-3, precision(name) == "bf16", name.endswith("graphs")))
        model, x = self.reference(1), x.to(self.device)
        adam, loss_of = self.adam(name, model, 1e-3), self.compiled(name, next_item_loss)

        def run() -> dict[str, Tensor]:
            adam.zero_grad()
            loss = loss_of(model, x, S_TRAINING)
            loss.backward()
            adam.step()
            clamp_task_embeddings(model)
            return {"loss": loss.detach()}

        return self.cast(name, run)


class Evaluation(NetworkCase):
    """Rank of the last item among all items, from the items before it, for many users of a network of three tasks; in fp32."""

    name, what = "evaluate", "evaluation of task 1, {users:,} users in batches of {shape.batch}"
    users_of, only = "evaluated", tuple(name for name in ON_CPU if precision(name) == "fp32")

    def operations(self, side: str) -> Operations:
        shape, users = self.shape, self.users
        packed = shape.pack(shape.lengths(users), [Streams(np.arange(users), drop_last=1)])
        return shape.encoder(packed, users * (shape.length - 1)) + shape.head(users, shape.labels[0])

    def side(self, name: str) -> Call:
        x, batch = self.shape.items(self.users), self.shape.batch
        if self.is_fast(name):
            fast, rows = self.fast(3, name), np.arange(self.users, dtype=np.int32)
            samples = np.stack([rows, x[:, -1].numpy().astype(np.int32)], axis=1)
            sequences, lengths = x.numpy().astype(np.int32), self.shape.lengths(self.users).astype(np.int32)
            groups = rows.astype(np.int64)
            data = TaskData("bench", "next_item", self.shape.labels[0], sequences, lengths, groups, samples, Path())
            method = Teracon.around(fast)
            return Call(lambda: self._answer(target_ranks(method.encoder(0), fast.head(0), data, groups, batch)))
        scores = self.compiled(name, self.reference(3))

        @torch.no_grad()
        def run() -> dict[str, Tensor]:
            parts = x.split(batch)
            ranks = [target_rank(scores(part[:, :-1], S_MAX, [], 0, onecall=True)[0], part[:, -1]) for part in parts]
            return self._answer(torch.cat(ranks))

        return Call(run)

    @staticmethod
    def _answer(ranks: Tensor) -> dict[str, Tensor]:
        # Single ranks move by one or two where scores agree to rounding; their mean does not.
        return {"mean rank": ranks.double().mean()}


class Embedding(NetworkCase):
    """Representations of all three tasks, without gradient; the masks are those of inference, computed once."""

    name, what = "embed", "embedding of all three tasks, B={users:,}"
    tasks = 3

    def packed(self) -> PackedBatch:
        return self.shape.pack(self.shape.lengths(self.users), [Streams(np.arange(self.users))] * self.tasks)

    def operations(self, side: str) -> Operations:
        return self.shape.encoder(self.packed(), self.tasks * self.users * self.shape.length)

    def moved_bytes(self, side: str) -> float:
        return self.shape.encoder_bytes(self.packed())

    @torch.no_grad()
    def side(self, name: str) -> Call:
        x, lengths = self.shape.items(self.users), self.shape.lengths(self.users)
        if self.is_fast(name):
            model, requests = self.fast(self.tasks, name), [Request(task) for task in range(self.tasks)]
            masks, pinned = model.masks(S_MAX), x.pin_memory() if self.device.type == "cuda" else x

            @torch.no_grad()
            def run_ours() -> dict[str, Tensor]:
                here = pinned.to(self.device, non_blocking=True)
                return {"states": torch.cat(model.encode(here, requests, masks=masks, lengths=lengths))}

            return self.cast(name, run_ours)
        dense, x = self.reference(self.tasks), x.to(self.device)
        every, hidden = dense.all_masks(S_MAX), self.compiled(name, dense.hidden)

        @torch.no_grad()
        def run() -> dict[str, Tensor]:
            return {"states": torch.cat([hidden(x, every[:, task])[:, -1] for task in range(self.tasks)])}

        return self.cast(name, run)


class Convolutions(NetworkCase):
    """All convolutions of the student's pass of task 3, forward and alone: masked_conv, its rows already packed. The last side is
    the kernels without the host's part."""

    name, what = "masked-conv", "masked_conv forward, all convolutions of task 3's step, B={users:,}"
    only = ("torch", "torch-bf16", "ours", "ours-bf16", "ours-bf16-kernels")

    def packed(self) -> PackedBatch:
        return LaterStep(self.shape).passes()[0]

    def operations(self, side: str) -> Operations:
        return self.shape.encoder(self.packed(), self.shape.batch * self.shape.length)

    def moved_bytes(self, side: str) -> float:
        return self.shape.encoder_bytes(self.packed(), embedding=False)

    @torch.no_grad()
    def side(self, name: str) -> Call:
        model, packed = self.fast(3, name), self.packed().to(self.device)
        masks = model.masks(S_TRAINING)[:, [2, 0, 1]]
        rows = model.embeding.rows(self.shape.items(self.shape.batch).to(self.device).reshape(-1)[packed.cells])
        rows = rows.to(torch.bfloat16) if precision(name) == "bf16" else rows

        @torch.no_grad()
        def run() -> dict[str, Tensor]:
            *_, hidden = model.layers(rows, masks, packed)
            return {"states": hidden}

        return Call(replayed(run, self.device), kernels_only=True) if name.endswith("kernels") else Call(run)


def on_cpu(shape: Shape) -> list[NetworkCase]:
    """The cases of `make bench`."""
    return [Forward(shape), LaterStep(shape), FirstStep(shape), Evaluation(shape)]


def on_gpu(shape: Shape, device: torch.device, backend: str, many: int, compiled: bool) -> list[NetworkCase]:
    """The cases of `make bench-gpu`; `many`: a larger number of users, for the rate of a service."""
    here = device, backend, compiled
    large, more = FirstStep(replace(shape, first_batch=shape.batch), *here), Embedding(replace(shape, batch=many), *here)
    large.name, more.name, large.sides = "t1-step-large", "embed-large", ("ours-bf16",)  # dense logits do not fit
    return [LaterStep(shape, *here), Embedding(shape, *here), more, FirstStep(shape, *here), large, Convolutions(shape, *here)]


