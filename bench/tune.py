"""Measures launch configurations on this GPU and rewrites its architecture's row of `kernels/configs.json`.

    python -m bench.tune [--operation NAME] [--kind half|single] [--dry-run]

Each operation in each size bucket is called with the present configuration and with each candidate, one compilation each;
candidates that fail to compile or launch, or give other results than the present one, are passed over. The fastest ones and the
present one then take turns, and the present one stays unless another is at least 2 % faster: so a second run changes nothing.
Times are of a CUDA graph of the call where it can be captured. Everything takes half an hour or more.

The calls are those of a training step of the TTL shape and of its evaluation. Rows are what such a step has: they choose no
configuration (a batch of another size must not compile again), so one number of them stands for all.

`--device cpu --quick --architecture NAME --table FILE` is a self-test without a GPU: with TRITON_INTERPRET=1 the heads' kernels
run in Triton's interpreter, convolutions by plain PyTorch operations, all at tiny sizes.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bench import record
from bench.device import NotMeasured, first_line, replayed
from bench.gpu import refusal
from bench.harness import Call, Case, measure
from bench.shapes import TINY, TTL, Shape
from teracon_fast import ops
from teracon_fast.errors import TeraconError
from teracon_fast.files import atomic_write
from teracon_fast.kernels import configs
from teracon_fast.kernels.configs import Config, Operation

Kind = Literal["half", "single"]
KINDS: tuple[Kind, ...] = get_args(Kind)
DTYPES = {"half": torch.bfloat16, "single": torch.float32}
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
CONVOLUTIONS: tuple[Operation, ...] = ("conv", "conv_input", "conv_weight")
# Their tiles have all channels; columns are a share of them that is finished at once, 0 for all.
WHOLE_ROWS: tuple[Operation, ...] = ("conv", "conv_input")


@dataclass(frozen=True)
class Sizes:
    """Of the representative calls: bounds of the buckets of heads and of convolutions, and what stands for each; f of the heads'
    hidden states; distinct states of a step of task 1 with 32 users; users in evaluation and in retention; users whose rows
    a convolution reads; k of top-k."""

    labels: tuple[tuple[int | None, int], ...] = ((4096, 2_000), (65_536, 17_880), (None, 646_000))
    channels: tuple[tuple[int | None, int], ...] = ((128, 128), (256, 256), (None, 512))
    head_channels: int = 256
    rows: int = 1_600
    ranked: int = 1_024
    retained: int = 20
    users: int = 1_024
    top: int = 20
    shape: Shape = TTL


FULL = Sizes()
QUICK = Sizes(((64, 40), (None, 150)), ((16, 16), (None, 32)), 16, rows=20, ranked=8, retained=3, users=6, top=5, shape=TINY)


@dataclass(frozen=True)
class Problem:
    """An operation in one size bucket: `size` labels or channels stand for all up to `up_to`."""

    operation: Operation
    kind: Kind
    up_to: int | None
    size: int
    sizes: Sizes

    @property
    def title(self) -> str:
        sizes, of = self.sizes, "channels" if self.operation in CONVOLUTIONS else "labels"
        rows = {"retention": sizes.retained, "topk": sizes.ranked}.get(self.operation, sizes.rows)
        many = f"{sizes.users:,} users" if self.operation in CONVOLUTIONS else f"{rows:,} rows"
        return f"{self.operation}, {self.kind}, {self.size:,} {of}, {many}"

    @property
    def channels(self) -> int:
        return self.size if self.operation in CONVOLUTIONS else self.sizes.head_channels

    def call(self, device: torch.device, backend: str) -> Callable[[], Sequence[Tensor]]:
        """The call, with inputs of its own. `backend` is that of convolutions.

        Raises:
            BackendError: the backend has no such operation here.
        """
        torch.manual_seed(self.size)
        if self.operation in CONVOLUTIONS:
            return self._convolution(device, backend)
        with device:
            return self._head()

    def _head(self) -> Callable[[], Sequence[Tensor]]:
        # Here, not above: it needs Triton.
        from teracon_fast.kernels import linear_cross_entropy, linear_rank, retention_mse

        sizes, dtype, labels, f = self.sizes, DTYPES[self.kind], self.size, self.sizes.head_channels
        weight, bias = torch.randn(labels, f) * 0.01, torch.full((labels,), 0.1)
        if self.operation == "retention":
            student = torch.randn(sizes.retained, f).to(dtype)
            teacher = (student.float() + 0.1 * torch.randn(sizes.retained, f)).to(dtype)
            pseudo = teacher, weight + 0.002 * torch.randn(labels, f), bias
            scale = torch.full((), 1.0 / (sizes.retained * labels))
            return lambda: retention_mse.forward_backward(student, weight, bias, *pseudo, scale, True)
        if self.operation == "topk":
            hidden, none = torch.randn(sizes.ranked, f).to(dtype), torch.zeros(0, dtype=torch.int64)
            starts, k = torch.zeros(sizes.ranked + 1, dtype=torch.int64), min(sizes.top, labels)
            # Of equal scores rounding decides which label comes first, so only scores are an answer.
            return lambda: linear_rank.topk(hidden, weight, bias, k, none, starts)[:1]
        hidden = torch.randn(sizes.rows, f).to(dtype)
        targets, rows = torch.randint(labels, (2 * sizes.rows,)), torch.arange(2 * sizes.rows) // 2
        if self.operation == "scan":
            return lambda: linear_cross_entropy.forward(hidden, weight, bias, targets, rows, False)[:2]
        statistics = linear_cross_entropy.forward(hidden, weight, bias, targets, rows, False)[1]
        grad, by_labels = torch.full((len(targets),), 1.0 / len(targets)), self.operation == "weight"
        return lambda: linear_cross_entropy.backward(
            grad, hidden, weight, bias, targets, rows, statistics, not by_labels, by_labels, need_bias=by_labels
        )

    def _convolution(self, device: torch.device, backend: str) -> Callable[[], Sequence[Tensor]]:
        shape, f, dtype = self.sizes.shape, self.size, DTYPES[self.kind]
        packed = shape.pack(shape.lengths(self.sizes.users)).to(device)
        # The second convolution of the middle block: it has a residual.
        block = len(packed.residuals) // 2
        table, residual_table = packed.convolutions[2 * block + 1], packed.residuals[block]
        with device:
            x, residual = (torch.randn(rows, f).to(dtype) for rows in (table.rows_in, len(residual_table.readers)))
            weight = torch.randn(f, f, shape.kernel_size) * (shape.kernel_size * f) ** -0.5
            bias, scale, shift, mask = torch.zeros(f), torch.ones(f), torch.zeros(f), torch.rand(1, f)
        inputs = {"conv": [], "conv_input": [x], "conv_weight": [weight]}[self.operation]
        for tensor in inputs:
            tensor.requires_grad_()

        def forward() -> Tensor:
            norm = scale, shift, mask, table
            return ops.masked_conv(x, weight, bias, *norm, residual=residual, residual_table=residual_table, backend=backend)

        if not inputs:
            return lambda: (forward(),)
        grad = torch.randn_like(forward())
        # With its forward pass, whose time is the same for every candidate: a graph holds both or neither.
        return lambda: torch.autograd.grad(forward(), inputs, grad)


def problems(sizes: Sizes, operations: Sequence[Operation], kinds: Sequence[Kind]) -> Iterator[Problem]:
    """All that is to be measured."""
    for operation in operations:
        for kind in kinds:
            for up_to, size in sizes.channels if operation in CONVOLUTIONS else sizes.labels:
                yield Problem(operation, kind, up_to, size, sizes)


# Rows, columns, depth, warps; then features. Small on purpose: each candidate compiles for seconds.
_TILES: dict[Kind, dict[Operation, list[tuple[int, int, int, int]]]] = {
    "half": {
        "scan": [
            (64, 64, 32, 4), (64, 64, 64, 4), (64, 128, 64, 4), (128, 64, 32, 8), (128, 64, 64, 4), (128, 128, 32, 8),
            (128, 128, 64, 8),
        ],
        "weight": [(32, 64, 32, 4), (64, 64, 32, 8), (64, 64, 64, 8), (64, 128, 64, 8), (128, 64, 64, 8)],
        "hidden": [(64, 32, 32, 4), (64, 64, 32, 8), (64, 64, 64, 8), (64, 128, 64, 8), (128, 64, 64, 8)],
        "retention": [(32, 32, 32, 4), (32, 64, 32, 4), (32, 64, 64, 8), (64, 32, 32, 8), (64, 64, 64, 8)],
        "topk": [(16, 128, 32, 4), (16, 128, 64, 8), (32, 128, 32, 8), (32, 128, 64, 8), (64, 128, 32, 8), (64, 128, 64, 8)],
        "conv": [
            *((r, c, d, 8) for r in (64, 128) for c in (0, 64) for d in (32, 64)), (32, 0, 16, 8), (32, 0, 32, 4),
            (32, 128, 32, 8), (64, 0, 32, 4),
        ],
        "conv_input": [*((r, 0, d, 8) for r in (64, 128) for d in (32, 64)), (32, 0, 16, 8), (32, 0, 32, 4), (64, 0, 32, 4)],
        "conv_weight": [
            (64, 64, 32, 4), (64, 64, 64, 4), (64, 128, 32, 4), (128, 64, 64, 4), (128, 128, 32, 8), (128, 128, 64, 8),
            (128, 256, 64, 8),
        ],
    },
    "single": {
        "scan": [(32, 64, 32, 4), (64, 64, 16, 4), (64, 64, 32, 8), (64, 128, 16, 8), (128, 64, 16, 8)],
        "weight": [(32, 32, 32, 4), (32, 32, 32, 8), (32, 64, 16, 8), (64, 32, 16, 8)],
        "hidden": [(32, 32, 32, 4), (32, 32, 32, 8), (32, 64, 16, 8), (64, 32, 16, 8)],
        "retention": [(32, 32, 32, 8), (16, 64, 32, 8), (32, 64, 16, 8)],
        "topk": [(16, 128, 16, 4), (16, 128, 32, 4), (16, 128, 32, 8), (32, 128, 16, 8)],
        "conv": [(r, 0, 16, w) for r in (16, 32, 64) for w in (4, 8)],
        "conv_input": [(r, 0, 16, w) for r in (16, 32, 64) for w in (4, 8)],
        "conv_weight": [(32, 32, 32, 4), (32, 64, 32, 4), (64, 64, 16, 4), (64, 64, 32, 8)],
    },
}  # fmt: skip
_FEATURES: dict[Kind, tuple[int, ...]] = {"half": (128, 256), "single": (64, 128)}


def candidates(problem: Problem, architecture: str) -> list[Config]:
    """Configurations to try: those of a small grid that should fit the architecture's shared memory."""
    features = _FEATURES[problem.kind] if problem.operation in ("weight", "hidden", "retention") else (0,)
    stages = (2, 3, 4) if problem.operation in CONVOLUTIONS else (2, 3)
    grid = [
        Config(rows, columns, depth, owned, warps, number)
        for rows, columns, depth, warps in _TILES[problem.kind][problem.operation] for owned in features for number in stages
        if problem.operation not in WHOLE_ROWS or columns < problem.channels
    ]  # fmt: skip
    return [tried for tried in grid if shared_kib(problem, tried, architecture) <= configs.SHARED[architecture]]


def shared_kib(problem: Problem, tried: Config, architecture: str) -> float:
    """KiB of shared memory that a program should take: each waiting stage's operands.

    An estimate, which agrees with what the compiler takes for products without a second one: what does not fit after all fails
    to launch, and is passed over.
    """
    columns, bytes_of = problem.channels if problem.operation in WHOLE_ROWS else tried.columns, DTYPES[problem.kind].itemsize
    # A head's weight is float32 until it is in registers; those of convolutions are rounded before.
    across = bytes_of if problem.operation in CONVOLUTIONS else 4
    taken = (tried.stages - 1) * (tried.rows * bytes_of + columns * across) * tried.depth
    if problem.kind == "half" and architecture in ("sm_90", "sm_100"):
        taken += (tried.rows + columns) * tried.depth * bytes_of  # what their products read
    if tried.features:  # one product after the other
        second = tried.rows * columns + max(tried.rows, columns) * min(tried.features, problem.channels)
        taken = max(taken, second * bytes_of)
    return taken / 1024


FASTER = 0.98  # the present configuration stays unless another takes at most this share of its time
FINALISTS, TURNS = 3, 5
LOST = ("CUDA error", "HIP error", "illegal memory access")  # what says that every later call on the device would fail too

Table = dict[str, dict[str, Any]]


class Configurations(Case):
    """One call with several configurations, as sides; the first is the present one."""

    limits = {"": (1e-4, 2e-2)}  # sums are taken in another order

    def __init__(self, problem: Problem, call: Any, tried: Sequence[Config], device: torch.device) -> None:
        self.problem, self.call, self.device = problem, call, device
        self.of = {written(config) + (", bf16" if problem.kind == "half" else ""): config for config in tried}
        self.name, self.sides = problem.operation, tuple(self.of)

    @property
    def title(self) -> str:
        return self.problem.title

    def side(self, name: str) -> Call:
        def run() -> dict[str, Tensor]:
            try:
                with configs.using(self.problem.operation, self.of[name]):
                    return {str(number): tensor for number, tensor in enumerate(self.call()) if tensor.numel()}
            except Exception as error:
                raise NotMeasured(first_line(error)) from error

        try:
            return Call(replayed(run, self.device), kernels_only=True)
        except NotMeasured:
            return Call(run, kernels_only=True)


@dataclass
class Outcome:
    """What came of one problem: seconds of the winner and of the present configuration, and what was passed over and why."""

    problem: Problem
    present: Config
    winner: Config
    seconds: float
    present_seconds: float
    passed_over: dict[str, str]


def written(config: Config) -> str:
    """A configuration in a line."""
    return " ".join(f"{name} {value}" for name, value in asdict(config).items() if value)


def tune(problem: Problem, present: Config, tried: Sequence[Config], call: Any, device: torch.device) -> Outcome:
    """Find the fastest configuration of a call, `present` unless another is clearly faster.

    Raises:
        NotMeasured: the present configuration fails. RuntimeError: the device is lost.
    """
    case = Configurations(problem, call, list(dict.fromkeys([present, *tried])), device)
    first, *others = case.sides
    found = measure(case, rounds=1, one_by_one=True, peaks={}).sides
    passed_over = {name: side.problem for name, side in found.items() if side.problem is not None}
    if any(word in problem for problem in passed_over.values() for word in LOST):
        raise RuntimeError(f"the device is lost: {passed_over}")
    if first in passed_over:
        raise NotMeasured(passed_over[first])
    fastest = sorted((name for name in others if found[name].seconds), key=lambda name: found[name].median)
    finalists = Configurations(problem, call, [present, *(case.of[name] for name in fastest[:FINALISTS])], device)
    times = measure(finalists, TURNS, peaks={}).sides
    best = min((name for name in times if times[name].seconds), key=lambda name: times[name].median)
    best = best if times[best].median <= FASTER * times[first].median else first
    return Outcome(problem, present, case.of[best], times[best].median, times[first].median, passed_over)


def with_winners(table: Mapping[str, Mapping[str, Any]], architecture: str, outcomes: Sequence[Outcome]) -> Table:
    """The table with the winners in an architecture's row; neighbouring buckets with one winner become one."""
    new: Table = copy.deepcopy({name: dict(row) for name, row in table.items()})
    found = dict[tuple[str, str], list[tuple[int | None, Config]]]()
    for outcome in sorted(outcomes, key=lambda outcome: outcome.problem.up_to or 2**62):
        buckets = found.setdefault((outcome.problem.kind, outcome.problem.operation), [])
        if buckets and buckets[-1][1] == outcome.winner:
            buckets.pop()
        buckets.append((outcome.problem.up_to, outcome.winner))
    for kind, operation in sorted(found, key=lambda key: (KINDS.index(key[0]), OPERATIONS.index(key[1]))):  # type: ignore
        new[architecture].setdefault(kind, {})[operation] = [
            {**({} if up_to is None else {"up_to": up_to}), **{k: v for k, v in asdict(config).items() if k != "features" or v}}
            for up_to, config in found[kind, operation]
        ]
    return new


def rewritten(table: Table, architecture: str, outcomes: Sequence[Outcome], facts: Mapping[str, Any]) -> Table:
    """The table after a run, the same where nothing but the date is new. "measured" says where, when, with what, and which
    operations, with those of earlier runs on the same device and versions."""
    names = {f"{outcome.problem.kind} {outcome.problem.operation}" for outcome in outcomes}
    new, before = with_winners(table, architecture, outcomes), table[architecture]["measured"] or {}
    if all(before.get(name) == value for name, value in facts.items() if name != "date"):
        names |= set(before["operations"])
    new[architecture]["measured"] = {**facts, "operations": sorted(names)}
    dated = {**new[architecture], "measured": {**new[architecture]["measured"], "date": before.get("date")}}
    return table if dated == table[architecture] else new


def run_all(table: Table, architecture: str, wanted: Sequence[Problem], device: torch.device, backend: str) -> list[Outcome]:
    """Tune every problem. One whose operation has no such backend here, or whose present configuration fails, is left out with
    the other buckets of its operation."""
    outcomes, broken = list[Outcome](), set[tuple[str, str]]()
    for problem in wanted:
        key = (problem.kind, problem.operation)
        if key in broken:
            continue
        present = configs.of_size(configs.buckets(table, architecture, *key), problem.size)
        try:
            call = problem.call(device, backend)
            found = tune(problem, present, candidates(problem, architecture), call, device)
        except (NotMeasured, TeraconError) as error:
            print(f"{problem.title}: left as it is, {first_line(error)}", flush=True)
            broken.add(key)
            continue
        outcomes.append(found)
        saved = 1 - found.seconds / found.present_seconds
        less = f", {saved:.0%} less than {written(present)}" if found.winner != present else ""
        print(f"{problem.title}: {written(found.winner)}, {record.duration(found.seconds)}{less}", flush=True)
        print("".join(f"    passed over {name}: {why}\n" for name, why in found.passed_over.items()), end="")
    return [outcome for outcome in outcomes if (outcome.problem.kind, outcome.problem.operation) not in broken]


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune as the command line says; returns 2 where there is nothing to tune."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--operation", choices=OPERATIONS, action="append", help="may be given again (all)")
    parser.add_argument("--kind", choices=KINDS, action="append", help="of operands; may be given again (both)")
    parser.add_argument("--dry-run", action="store_true", help="measure, but leave the table as it is")
    parser.add_argument("--table", type=Path, default=configs.TABLE, help="the table to rewrite (kernels/configs.json)")
    parser.add_argument("--device", default="cuda", help="cpu: a self-test, with --quick; cuda:1: another GPU (cuda)")
    parser.add_argument("--architecture", help="row to rewrite, in a self-test")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, in a self-test")
    given = parser.parse_args(arguments)
    device, on_cpu = torch.device(given.device), given.device == "cpu"
    asked = given.quick, given.architecture
    if not (all(asked) and given.table != configs.TABLE if on_cpu else not any(asked)):
        parser.error("--device cpu is a self-test: it takes --quick, --architecture and a --table of its own, and a GPU none")
    reason = None if on_cpu else refusal()
    table, name, architecture = configs.read(given.table), "self-test on the CPU", given.architecture
    if reason is None and not on_cpu:
        torch.cuda.set_device(device)
        name, architecture = torch.cuda.get_device_name(device), configs.architecture(device)
    if reason is None and architecture not in set(table) - {"other"}:
        reason = f"{name}: the table has no row {architecture!r}, expected one of {sorted(set(table) - {'other'})}. Put its "
        reason += "shared memory into `SHARED` of kernels/configs.py and a copy of the row \"other\" into the table"
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    wanted = list(problems(QUICK if given.quick else FULL, given.operation or OPERATIONS, given.kind or KINDS))
    count = sum(len(candidates(problem, architecture)) for problem in wanted)
    print(f"{name}; row {architecture} of {given.table}; {len(wanted)} calls, {count} candidates", flush=True)
    outcomes = run_all(table, architecture, wanted, device, "torch" if on_cpu else "triton")
    here = record.provenance()
    versions = {key: here["versions"][key] for key in ("teracon_fast", "torch", "triton")}
    new = rewritten(table, architecture, outcomes, {"device": name, "date": here["date"][:10], **versions})
    changed = sum(outcome.winner != outcome.present for outcome in outcomes)
    print(f"{changed} of {len(outcomes)} configurations are new")
    if given.dry_run or new is table:
        print(f"{given.table} stays as it is")
        return 0
    with atomic_write(given.table, "w") as file:
        file.write(configs.written(new))
    print(f"{given.table} rewritten; the tests in tests/kernels say whether the kernels still agree")
    return 0


if __name__ == "__main__":
    sys.exit(main())
