"""NextItNet's dilated causal network on packed rows: item embedding and residual blocks, without masks or heads of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from teracon_fast import backends, ops, packing, transfers
from teracon_fast.deferred import Embedding
from teracon_fast.errors import ConfigError, ShapeError

LAYER_NORM_EPS = 1e-8


class ResidualBlock(nn.Module):
    """Parameters of one residual block, under the published names. `Backbone` runs it; it has no forward of its own."""

    def __init__(
        self, channels: int, kernel_size: int, dilation: int, num_tasks: int, relation_width: int | None,
        embedding_range: tuple[float, float],
    ) -> None:  # fmt: skip
        super().__init__()
        # Modules are built in the published order, so that one seed gives the published program's initial weights.
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
            `trainer.make_optimizer` sets it: most optimisers and `DistributedDataParallel` take only dense gradients. So
            copies of a model, which have no optimiser yet, begin with False too. While it is True, an optimiser may leave rows
            of the embedding behind (`optim.Adam`), and whatever hands out its weight brings them up to date first.

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
        backends.check_name(backend)  # an unknown name fails here, not in the first step
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
        """Where the item embedding is, and all else is expected."""
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
        """The tables of a pass over sequences of `length` positions, where the model is. Other arguments as `packing.pack`."""
        geometry = packing.geometry(length, self.dilations, self.kernel_size, every_position)
        return packing.pack(lengths, streams, geometry, self.device, self.backend, padded)

    def states(self, x: Tensor, packed: packing.PackedBatch, masks: Tensor) -> Tensor:
        """Rows of the last layer, `[rows, f]`; which of them belong to whom, `packed.outputs` tells.

        Args:
            x: int64 `[B, L]`, the sequences that `packed` was made for.
            packed: the tables of the pass, from `pack`.
            masks: `[S, requests, f]`, that of each request.
        """
        check_items(x)
        if masks.shape[0] != self.num_sites:
            raise ShapeError(f"masks have {masks.shape[0]} sites, expected {self.num_sites}")
        hidden = self.embeding.rows(transfers.to_device(x, self.device).reshape(-1)[packed.cells])
        for rows in self.layers(hidden, masks, packed):
            hidden = rows
        return hidden

    def layers(self, hidden: Tensor, masks: Tensor, packed: packing.PackedBatch) -> Iterator[Tensor]:
        """Rows of every layer above the embedding, one convolution after the other.

        Args:
            hidden: `[rows of layer 0, f]`.
            masks: `[S, requests, f]`.
            packed: the tables of the pass.

        Yields:
            `[rows of the layer, f]`.
        """
        for i, block in enumerate(self.blocks):
            first, second = packed.convolutions[2 * i : 2 * i + 2]
            inner = self._conv(hidden, block.conv1, block.ln1, masks[2 * i], first)
            yield inner
            hidden = self._conv(inner, block.conv2, block.ln2, masks[2 * i + 1], second, hidden, packed.residuals[i])
            yield hidden

    def _conv(
        self, x: Tensor, conv: nn.Conv2d, norm: nn.LayerNorm, mask: Tensor, table: packing.TapTable,
        residual: Tensor | None = None, residual_table: packing.ResidualTable | None = None,
    ) -> Tensor:  # fmt: skip
        assert conv.bias is not None
        return ops.masked_conv(
            x, conv.weight.squeeze(2), conv.bias, norm.weight, norm.bias, mask, table,
            residual=residual, residual_table=residual_table, eps=norm.eps, backend=self.backend,
            algorithm=self.algorithm,
        )  # fmt: skip
