"""The tables of a packed pass, and requests for them. Terms as in `teracon_fast.packing`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from teracon_fast.packing import transfers

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class TapTable:
    """Which rows one convolution reads, forward and backward.

    A padded table (see `buckets.pad`) has more rows and bags than the batch needs: nothing reads them.

    Attributes:
        taps: int32 `[rows_out, K]`. `taps[r, k]` is the input row that tap `k` of output row `r` reads; -1 reads zeros.
        readers: int32 `[rows_in, K]`. `readers[r, k]` is the output row that reads input row `r` through tap `k`; -1 none;
            `rows_out + b`: the sum over the output rows of bag `b`, for pad rows with several readers.
        bag_rows: int32 `[sum of bag sizes]`, output rows of all bags, ascending in each; with padding, more behind them.
        bag_offsets: int32 `[bags + 1]`, start of each bag in `bag_rows`.
        rows_per_request: number of consecutive output rows of each request; one mask serves a request's rows. Padding belongs
            to the last request, so that they sum to all rows.
        row_ends: int32 `[requests]` on the tables' device, end of each request's rows, without padding.
        rows_in: number of input rows.
    """

    taps: Tensor
    readers: Tensor
    bag_rows: Tensor
    bag_offsets: Tensor
    rows_per_request: tuple[int, ...]
    row_ends: Tensor
    rows_in: int

    def to(self, device: torch.device) -> TapTable:
        """The same table on another device."""
        return self.mapped(partial(transfers.to_device, device=device))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Taps, readers, bag_rows, bag_offsets and row_ends."""
        return self.taps, self.readers, self.bag_rows, self.bag_offsets, self.row_ends

    def mapped(self, function: Callable[[Tensor], Tensor]) -> TapTable:
        """The same table with another tensor in place of each."""
        taps, readers, bag_rows, bag_offsets, row_ends = map(function, self.tensors)
        return replace(
            self, taps=taps, readers=readers, bag_rows=bag_rows, bag_offsets=bag_offsets, row_ends=row_ends
        )


class ResidualTable(NamedTuple):
    """Rows of a block's input that its output adds, and back.

    Attributes:
        rows: int32 `[rows_out]`.
        readers: int32 `[rows_in]`, the output row that adds each input row; -1 none.
    """

    rows: Tensor
    readers: Tensor


@dataclass(frozen=True)
class PackedBatch:
    """All tables of one packed pass.

    Attributes:
        cells: int64 `[rows of layer 0]`, index into `x.reshape(-1)` of the item of each input row.
        convolutions: one table per convolution, in network order.
        residuals: one table per residual block.
        outputs: one int64 tensor per request with rows of the last layer: `[n]` for the last position, `[n, L]` for all.
    """

    cells: Tensor
    convolutions: list[TapTable]
    residuals: list[ResidualTable]
    outputs: list[Tensor]

    def to(self, device: torch.device) -> PackedBatch:
        """The same tables on another device; from the host to a GPU in one copy, without waiting for the GPU."""
        if self.cells.device == device:
            return self
        if device.type == "cuda" and self.cells.device.type == "cpu":
            return self.copied(device)
        return self.mapped(lambda tensor: tensor.to(device))

    def copied(self, device: torch.device) -> PackedBatch:
        """Tables of the host copied to a device as parts of one buffer, see `transfers.together`."""
        found = {id(tensor): tensor for tensor in self.tensors()}
        copies = transfers.together([tensor.numpy() for tensor in found.values()], device)
        moved = dict(zip(found, copies, strict=True))
        return self.mapped(lambda tensor: moved[id(tensor)])

    def tensors(self) -> Iterator[Tensor]:
        """All tensors of all tables; shared ones several times."""
        yield self.cells
        yield from self.outputs
        yield from (tensor for table in self.convolutions for tensor in table.tensors)
        yield from (tensor for residual in self.residuals for tensor in residual)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> PackedBatch:
        """The same tables with another tensor in place of each."""
        tables = {id(table): table.mapped(function) for table in self.convolutions}
        return PackedBatch(
            function(self.cells),
            [tables[id(table)] for table in self.convolutions],
            [ResidualTable(*map(function, residual)) for residual in self.residuals],
            [function(rows) for rows in self.outputs],
        )

    @property
    def convolution_rows(self) -> int:
        """Number of (row, convolution) outputs that the pass computes, with padding. Dense: `streams * L * convolutions`."""
        return sum(table.taps.shape[0] for table in self.convolutions)


class Streams(NamedTuple):
    """One request to the packer: rows of `x` (int64 `[n]`) and how many items to drop from the end of each sequence."""

    users: npt.NDArray[np.int64]
    drop_last: int = 0
