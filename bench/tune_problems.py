"""What `bench/tune.py` measures: a representative call of each operation in each size bucket, and the configurations tried.

The calls are those of a training step of the TTL shape and of its evaluation. Rows are what such a step has: they choose no
configuration (a batch of another size must not compile again), so one number of them stands for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from bench.cases import TTL, Shape
from teracon_fast import ops
from teracon_fast.kernels import configs
from teracon_fast.kernels.configs import Config, Operation
from teracon_fast.packing import Streams

Kind = Literal["half", "single"]
KINDS: tuple[Kind, ...] = get_args(Kind)
DTYPES = {"half": torch.bfloat16, "single": torch.float32}
CONVOLUTIONS: tuple[Operation, ...] = ("conv", "conv_input", "conv_weight")
# Their tiles have all channels; columns are a share of them that is finished at once, 0 for all.
WHOLE_ROWS: tuple[Operation, ...] = ("conv", "conv_input")
OPERATIONS: tuple[Operation, ...] = get_args(Operation)

Answer = tuple[Tensor, ...]
Call = Callable[[], Answer]


@dataclass(frozen=True)
class Sizes:
    """Of the representative calls.

    Attributes:
        labels: of heads, each bucket's upper bound and the number that stands for it.
        channels: of convolutions, the same.
        head_channels: f of the heads' hidden states.
        rows: distinct states of a step of task 1 with 32 users. ranked, retained: users in evaluation and in retention.
        users: whose rows a convolution reads.
        places: k of top-k.
        shape: gives lengths and dilations.
    """

    labels: tuple[tuple[int | None, int], ...] = ((4096, 2_000), (65_536, 17_880), (None, 646_000))
    channels: tuple[tuple[int | None, int], ...] = ((128, 128), (256, 256), (None, 512))
    head_channels: int = 256
    rows: int = 1_600
    ranked: int = 1_024
    retained: int = 20
    users: int = 1_024
    places: int = 20
    shape: Shape = TTL


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
        of = "channels" if self.operation in CONVOLUTIONS else "labels"
        sizes = self.sizes
        rows = {"retention": sizes.retained, "topk": sizes.ranked}.get(self.operation, sizes.rows)
        how_many = f"{sizes.users:,} users" if self.operation in CONVOLUTIONS else f"{rows:,} rows"
        return f"{self.operation}, {self.kind}, {self.size:,} {of}, {how_many}"

    @property
    def channels(self) -> int:
        return self.size if self.operation in CONVOLUTIONS else self.sizes.head_channels

    def call(self, device: torch.device, backend: str) -> Call:
        """The call, with inputs of its own. `backend` is that of convolutions.

        Raises:
            BackendError: the backend has no such operation here.
        """
        torch.manual_seed(self.size)
        if self.operation in CONVOLUTIONS:
            return self._convolution(device, backend)
        with device:
            return self._head()

    def _head(self) -> Call:
        # Here, not above: it needs Triton.
        from teracon_fast.kernels import linear_cross_entropy, linear_rank, retention_mse

        sizes, dtype, labels, f = self.sizes, DTYPES[self.kind], self.size, self.sizes.head_channels
        weight, bias = torch.randn(labels, f) * 0.01, torch.full((labels,), 0.1)
        if self.operation == "retention":
            student = torch.randn(sizes.retained, f).to(dtype)
            teacher = (student.float() + 0.1 * torch.randn(sizes.retained, f)).to(dtype)
            teacher_weight = weight + 0.002 * torch.randn(labels, f)
            scale = torch.full((), 1.0 / (sizes.retained * labels))
            return lambda: retention_mse.forward_backward(
                student, weight, bias, teacher, teacher_weight, bias, scale, True
            )
        if self.operation == "topk":
            hidden, none = torch.randn(sizes.ranked, f).to(dtype), torch.zeros(0, dtype=torch.int64)
            starts, k = torch.zeros(sizes.ranked + 1, dtype=torch.int64), min(sizes.places, labels)
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

    def _convolution(self, device: torch.device, backend: str) -> Call:
        shape, f, dtype = self.sizes.shape, self.size, DTYPES[self.kind]
        lengths = shape.lengths(self.sizes.users)
        packed = shape.network.pack(lengths, shape.length, [Streams(np.arange(self.sizes.users))]).to(device)
        # The second convolution of the middle block: it has a residual.
        block = len(packed.residuals) // 2
        table, residual_table = packed.convolutions[2 * block + 1], packed.residuals[block]
        # Not around the packing, which has memory of the host to take.
        with device:
            x = torch.randn(table.rows_in, f).to(dtype)
            residual = torch.randn(len(residual_table.readers), f).to(dtype)
            weight = torch.randn(f, f, shape.kernel_size) * (shape.kernel_size * f) ** -0.5
            bias, scale, shift, mask = torch.zeros(f), torch.ones(f), torch.zeros(f), torch.rand(1, f)
        inputs = {"conv": [], "conv_input": [x], "conv_weight": [weight]}[self.operation]
        for tensor in inputs:
            tensor.requires_grad_()

        def forward() -> Tensor:
            return ops.masked_conv(
                x, weight, bias, scale, shift, mask, table, residual=residual, residual_table=residual_table, backend=backend
            )

        if not inputs:
            return lambda: (forward(),)
        grad = torch.randn_like(forward())
        # With its forward pass, whose time is the same for every candidate: a graph of launches holds both or neither.
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
_STAGES, _STAGES_OF_CONVOLUTIONS = (2, 3), (2, 3, 4)
# Sums of products that a thread may hold in its at most 255 registers: heads need more for other things, and spill from here on.
_SUMS_OF_HEADS, _SUMS_OF_CONVOLUTIONS = 90, 128


def candidates(problem: Problem, architecture: str) -> list[Config]:
    """Configurations to try: those of a small grid that should fit the architecture's registers and shared memory."""
    features = _FEATURES[problem.kind] if problem.operation in ("weight", "hidden", "retention") else (0,)
    several = _STAGES_OF_CONVOLUTIONS if problem.operation in CONVOLUTIONS else _STAGES
    grid = [
        Config(rows, columns, depth, owned, warps, stages)
        for rows, columns, depth, warps in _TILES[problem.kind][problem.operation] for owned in features for stages in several
        if problem.operation not in WHOLE_ROWS or columns < problem.channels
    ]  # fmt: skip
    lanes = 64 if architecture.startswith("gfx") else 32
    fitting = [tried for tried in grid if shared_kib(problem, tried, architecture) <= configs.SHARED[architecture]]
    most = _SUMS_OF_CONVOLUTIONS if problem.operation in CONVOLUTIONS else _SUMS_OF_HEADS
    return [tried for tried in fitting if sums(problem, tried) <= most * tried.warps * lanes]


def shared_kib(problem: Problem, tried: Config, architecture: str) -> float:
    """KiB of shared memory that a program should take: each waiting stage's operands.

    An estimate, which agrees with what the compiler takes for products without a second one: what does not fit after all fails
    to launch, and is passed over.
    """
    columns = width(problem, tried)
    bytes_of = DTYPES[problem.kind].itemsize
    # A head's weight is float32 until it is in registers; those of convolutions are rounded before.
    across = bytes_of if problem.operation in CONVOLUTIONS else 4
    taken = (tried.stages - 1) * (tried.rows * bytes_of + columns * across) * tried.depth
    if problem.kind == "half" and architecture in ("sm_90", "sm_100"):
        taken += (tried.rows + columns) * tried.depth * bytes_of  # what their products read
    if tried.features:  # one product after the other
        second = tried.rows * columns + max(tried.rows, columns) * min(tried.features, problem.channels)
        taken = max(taken, second * bytes_of)
    return taken / 1024


def width(problem: Problem, tried: Config) -> int:
    """Columns of a tile's sums."""
    return problem.channels if problem.operation in WHOLE_ROWS else tried.columns


def sums(problem: Problem, tried: Config) -> int:
    """Sums of products that a program holds: a tile of the result, and its part of a gradient."""
    columns = width(problem, tried)
    owned = {"weight": columns, "hidden": tried.rows, "retention": tried.rows}.get(problem.operation, 0)
    return tried.rows * columns + owned * min(tried.features, problem.channels)
