"""NextItNet's dilated causal network on packed rows: item embedding and residual blocks, without its own masks or heads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from teracon_fast import ops, packing
from teracon_fast.errors import ConfigError, ShapeError
from teracon_fast.model.encoder import Encoder, Precision
from teracon_fast.ops import backends
from teracon_fast.optim.lazy_rows import Embedding
from teracon_fast.packing import transfers

LAYER_NORM_EPS = 1e-8
# Least number of users for which one call without gradient packs the weights for the compiled encoder.
ENCODER_USERS = 64


class Convolution(Protocol):
    """Runs one convolution with LayerNorm, ReLU, mask and residual. Arguments as `Backbone.convolve`, the default."""

    def __call__(
        self, site: int, x: Tensor, mask: Tensor, table: packing.TapTable, residual: Tensor | None = None,
        residual_table: packing.ResidualTable | None = None, weight: Tensor | None = None,
    ) -> Tensor: ...  # fmt: skip


class EncodeUsers(Protocol):
    """What `Backbone.encoder` returns: representations `[B, f]` of sequences `[B, L]`, arguments as `Backbone.represent`."""

    def __call__(self, x: Tensor, drop_last: int = 0, lengths: np.ndarray | None = None) -> Tensor: ...


@dataclass(frozen=True)
class PackedPositions:
    """States of every position with equal rows merged.

    Attributes:
        hidden: `[R, f]`, one row per distinct state.
        row_of: int64 `[B, L]`, row of each (sequence, position).
    """

    hidden: Tensor
    row_of: Tensor


class ResidualBlock(nn.Module):
    """Parameters of one residual block, under the published names. `Backbone` runs it: it has no forward."""

    def __init__(
        self, channels: int, kernel_size: int, dilation: int, num_tasks: int, relation_width: int | None,
        embedding_range: tuple[float, float],
    ) -> None:  # fmt: skip
        super().__init__()
        # Modules are created in the published order, so that a seed gives the published program's initial weights.
        self.conv1 = nn.Conv2d(channels, channels, (1, kernel_size), dilation=dilation)
        self.ln1 = nn.LayerNorm(channels, eps=LAYER_NORM_EPS)
        self.conv2 = nn.Conv2d(channels, channels, (1, kernel_size), dilation=2 * dilation)
        self.ln2 = nn.LayerNorm(channels, eps=LAYER_NORM_EPS)
        self.ec = nn.ModuleList(nn.Embedding(2, channels) for _ in range(num_tasks))
        for embedding in self.task_embeddings:
            nn.init.uniform_(embedding, *embedding_range)
        if relation_width is not None:
            self.mlp1 = nn.ModuleList(nn.Linear(relation_width, 1) for _ in range(num_tasks))
            self.mlp2 = nn.ModuleList(nn.Linear(relation_width, 1) for _ in range(num_tasks))
            for task in range(num_tasks):
                for linear in self.relation_weights(task):
                    init_linear(linear)

    @property
    def task_embeddings(self) -> list[Tensor]:
        """Per task `[2, f]`: row 0 belongs to the block's first site, row 1 to its second."""
        return [cast(nn.Embedding, embedding).weight for embedding in self.ec]

    def relation_weights(self, task: int) -> tuple[nn.Linear, nn.Linear]:
        """Relation weights of a task at the block's two sites, each `Linear(2T-1, 1)`."""
        return cast(nn.Linear, self.mlp1[task]), cast(nn.Linear, self.mlp2[task])


def init_linear(linear: nn.Linear) -> None:
    """Weight N(0, 0.01), bias 0.1: heads and relation weights."""
    nn.init.normal_(linear.weight, 0.0, 0.01)
    nn.init.constant_(linear.bias, 0.1)


def head_loss(
    head: nn.Linear, hidden: Tensor, targets: Tensor, rows: Tensor | None = None, predictions: bool = False,
    backend: str = "auto",
) -> ops.CrossEntropy:  # fmt: skip
    """Mean cross-entropy of a head; arguments as `ops.linear_cross_entropy`. Without `predictions` argmax and rank are empty."""
    arguments = hidden, head.weight, head.bias, targets, rows
    if predictions:
        return ops.linear_cross_entropy(*arguments, predictions=True, backend=backend)
    none = targets.new_empty(0)
    return ops.CrossEntropy(ops.linear_cross_entropy(*arguments, backend=backend), none, none)


def next_item_inputs(x: Tensor, lengths: np.ndarray | None) -> tuple[Tensor, np.ndarray | None]:
    """Sequences `[B, L]` without their last item, which is only a target, and their real lengths if those of x are known."""
    if x.dim() != 2 or x.shape[1] < 2:
        raise ShapeError(f"x is {list(x.shape)}, expected [B, L] with L at least 2")
    # Without its last item a sequence is one shorter; one that is all pads stays so.
    return x[:, :-1], None if lengths is None else np.maximum(lengths - 1, 0)


def check_items(x: Tensor) -> None:
    """Raise ShapeError unless x is integers `[B, L]`."""
    if x.dim() != 2 or x.dtype not in (torch.int64, torch.int32):
        raise ShapeError(f"x is {x.dtype} {list(x.shape)}, expected int64 [B, L]")


class Backbone(nn.Module):
    """Item embedding `[V, f]` and residual blocks, under the published names. Convolutions run as `ops.masked_conv`.

    Args:
        num_items: V, rows of the item embedding including the pad, item 0 (a learned row like any other).
        channels: f.
        dilations: one per residual block; its convolutions have dilations d and 2d.
        kernel_size: at least 2.
        backend: of the compiled operations, see `teracon_fast.env_report()`.
        algorithm: of the convolutions, "auto", "direct" or "winograd", see `ops.masked_conv`.
        num_tasks, relation_width, task_embedding_range: of the blocks' task embeddings and relation weights; none by default.

    Attributes:
        sparse_embedding_grad: whether the item embedding's gradient is sparse, see `ops.embedding_rows`. False until
            `make_optimizer` sets it: most optimizers and `DistributedDataParallel` take only dense gradients. Copies of a model
            start with False too. While it is True, `optim.Adam` may update the embedding lazily; reading its weight brings all
            rows up to date first.

    Raises:
        ConfigError: for an invalid argument.
    """

    def __init__(
        self, num_items: int, channels: int, dilations: Sequence[int], kernel_size: int, backend: str = "auto",
        algorithm: str = "auto", num_tasks: int = 0, relation_width: int | None = None,
        task_embedding_range: tuple[float, float] = (0.0, 2.0),
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value, least in (("num_items", num_items, 1), ("channels", channels, 1), ("kernel_size", kernel_size, 2)):
            if value < least:
                raise ConfigError(f"{name} is {value}, expected at least {least}")
        if not dilations or any(d < 1 for d in dilations):
            raise ConfigError(f"dilations are {list(dilations)}, expected at least one, all positive")
        backends.check_name(backend)  # fail here, not in the first step
        if algorithm not in ops.ALGORITHMS:
            raise ConfigError(f"algorithm is {algorithm!r}, expected one of {list(ops.ALGORITHMS)}")
        self.num_items, self.channels, self.kernel_size = int(num_items), int(channels), int(kernel_size)
        self.dilations = tuple(int(d) for d in dilations)
        self.backend, self.algorithm = backend, algorithm
        self.embeding = Embedding(self.num_items, self.channels)  # the published spelling
        bound = math.sqrt(1.0 / self.num_items)
        nn.init.uniform_(self.embeding.weight, -bound, bound)
        self.residual_blocks = nn.Sequential(
            *(
                ResidualBlock(self.channels, self.kernel_size, d, num_tasks, relation_width, task_embedding_range)
                for d in self.dilations
            )
        )

    @property
    def sparse_embedding_grad(self) -> bool:
        return self.embeding.sparse_grad

    @sparse_embedding_grad.setter
    def sparse_embedding_grad(self, wanted: bool) -> None:
        self.embeding.sparse_grad = wanted

    @property
    def device(self) -> torch.device:
        """Of the item embedding, and expected of all other parameters."""
        return self.embeding.stored.device

    @property
    def blocks(self) -> list[ResidualBlock]:
        """The residual blocks, in network order."""
        return cast("list[ResidualBlock]", list(self.residual_blocks))

    @property
    def num_sites(self) -> int:
        """S, number of convolutions, and of masks per task: two per residual block."""
        return 2 * len(self.residual_blocks)

    def pack(
        self, length: int, lengths: np.ndarray, streams: Sequence[packing.Streams], every_position: bool = False,
        padded: bool = False,
    ) -> packing.PackedBatch:  # fmt: skip
        """The tables of a pass over sequences of `length` positions, on the model's device. Other arguments as `ops.pack`."""
        geometry = packing.geometry(length, self.dilations, self.kernel_size, every_position)
        return ops.pack(lengths, streams, geometry, self.device, self.backend, padded)

    def run(
        self, x: Tensor, requests: Sequence[tuple[Tensor | None, int]], masks: Tensor | None = None,
        lengths: np.ndarray | None = None, every_position: bool = False, weights: Sequence[Tensor] | None = None,
        convolve: Convolution | None = None,
    ) -> tuple[Tensor, packing.PackedBatch]:  # fmt: skip
        """Pack sequences and run all residual blocks over them.

        Args:
            x: int64 `[B, L]` item ids, oldest first, left-padded with 0.
            requests: (users, items dropped from the end) of each; users are int64 `[n]`, rows of x, or None for all in order.
            masks: `[S, requests, f]`; None: nothing is masked.
            lengths: real lengths int64 `[B]` on the host, if known; else computed from x.
            every_position: states of all positions, else of the last one.
            weights, convolve: as `layers`.

        Returns:
            The last layer's rows, `[rows, f]`, and the tables, whose `outputs` are the rows of each request.
        """
        check_items(x)
        lengths = packing.real_lengths(x) if lengths is None else lengths
        everyone = np.arange(x.shape[0])
        streams = [
            packing.Streams(everyone if users is None else users.detach().cpu().numpy().astype(np.int64), drop)
            for users, drop in requests
        ]
        packed = self.pack(x.shape[1], lengths, streams, every_position)
        masks = self.no_masks(len(requests)) if masks is None else masks
        return self.states(x, packed, masks, weights, convolve), packed

    def no_masks(self, requests: int = 1) -> Tensor:
        """`[S, requests, f]` of ones."""
        stored = self.embeding.stored
        return torch.ones(self.num_sites, requests, self.channels, dtype=stored.dtype, device=stored.device)

    def represent(
        self, x: Tensor, masks: Tensor | None = None, drop_last: int = 0, lengths: np.ndarray | None = None,
        weights: Sequence[Tensor] | None = None, convolve: Convolution | None = None,
    ) -> Tensor:  # fmt: skip
        """User representations `[B, f]`: states of the last position, under one set of masks `[S, 1, f]`.

        Without gradient the compiled encoder serves many users; see `encoder` for many calls. `drop_last`: items dropped from
        the end of each sequence first; other arguments as `run`.
        """
        many = x.shape[0] >= ENCODER_USERS and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        if many and self._encoder_serves(convolve):
            return Backbone.encoder(self, masks, weights)(x, drop_last, lengths)
        hidden, packed = self.run(x, [(None, drop_last)], masks, lengths, False, weights, convolve)
        return ops.gather_rows(hidden, packed.outputs[0])

    @torch.no_grad()
    def encoder(
        self, masks: Tensor | None = None, weights: Sequence[Tensor] | None = None, convolve: Convolution | None = None,
        precision: Precision = "fp32",
    ) -> EncodeUsers:  # fmt: skip
        """`represent` for many calls without gradient: what does not depend on the users is computed once.

        The compiled encoder runs where it serves these layers, packed rows elsewhere. Valid while the parameters, masks and
        weights keep their values.

        Args:
            masks: `[S, 1, f]`; None: nothing is masked.
            weights, convolve: as `layers`.
            precision: "fp32", or "bf16": activations are rounded to bfloat16 between layers.

        Returns:
            `encode(x, drop_last=0, lengths=None)`: `[B, f]` in the dtype of the parameters, float32 with "bf16".

        Raises:
            ConfigError: unknown precision. ShapeError: masks or weights do not fit.
        """
        if precision not in ("fp32", "bf16"):
            raise ConfigError(f"precision is {precision!r}, expected 'fp32' or 'bf16'")
        if weights is not None and len(weights) != self.num_sites:
            raise ShapeError(f"got weights of {len(weights)} convolutions, expected {self.num_sites}")
        if self._encoder_serves(convolve):
            compiled = Encoder(self, self.no_masks() if masks is None else masks, precision, weights)
            return lambda x, drop_last=0, lengths=None: compiled.encode(x.cpu(), 0, drop_last, lengths)

        @torch.no_grad()
        def encode(x: Tensor, drop_last: int = 0, lengths: np.ndarray | None = None) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
                hidden, packed = self.run(x, [(None, drop_last)], masks, lengths, False, weights, convolve)
            found = ops.gather_rows(hidden, packed.outputs[0])
            return found.float() if precision == "bf16" else found

        return encode

    def _encoder_serves(self, convolve: Convolution | None) -> bool:
        """Whether the compiled encoder runs these layers as they are, on this device and in this dtype."""
        kind = type(self)
        ordinary = convolve is None and kind.layers is Backbone.layers and kind.convolve is Backbone.convolve
        return ordinary and Encoder.serves(self)

    def positions(
        self, x: Tensor, masks: Tensor | None = None, lengths: np.ndarray | None = None,
        weights: Sequence[Tensor] | None = None, convolve: Convolution | None = None,
    ) -> PackedPositions:  # fmt: skip
        """States of every position under one set of masks `[S, 1, f]`, equal pad states merged. Arguments as `run`."""
        hidden, packed = self.run(x, [(None, 0)], masks, lengths, True, weights, convolve)
        return PackedPositions(hidden, packed.outputs[0])

    def states(
        self, x: Tensor, packed: packing.PackedBatch, masks: Tensor, weights: Sequence[Tensor] | None = None,
        convolve: Convolution | None = None,
    ) -> Tensor:  # fmt: skip
        """Rows of the last layer, `[rows, f]`; `packed.outputs` are the rows of each request.

        Args:
            x: int64 `[B, L]`, the sequences that `packed` was made for.
            packed: the tables of the pass, from `pack`.
            masks: `[S, requests, f]`.
            weights, convolve: as `layers`.
        """
        check_items(x)
        if masks.shape[0] != self.num_sites:
            raise ShapeError(f"masks have {masks.shape[0]} sites, expected {self.num_sites}")
        hidden = self.embeding.rows(transfers.to_device(x, self.device).reshape(-1)[packed.cells])
        for rows in self.layers(hidden, masks, packed, weights, convolve):
            hidden = rows
        return hidden

    def layers(
        self, hidden: Tensor, masks: Tensor, packed: packing.PackedBatch, weights: Sequence[Tensor] | None = None,
        convolve: Convolution | None = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Rows of every layer above the embedding.

        Args:
            hidden: `[rows of layer 0, f]`.
            masks: `[S, requests, f]`.
            packed: the tables of the pass.
            weights: S tensors `[f, f, 1, K]`, used in place of the convolutions' own (masked weights, for example).
            convolve: runs each convolution in place of `self.convolve`.

        Yields:
            `[rows of the layer, f]`.
        """
        run = self.convolve if convolve is None else convolve
        given: Sequence[Tensor | None] = [None] * self.num_sites if weights is None else weights
        if len(given) != self.num_sites:
            raise ShapeError(f"got weights of {len(given)} convolutions, expected {self.num_sites}")
        for i, residual in enumerate(packed.residuals):
            first, second = packed.convolutions[2 * i : 2 * i + 2]
            inner = run(2 * i, hidden, masks[2 * i], first, weight=given[2 * i])
            yield inner
            hidden = run(2 * i + 1, inner, masks[2 * i + 1], second, hidden, residual, given[2 * i + 1])
            yield hidden

    def site(self, number: int) -> tuple[nn.Conv2d, nn.LayerNorm]:
        """The convolution of a site, counted from 0 in network order, and the LayerNorm of its output."""
        block = self.blocks[number // 2]
        return (block.conv2, block.ln2) if number % 2 else (block.conv1, block.ln1)

    def convolve(
        self, site: int, x: Tensor, mask: Tensor, table: packing.TapTable, residual: Tensor | None = None,
        residual_table: packing.ResidualTable | None = None, weight: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """One convolution with LayerNorm, ReLU, mask and residual, see `ops.masked_conv`.

        Args:
            site: which, counted from 0 in network order.
            x: `[rows of the layer below, f]`. mask: `[requests, f]`. table: which rows each output row reads.
            residual, residual_table: of a block's second convolution: the block's input, and which of its rows to add.
            weight: `[f, f, 1, K]` in place of the convolution's own.
        """
        conv, norm = self.site(site)
        assert conv.bias is not None
        return ops.masked_conv(
            x, (conv.weight if weight is None else weight).squeeze(2), conv.bias, norm.weight, norm.bias, mask, table,
            residual=residual, residual_table=residual_table, eps=norm.eps, backend=self.backend,
            algorithm=self.algorithm,
        )  # fmt: skip
