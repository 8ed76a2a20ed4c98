"""Heads over very large catalogues, ours beside PyTorch's, and a whole training step of task 1 over one.

    python -m bench.heads [--only PART] [--rounds 3] [--quick] [--results FOLDER]

Parts: `compared`, where PyTorch can follow; `large`, ours over the whole catalogue; `step`, a step of task 1 there, memory with
parameters, gradients and Adam's state; `growth`, cross-entropy from a thousand labels to a million. Each side runs in a process
of its own, in turns where the sides are compared, one after the other elsewhere.

`eager` forms all logits in fp32, `eager-bf16` under autocast; `fused` is `F.linear_cross_entropy`, PyTorch's own loss in parts,
and `fused-N` the same in chunks of N rows with compact sums: which is fastest depends on the machine. `ours-merged` has rows of
pads, which depend on the position only, once with many targets, as FastTCN does. Peak memory of a head is that of a call above
parameters, inputs and the gradients that it leaves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import record
from bench.device import NotMeasured
from bench.harness import CPU, Answer, Call, Case, Operations, measure, precision
from bench.network import FirstStep
from bench.shapes import TINY, TTL, Shape
from teracon_fast import ops

PARTS = ("compared", "large", "step", "growth")
FILTER_EPS = 2.0**-24  # float32's resolution beside 1
PEAKED = 12.0  # standard deviation of the logits of the peaked head
TOP = 20  # labels that the published evaluation looks at
LIMIT_BYTES = 12e9  # of working memory: what would take more is not run

CROSS_ENTROPY = (
    "eager", "fused", "fused-384", "fused-1056", "ours", "ours-merged", "eager-bf16", "ours-bf16", "ours-merged-bf16",
)  # fmt: skip
RETENTION = ("eager", "ours-direct", "ours-gram", "ours", "eager-bf16", "ours-bf16")
RANK = ("eager", "ours", "eager-bf16", "ours-bf16", "ours-topk", "ours-topk-bf16")
GROWTH = ("eager", "fused-1056", "ours", "ours-bf16")
ON_GPU = ("eager", "eager-bf16", "ours", "ours-bf16")


@dataclass(frozen=True)
class Sizes:
    """`labels`: where PyTorch can follow; `catalogue`: the one that ours is made for. Cross-entropy has a row for each of the
    L-1 positions of so many sequences."""

    channels: int = 256
    length: int = 100
    sequences: int = 32
    labels: int = 100_000
    catalogue: int = 646_000
    retained: tuple[int, int] = (26, 921)
    ranked: int = 1024
    growth: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
    growth_sequences: int = 8


FULL = Sizes()
# Small enough for a test; its times mean nothing.
QUICK = Sizes(16, 20, 6, 300, 900, (3, 40), 32, (50, 200, 600), 3)


@dataclass
class HeadCase(Case):
    """A head with its inputs, the same for all sides. `rows`: users, or sequences (cross-entropy). `backend`: of our sides."""

    sizes: Sizes
    labels: int
    sides: tuple[str, ...]
    rows: int
    device: torch.device = CPU
    backend: str = "auto"

    what: ClassVar[str]
    products: ClassVar[int]  # of [rows, f] with [labels, f] in a call that needs no detours: 2 * rows * labels * f each
    inputs_held = True

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.what.split()[0]}-{self.rows}-{self.labels}"

    @property
    def title(self) -> str:
        return f"{self.what}, {self.rows:,} rows, {self.labels:,} labels"

    def tiny(self) -> Case:
        return replace(self, sizes=QUICK, labels=QUICK.labels, rows=min(self.rows, 8))

    def rows_of(self, side: str) -> int:
        """Rows that a side works on."""
        return self.rows

    def operations(self, side: str) -> Operations:
        useful = 2.0 * self.products * self.rows_of(side) * self.labels * self.sizes.channels
        return Operations(useful, useful)

    def side(self, name: str) -> Call:
        self.generator = torch.Generator().manual_seed(self.labels)
        return self.call(name, torch.bfloat16 if precision(name) == "bf16" else torch.float32)

    def call(self, name: str, dtype: torch.dtype) -> Call:
        """The side, with tensors drawn from the generator; `dtype`: of hidden states."""
        raise NotImplementedError

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.empty(shape).normal_(0.0, std, generator=self.generator)

    def head(self, std: float = 0.01) -> tuple[Tensor, Tensor]:
        """Weight and bias, initialized as the network's."""
        return self.normal(self.labels, self.sizes.channels, std=std), torch.full((self.labels,), 0.1)

    def put(self, *tensors: Tensor) -> list[Tensor]:
        """The tensors on the device."""
        return [tensor.to(self.device) for tensor in tensors]

    def autocast(self, dtype: torch.dtype) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def differentiable(loss: Callable[[], Tensor], hidden: Tensor, weight: Tensor, bias: Tensor) -> Call:
    """Loss and backward pass; gradients are dropped before each call, not timed."""
    leaves = {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_(), "bias": bias.requires_grad_()}

    def drop() -> None:
        for leaf in leaves.values():
            leaf.grad = None

    def run() -> Answer:
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return {"loss": value.detach(), **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}

    return Call(run, drop)


@dataclass
class CrossEntropy(HeadCase):
    """Task 1's loss, forward and backward: the next item at every position, pads and pad targets counted. `peaked`: logits like a
    trained head's, and likely targets."""

    peaked: bool = False

    what = "cross-entropy forward and backward"
    products = 3  # logits, d(hidden), d(weight)
    limits = {"": (1e-3, 5e-2), "loss": (1e-4, 1e-2)}

    @property
    def title(self) -> str:
        merged = f", {self.rows_of('merged'):,} merged" if any("merged" in side for side in self.sides) else ""
        kind = f", logits with a standard deviation of {PEAKED:g}" if self.peaked else ""
        return f"{self.what}, {self.rows_of(''):,} rows{merged}, {self.labels:,} labels{kind}"

    def rows_of(self, side: str) -> int:
        row_of = self.row_of()
        return int(row_of.max()) + 1 if "merged" in side else len(row_of)

    def row_of(self) -> Tensor:
        """For each position the merged row, int64 [rows]: pads by position, then every real one."""
        seen = self.sizes.length - 1
        lengths = Shape(length=self.sizes.length).lengths(self.rows)
        pads, position = torch.from_numpy(seen - np.maximum(lengths - 1, 0))[:, None], torch.arange(seen)
        real = position >= pads
        return torch.where(real, int(pads.max()) - 1 + real.reshape(-1).cumsum(0).view_as(real), position).reshape(-1)

    def call(self, name: str, dtype: torch.dtype) -> Call:
        needed = 12.0 * self.rows_of(name) * self.labels if name.startswith("eager") else 0  # logits, log-softmax, a gradient
        if self.device.type == "cpu" and needed > LIMIT_BYTES:
            raise NotMeasured(f"would take about {needed / 1e9:.0f} GB")
        if name.startswith("fused") and not hasattr(F, "linear_cross_entropy"):
            raise NotMeasured(f"torch {torch.__version__} has no F.linear_cross_entropy")
        row_of, hidden = self.row_of(), self.normal(self.rows_of("merged"), self.sizes.channels)
        weight, bias = self.head(PEAKED / self.sizes.channels**0.5 if self.peaked else 0.01)
        targets = Shape(length=self.sizes.length, labels=(self.labels,)).items(self.rows)[:, 1:].reshape(-1)
        if self.peaked:
            scores, labels = ops.linear_topk(hidden, weight, bias, min(TOP, self.labels))
            drawn = torch.multinomial(scores.softmax(1)[row_of], 1, generator=self.generator)
            targets = labels[row_of].gather(1, drawn)[:, 0]
        hidden = hidden if "merged" in name else hidden[row_of]
        hidden, weight, bias, targets, row_of = self.put(hidden.to(dtype), weight, bias, targets, row_of)

        def loss() -> Tensor:
            if name.startswith("ours"):
                rows, eps = row_of if "merged" in name else None, FILTER_EPS if "filtered" in name else 0.0
                return ops.linear_cross_entropy(hidden, weight, bias, targets, rows, filter_eps=eps, backend=self.backend)
            if name.startswith("fused"):
                chunk = name.partition("-")[2]
                more = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=int(chunk), acc_policy="compact") if chunk else None
                return F.linear_cross_entropy(hidden, weight, targets, linear_bias=bias, options=more)
            with self.autocast(dtype):
                return F.cross_entropy(F.linear(hidden, weight, bias), targets)

        return differentiable(loss, hidden, weight, bias)


class Retention(HeadCase):
    """The retention loss of one past task, forward and backward."""

    what = "retention forward and backward"
    products = 4  # student's logits, teacher's logits, d(hidden), d(weight)
    # A difference of nearly equal logits: in eager's bf16 they are rounded before they are subtracted.
    limits = {"": (1e-3, 0.3), "loss": (1e-4, 0.3)}

    def call(self, name: str, dtype: torch.dtype) -> Call:
        student, (weight, bias) = self.normal(self.rows, self.sizes.channels), self.head()
        teacher = student + self.normal(self.rows, self.sizes.channels, std=0.1)
        teacher_weight = self.normal(self.labels, self.sizes.channels, std=0.002).add_(weight)
        hidden, weight, bias = self.put(student.to(dtype), weight, bias)
        pseudo = self.put(teacher.to(dtype), teacher_weight, bias.clone())
        form = {"ours-direct": "direct", "ours-gram": "gram"}.get(name, "auto")

        def loss() -> Tensor:
            if name.startswith("ours"):
                return ops.retention_mse(hidden, weight, bias, *pseudo, form=form, backend=self.backend)
            with self.autocast(dtype):
                with torch.no_grad():
                    wanted = F.linear(*pseudo)
                return F.mse_loss(F.linear(hidden, weight, bias), wanted)

        return differentiable(loss, hidden, weight, bias)


class Rank(HeadCase):
    """Ranks of targets among all labels, as far as the published evaluation looks: by its two `topk`, or by ours."""

    what = "ranks of targets"
    products = 1
    limits = {"": (0.05, 0.5)}  # scores that agree to rounding can change places

    def call(self, name: str, dtype: torch.dtype) -> Call:
        (weight, bias), k = self.head(), min(TOP, self.labels)
        targets = torch.randint(self.labels, (self.rows,), generator=self.generator)
        # Towards the target's weight, so that it ranks among the best.
        hidden = self.normal(self.rows, self.sizes.channels).add_(F.normalize(weight[targets], dim=1) * 4.0)
        hidden, weight, bias, targets = self.put(hidden.to(dtype), weight, bias, targets)

        def among(labels: Tensor) -> Answer:
            """Place of each target among the best labels, and their number where it is not among them."""
            found = labels == targets[:, None]
            return {"rank": torch.where(found.any(1), found.int().argmax(1), labels.shape[1])}

        @torch.no_grad()
        def run() -> Answer:
            if name.startswith("ours-topk"):
                return among(ops.linear_topk(hidden, weight, bias, k, backend=self.backend)[1])
            if name.startswith("ours"):
                return {"rank": ops.linear_rank(hidden, weight, bias, targets, backend=self.backend).clamp_max(k)}
            with self.autocast(dtype):
                logits = F.linear(hidden, weight, bias)
            logits.topk(5)
            return among(logits.topk(k).indices)

        return Call(run)


def cases(part: str, sizes: Sizes, shape: Shape) -> Iterator[Case]:
    """The cases of a part; `shape`: of the network of `step`."""
    (few, many), both = sizes.retained, ("ours", "ours-bf16")
    if part == "compared":
        yield CrossEntropy(sizes, sizes.labels, CROSS_ENTROPY, sizes.sequences)
        yield CrossEntropy(sizes, sizes.labels, ("ours", "ours-filtered"), sizes.sequences, peaked=True)
        yield Retention(sizes, sizes.labels, RETENTION, few)
        yield Retention(sizes, sizes.labels, RETENTION, many)
        yield Rank(sizes, sizes.catalogue, RANK, sizes.ranked)
    elif part == "large":
        yield CrossEntropy(sizes, sizes.catalogue, ("ours-merged", "ours-merged-bf16"), sizes.sequences)
        yield Retention(sizes, sizes.catalogue, both, few)
        yield Retention(sizes, sizes.catalogue, both, many)
    elif part == "step":
        step = FirstStep(replace(shape, labels=(sizes.catalogue,), first_batch=sizes.sequences))
        step.sides = both
        yield step
    else:
        yield from (CrossEntropy(sizes, labels, GROWTH, sizes.growth_sequences) for labels in sizes.growth)


def on_gpu(sizes: Sizes, device: torch.device, backend: str) -> list[HeadCase]:
    """Over the first task's labels: what steps and the evaluation do with them."""
    labels, here = sizes.catalogue, (device, backend)
    merged = tuple(side.replace("ours", "ours-merged") for side in ON_GPU)
    retention = [Retention(sizes, labels, ON_GPU, users, *here) for users in sizes.retained]
    rank = Rank(sizes, labels, ON_GPU, sizes.ranked, *here)
    return [CrossEntropy(sizes, labels, merged, sizes.sequences, *here), *retention, rank]


def main(arguments: Sequence[str] | None = None) -> int:
    given = record.parse(__doc__, arguments, only=PARTS)
    sizes, report, growth = QUICK if given.quick else FULL, record.Report("large-catalogues", given), []
    for part in given.only:
        for case in cases(part, sizes, TINY if given.quick else TTL):
            report.add(measure(case, given.rounds, given.budget / 4, apart=True, one_by_one=part != "compared"))
            growth += report.rows[-len(GROWTH) :] if part == "growth" else []
    status = report.close(sizes=sizes)
    if report.path is not None and growth:
        panels = []
        for key, name in (("median_seconds", "time of a call (s)"), ("peak_mib", "peak memory (MiB)")):
            lines = []
            for side in GROWTH:
                rows = [row for row in growth if row["side"] == side and row.get(key)]
                lines.append(record.Line(side, [int(row["case"].split("-")[-1]) for row in rows], [row[key] for row in rows]))
            panels.append(record.Panel("labels", name, lines))
        record.plot(report.path.with_suffix(".png"), "Cross-entropy of a linear head, forward and backward", panels)
    return status


if __name__ == "__main__":
    sys.exit(main())
