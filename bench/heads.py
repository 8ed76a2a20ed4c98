"""What is measured of heads over large catalogues: cross-entropy, retention and ranking, each by several sides.

A case holds random parameters and inputs. A side is one way to compute the same answer from them; its `Call` leaves gradients,
if it makes any, in tensors that are known, so that they can be compared and told apart from working memory.

Peak memory of a side: a fresh process makes parameters and inputs, calls the side once at a tiny size (libraries load, threads
start), and then once at the real one. The figure is the highest resident memory of that call, less the resident memory right
before it, less the bytes of the gradients that the call leaves. So gradients count as if they had been there from the start, for
every side, also where the highest moment comes before they are made.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import multiprocessing
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, ParamSpec, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import NotMeasured, Shape
from bench.measure import DifferentAnswers, Side
from teracon_fast import ops
from teracon_fast.train.memory import forget_highest_resident, highest_resident_mib

FILTER_EPS = 2.0**-24  # float32's resolution beside 1
# Standard deviation of the logits of the peaked head.
PEAKED = 12.0
TOP = 20  # labels that the published evaluation looks at
# Relative: of the answer (a loss), and of gradients as a whole. Places of targets may differ by so much in the mean, because
# scores that agree to rounding can change places.
TOLERANCES = {"fp32": (1e-4, 1e-3, 0.02), "bf16": (1e-2, 5e-2, 1.0)}


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
    growth: tuple[int, ...] = (1_000, 10_000, 100_000, 300_000, 1_000_000)
    growth_sequences: int = 16
    dilations: tuple[int, ...] = (1, 4) * 4


FULL = Sizes()
# Small enough for a test; times mean nothing.
QUICK = Sizes(16, 20, 6, 300, 900, (3, 40), 32, (50, 200, 600), 3, (1, 2))


@dataclass(frozen=True)
class Call:
    """A side, ready to run.

    Attributes:
        run: what is timed. Returns what sides are compared by: a loss (after its backward pass), or places of targets, int64.
        leaves: tensors that it leaves gradients in, by name.
        rows: rows of hidden states that it works on.
    """

    run: Callable[[], Tensor]
    leaves: Mapping[str, Tensor]
    rows: int

    def forget(self) -> None:
        """Drop the gradients of an earlier run."""
        for leaf in self.leaves.values():
            leaf.grad = None


class HeadCase(ABC):
    """Parameters and inputs, the same for all sides.

    Attributes:
        what: it computes, in words.
        sides: names. The first one's answers are what the others' are compared with.
        products: matrix products of [rows, f] with [labels, f] in a call that needs no detours: 2 * rows * labels * f each.
        options: arguments of `torch.nn.LinearCrossEntropyOptions` for the side "fused", None for its `options=None`.
        backend: of our sides.
    """

    what: ClassVar[str]
    products: ClassVar[int]
    sides: tuple[str, ...]
    options: Mapping[str, Any] | None = None
    backend: str = "auto"

    def __init__(self, sizes: Sizes, labels: int) -> None:
        self.sizes, self.labels = sizes, labels
        self.generator = torch.Generator().manual_seed(labels)

    def to(self, device: torch.device) -> None:
        """Move parameters and inputs."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.detach().to(device))

    @property
    @abstractmethod
    def title(self) -> str: ...

    @abstractmethod
    def call(self, side: str) -> Call:
        """A side with its inputs.

        Raises:
            NotMeasured: it cannot run here.
        """

    def operations(self, rows: int) -> float:
        """Useful operations of a call on so many rows."""
        return 2.0 * self.products * rows * self.labels * self.sizes.channels

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.empty(shape).normal_(0.0, std, generator=self.generator)

    def head(self, std: float = 0.01) -> tuple[Tensor, Tensor]:
        """Weight and bias, initialised as the network's."""
        return self.normal(self.labels, self.sizes.channels, std=std), torch.full((self.labels,), 0.1)


def _differentiable(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        value = loss()
        value.backward()
        return value.detach()

    return run


class CrossEntropy(HeadCase):
    """Task 1's loss, forward and backward: the next item at every position, pads and pad targets counted.

    Rows of pads depend on the position only; "merged" sides have each of them once, with many targets, as FastTCN does.
    """

    what = "cross-entropy forward and backward"
    products = 3  # logits, d(hidden), d(weight)

    def __init__(self, sizes: Sizes, labels: int, sides: Sequence[str], sequences: int, peaked: bool = False) -> None:
        super().__init__(sizes, labels)
        self.sides, self.peaked = tuple(sides), peaked
        shape = Shape(length=sizes.length, labels=(labels,))
        seen = sizes.length - 1
        pads = torch.from_numpy(seen - np.maximum(shape.lengths(sequences) - 1, 0))[:, None]
        position, shared = torch.arange(seen), int(pads.max())
        real = position >= pads
        self.row_of = torch.where(real, shared - 1 + real.reshape(-1).cumsum(0).view_as(real), position).reshape(-1)
        self.hidden = self.normal(shared + int(real.sum()), sizes.channels)
        self.weight, self.bias = self.head(PEAKED / sizes.channels**0.5 if peaked else 0.01)
        self.targets = self._likely() if peaked else shape.items(sequences)[:, 1:].reshape(-1)

    def _likely(self) -> Tensor:
        """A target for each position, drawn from the most probable labels as a trained head would have it."""
        scores, labels = ops.linear_topk(self.hidden, self.weight, self.bias, min(TOP, self.labels))
        drawn = torch.multinomial(scores.softmax(1)[self.row_of], 1, generator=self.generator)
        return labels[self.row_of].gather(1, drawn)[:, 0]

    @property
    def title(self) -> str:
        kind = f", logits with a standard deviation of {PEAKED:g}" if self.peaked else ""
        rows = f"{len(self.row_of):,} rows, {len(self.hidden):,} merged"
        return f"{self.what}, {rows}, {self.labels:,} labels{kind}"

    def call(self, side: str) -> Call:
        merged, low = "merged" in side, side.endswith("bf16")
        hidden = (self.hidden if merged else self.hidden[self.row_of]).to(torch.bfloat16 if low else torch.float32)
        hidden = hidden.clone().requires_grad_()
        weight, bias, targets = self.weight.requires_grad_(), self.bias.requires_grad_(), self.targets
        if side.startswith("ours"):
            rows, eps = self.row_of if merged else None, FILTER_EPS if "filtered" in side else 0.0

            def loss() -> Tensor:
                return ops.linear_cross_entropy(hidden, weight, bias, targets, rows, filter_eps=eps, backend=self.backend)

        elif side == "fused":
            if not hasattr(F, "linear_cross_entropy"):
                raise NotMeasured(f"torch {torch.__version__} has no F.linear_cross_entropy")
            options = None if self.options is None else torch.nn.LinearCrossEntropyOptions(**self.options)

            def loss() -> Tensor:
                return F.linear_cross_entropy(hidden, weight, targets, linear_bias=bias, options=options)

        else:

            def loss() -> Tensor:
                with torch.autocast(hidden.device.type, torch.bfloat16, enabled=low):
                    return F.cross_entropy(F.linear(hidden, weight, bias), targets)

        return Call(_differentiable(loss), {"hidden": hidden, "weight": weight, "bias": bias}, len(hidden))


class Retention(HeadCase):
    """The retention loss of one past task, forward and backward."""

    what = "retention forward and backward"
    products = 4  # student's logits, teacher's logits, d(hidden), d(weight)

    def __init__(self, sizes: Sizes, labels: int, sides: Sequence[str], users: int) -> None:
        super().__init__(sizes, labels)
        self.sides = tuple(sides)
        self.student = self.normal(users, sizes.channels)
        self.teacher = self.student + self.normal(users, sizes.channels, std=0.1)
        self.weight, self.bias = self.head()
        self.teacher_weight = self.normal(labels, sizes.channels, std=0.002).add_(self.weight)
        self.teacher_bias = self.bias.clone()

    @property
    def title(self) -> str:
        return f"{self.what}, {len(self.student):,} rows, {self.labels:,} labels"

    def call(self, side: str) -> Call:
        dtype = torch.bfloat16 if side.endswith("bf16") else torch.float32
        hidden, teacher = self.student.to(dtype).clone().requires_grad_(), self.teacher.to(dtype)
        weight, bias = self.weight.requires_grad_(), self.bias.requires_grad_()
        pseudo = (teacher, self.teacher_weight, self.teacher_bias)
        form = {"ours-direct": "direct", "ours-gram": "gram"}.get(side, "auto")

        def loss() -> Tensor:
            if side.startswith("ours"):
                return ops.retention_mse(hidden, weight, bias, *pseudo, form=form, backend=self.backend)
            with torch.no_grad():
                wanted = F.linear(*pseudo)
            return F.mse_loss(F.linear(hidden, weight, bias), wanted)

        return Call(_differentiable(loss), {"hidden": hidden, "weight": weight, "bias": bias}, len(hidden))


class Rank(HeadCase):
    """Places of targets among all labels, as far as the published evaluation looks: by its two `topk`, or by ours."""

    what = "places of targets"
    products = 1

    def __init__(self, sizes: Sizes, labels: int, sides: Sequence[str], users: int) -> None:
        super().__init__(sizes, labels)
        self.sides = tuple(sides)
        self.weight, self.bias = self.head()
        self.targets = torch.randint(labels, (users,), generator=self.generator)
        # Towards the target's weight, so that it ranks among the best.
        towards = F.normalize(self.weight[self.targets], dim=1) * 4.0
        self.hidden = self.normal(users, sizes.channels).add_(towards)

    @property
    def title(self) -> str:
        return f"{self.what}, {len(self.hidden):,} rows, {self.labels:,} labels"

    def call(self, side: str) -> Call:
        hidden = self.hidden.to(torch.bfloat16 if side.endswith("bf16") else torch.float32)
        k = min(TOP, self.labels)

        @torch.no_grad()
        def run() -> Tensor:
            if side.startswith("ours-topk"):
                return self._places(ops.linear_topk(hidden, self.weight, self.bias, k, backend=self.backend)[1])
            if side.startswith("ours"):
                return ops.linear_rank(hidden, self.weight, self.bias, self.targets, backend=self.backend).clamp_max(k)
            logits = F.linear(hidden, self.weight, self.bias)
            logits.topk(5)
            return self._places(logits.topk(k).indices)

        return Call(run, {}, len(hidden))

    def _places(self, labels: Tensor) -> Tensor:
        """Place of each target among the best labels, and their number where it is not among them."""
        found = labels == self.targets[:, None]
        return torch.where(found.any(1), found.int().argmax(1), labels.shape[1])


@dataclass(frozen=True)
class Spec:
    """A case to be made: its sides, and its rows as sequences (cross-entropy) or users."""

    kind: type[CrossEntropy] | type[Retention] | type[Rank]
    labels: int
    sides: tuple[str, ...]
    rows: int
    peaked: bool = False

    def make(self, sizes: Sizes, options: Mapping[str, Any] | None = None) -> HeadCase:
        """The case with its tensors. `options`: see `HeadCase`."""
        more = {"peaked": True} if self.peaked else {}
        case = self.kind(sizes, self.labels, self.sides, self.rows, **more)
        case.options = options
        return case


CROSS_ENTROPY = ("eager", "fused", "ours", "ours-merged", "eager-bf16", "ours-bf16", "ours-merged-bf16")
RETENTION = ("eager", "ours-direct", "ours-gram", "ours", "ours-bf16")
RANK = ("eager", "ours", "ours-bf16", "ours-topk", "ours-topk-bf16")
GROWTH = ("eager", "fused", "ours", "ours-bf16")


def compared(sizes: Sizes) -> dict[str, Spec]:
    """Cases whose sides take turns, by name."""
    few, many = sizes.retained
    return {
        "cross-entropy": Spec(CrossEntropy, sizes.labels, CROSS_ENTROPY, sizes.sequences),
        "cross-entropy-peaked": Spec(CrossEntropy, sizes.labels, ("ours", "ours-filtered"), sizes.sequences, peaked=True),
        "retention-few": Spec(Retention, sizes.labels, RETENTION, few),
        "retention-many": Spec(Retention, sizes.labels, RETENTION, many),
        "rank": Spec(Rank, sizes.catalogue, RANK, sizes.ranked),
    }


def large(sizes: Sizes) -> dict[str, Spec]:
    """Cases over the whole catalogue, of ours only, by name."""
    labels, (few, many), both = sizes.catalogue, sizes.retained, ("ours", "ours-bf16")
    return {
        "cross-entropy-catalogue": Spec(CrossEntropy, labels, ("ours", "ours-merged", "ours-merged-bf16"), sizes.sequences),
        "retention-few-catalogue": Spec(Retention, labels, both, few),
        "retention-many-catalogue": Spec(Retention, labels, both, many),
    }


def growing(sizes: Sizes) -> dict[int, Spec]:
    """Cross-entropy over more and more labels."""
    return {labels: Spec(CrossEntropy, labels, GROWTH, sizes.growth_sequences) for labels in sizes.growth}


@dataclass
class Measured(Side):
    """Measurements of one side.

    Attributes:
        rows: that the side works on.
        gflop: useful operations of a call.
        answer: the loss, or the mean place.
        errors: relative differences from the first side: "answer" (of places: their mean difference), and of each gradient X "X"
            (of norms) and "X, largest" (of the largest elements).
    """

    rows: int = 0
    gflop: float = 0.0
    answer: float = math.nan
    errors: dict[str, float] = field(default_factory=dict)


def timed(call: Call) -> tuple[Tensor, float]:
    """Run a call without gradients of an earlier one: its answer and seconds."""
    call.forget()
    gc.collect()
    start = time.perf_counter()
    answer = call.run()
    return answer, time.perf_counter() - start


def in_turns(case: HeadCase, rounds: int, clock: Callable[[Call], tuple[Tensor, float]] = timed) -> dict[str, Measured]:
    """Times of all sides of a case, by `clock`.

    The first call of each side, not timed, must give the first side's answer and gradients. Then each round calls every side
    once, starting with another one each time. Gradients are dropped after each call, so only one side's memory is in use.

    Raises:
        DifferentAnswers: a side's are not the first side's.
    """
    found, calls, expected = dict[str, Measured](), dict[str, Call](), dict[str, Tensor]()
    for side in case.sides:
        found[side] = Measured()
        try:
            call = case.call(side)
            answers = {"answer": call.run()}
        except (NotMeasured, torch.OutOfMemoryError) as reason:
            found[side].problem = str(reason)
            continue
        found[side].rows, found[side].gflop = call.rows, case.operations(call.rows) / 1e9
        found[side].answer = float(answers["answer"].double().mean())
        answers |= {name: leaf.grad for name, leaf in call.leaves.items() if leaf.grad is not None}
        expected = expected or answers
        found[side].errors = compare(f"{case.title}: {side}", answers, expected, "bf16" if side.endswith("bf16") else "fp32")
        call.forget()
        calls[side] = call
    for number in range(rounds):
        order = list(calls)
        for side in order[number % len(order) :] + order[: number % len(order)]:
            found[side].seconds.append(clock(calls[side])[1])
            calls[side].forget()
    return found


def compare(title: str, answers: Mapping[str, Tensor], expected: Mapping[str, Tensor], precision: str) -> dict[str, float]:
    """How far answers and gradients are from the expected ones: see `Measured.errors`.

    Raises:
        DifferentAnswers: further than `TOLERANCES`.
    """
    of_loss, of_gradient, of_places = TOLERANCES[precision]
    errors, problems = {}, []
    for name, value in answers.items():
        wanted = expected[name]
        if value.shape != wanted.shape:
            continue  # of merged rows
        value, wanted = value.detach().float(), wanted.detach().float()
        difference = value - wanted
        if name == "answer":
            places = answers[name].dtype == torch.int64
            error = float(difference.abs().mean() if places else difference.abs() / wanted.abs())
            limit = of_places if places else of_loss
        else:
            error, limit = float(difference.norm() / wanted.norm()), of_gradient
            errors[f"{name}, largest"] = float(difference.abs().max() / wanted.abs().max())
        errors[name] = error
        if not error <= limit:
            problems.append(f"{name} is off by {error:.3g}, expected at most {limit:g}")
    if problems:
        raise DifferentAnswers(f"{title}: {'; '.join(problems)}")
    return errors


def trim() -> None:
    """Give freed memory back to the system, where the C library can be told to: it must not serve what is measured next."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def warm_up(spec: Spec, side: str, options: Mapping[str, Any] | None) -> None:
    """Call a side at a tiny size: libraries load, threads start."""
    replace(spec, labels=QUICK.labels, rows=min(spec.rows, 64)).make(QUICK, options).call(side).run()
    gc.freeze()  # what was imported stays; looking through it before each call would take a fifth of a second


def alone(spec: Spec, side: str, sizes: Sizes, options: Mapping[str, Any] | None, calls: int) -> Measured:
    """Peak memory and times of one side. For a process of its own: see `in_own_process`."""
    warm_up(spec, side, options)
    case = spec.make(sizes, options)
    call = case.call(side)
    found = Measured(rows=call.rows, gflop=case.operations(call.rows) / 1e9)
    trim()
    forget_highest_resident()
    before = highest_resident_mib()
    answer, seconds = timed(call)
    gradients = sum(leaf.grad.nbytes for leaf in call.leaves.values() if leaf.grad is not None)
    found.peak_mib = max(0.0, highest_resident_mib() - before - gradients / 2**20)
    found.answer = float(answer.double().mean())
    found.seconds = [seconds]
    for _ in range(calls - 1):
        found.seconds.append(timed(call)[1])
    return found


Result = TypeVar("Result")
Parameters = ParamSpec("Parameters")


def in_own_process(
    function: Callable[Parameters, Result], *arguments: Parameters.args, **named: Parameters.kwargs
) -> Result:
    """Call a function in a new process, which has imported this module and nothing else happened in.

    Raises:
        MemoryError: the process was ended, as systems do when memory runs out.
    """
    context = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
    if context.get_start_method() == "forkserver":
        # F.linear_cross_entropy imports the last one at its first call, which takes seconds.
        context.set_forkserver_preload([__name__, "bench.first_step", "bench.report", "torch._dynamo"])
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(function, *arguments, **named).result()
        except BrokenProcessPool as error:
            raise MemoryError(f"the process of {function.__name__}{arguments} was ended: out of memory?") from error
