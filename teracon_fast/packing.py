"""Packed rows: which (user, mask, position) states are really needed, and which rows each convolution reads.

Activations of the fast path are `[rows, channels]`. A row is one state that some output depends on. Two facts make the
number of rows small without changing any result:

* Receptive-field cone. If only the last position is used, layer `l` needs only the offsets from the end that the layers
  above it read.
* Shared pad prefix. The state at a left pad depends on the position and the mask alone, so all users of one mask share
  one chain of pad rows.

Everything follows from arithmetic on the users' real lengths, so row counts are known on the host and nothing here looks
at activations. Numbers per user and per offset are worked out here; the tables, with an entry per row, are filled by the
compiled extension or, where it is missing, by `_numpy_packing`.

Vocabulary: an *offset* counts positions back from a sequence's last position; a *stream* is one user under one mask; a
*chain* is the pad prefix that the streams of one request share. Streams and chains are both spans of offsets `[low, high)`;
each span owns consecutive rows, ordered by offset, in every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from teracon_fast import _native, _numpy_packing
from teracon_fast.errors import ShapeError

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class TapTable:
    """Which rows one convolution reads, forward and backward.

    Attributes:
        taps: int32 `[rows_out, K]`. `taps[r, k]` is the input row that tap `k` of output row `r` reads; -1 reads zeros.
        readers: int32 `[rows_in, K]`. `readers[r, k]` is the output row that reads input row `r` through tap `k`; -1 none;
            `rows_out + b` stands for the sum over the output rows of bag `b`, for pad rows that several rows read.
        bag_rows: int32 `[sum of bag sizes]`, output rows of all bags, ascending in each.
        bag_offsets: int32 `[bags + 1]`, start of each bag in `bag_rows`.
        rows_per_request: number of consecutive output rows of each request; one mask serves a request's rows.
        row_ends: int32 `[requests]`, the same where the tables are: behind the last row of each request.
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
        return replace(
            self,
            taps=self.taps.to(device, non_blocking=True),
            readers=self.readers.to(device, non_blocking=True),
            bag_rows=self.bag_rows.to(device, non_blocking=True),
            bag_offsets=self.bag_offsets.to(device, non_blocking=True),
            row_ends=self.row_ends.to(device, non_blocking=True),
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
        """The same tables on another device."""
        return PackedBatch(
            self.cells.to(device, non_blocking=True),
            [table.to(device) for table in self.convolutions],
            [ResidualTable(t.rows.to(device), t.readers.to(device)) for t in self.residuals],
            [rows.to(device) for rows in self.outputs],
        )

    @property
    def convolution_rows(self) -> int:
        """Number of (row, convolution) outputs that the pass computes; the dense count is `streams * L * convolutions`."""
        return sum(table.taps.shape[0] for table in self.convolutions)


class Streams(NamedTuple):
    """One request to the packer: rows of `x` (int64 `[n]`) and how many items to drop from the end of each sequence."""

    users: npt.NDArray[np.int64]
    drop_last: int = 0


@dataclass(frozen=True)
class ConvGeometry:
    """Static lookups of one convolution, indexed by tap and by a row's place (its rank among the layer's offsets)."""

    read_offset: IntArray  # [K, |O_out|] offset read by each tap
    read_rank: IntArray  # [K, |O_out|] its rank in the input layer
    reader_offset: IntArray  # [K, |O_in|] offset of the reader through each tap, -1 where there is none
    reader_rank: IntArray  # [K, |O_in|] its rank in the output layer


@dataclass(frozen=True)
class Geometry:
    """Offsets that every layer must produce, for one length, network and kind of output. Layer 0 is the embedding."""

    length: int
    kernel_size: int
    dilations: tuple[int, ...]  # one per convolution
    every_position: bool
    offsets: tuple[IntArray, ...]
    ranks: tuple[IntArray, ...]  # ranks[l][o] = number of offsets of layer l below o, for o in 0..length
    convolutions: tuple[ConvGeometry, ...]
    residuals: tuple[ConvGeometry, ...]  # a block's input is read through one tap that stays at the row's own offset


@lru_cache(maxsize=64)
def geometry(length: int, block_dilations: tuple[int, ...], kernel_size: int = 3, every_position: bool = False) -> Geometry:
    """Walk the network backwards from its outputs and list the offsets that each layer must produce.

    Args:
        length: sequence length L, at least 1.
        block_dilations: dilation d of each residual block; its convolutions have dilations d and 2d.
        kernel_size: K, at least 2.
        every_position: whether all positions are outputs (task 1) or the last one only.

    Raises:
        ShapeError: for a length, dilation or kernel size that is not valid.
    """
    if length < 1:
        raise ShapeError(f"sequence length is {length}, expected at least 1")
    if kernel_size < 2:
        raise ShapeError(f"kernel_size is {kernel_size}, expected at least 2")
    if any(d < 1 for d in block_dilations):
        raise ShapeError(f"dilations are {block_dilations}, expected all at least 1")
    dilations = tuple(d * factor for d in block_dilations for factor in (1, 2))
    every = np.arange(length, dtype=np.int32)
    layers = [every if every_position else np.zeros(1, np.int32)]
    for dilation in reversed(dilations):
        reach = np.unique(np.add.outer(layers[0], np.arange(kernel_size, dtype=np.int32) * dilation))
        reach = reach[reach < length].astype(np.int32)
        # Equal sets become one object, so that equal tables are built once.
        layers.insert(0, layers[0] if np.array_equal(reach, layers[0]) else reach)
    ranks: list[IntArray] = []
    for layer, offsets in enumerate(layers):
        if layer and offsets is layers[layer - 1]:
            ranks.append(ranks[-1])
        else:
            ranks.append(np.searchsorted(offsets, np.arange(length + 1)).astype(np.int32))
    convolutions = tuple(
        _convolution_geometry(layers[i], ranks[i], layers[i + 1], ranks[i + 1], d, kernel_size, length)
        for i, d in enumerate(dilations)
    )
    residuals = tuple(
        _convolution_geometry(layers[i], ranks[i], layers[i + 2], ranks[i + 2], 0, 1, length)
        for i in range(0, len(dilations), 2)
    )
    return Geometry(length, kernel_size, dilations, every_position, tuple(layers), tuple(ranks), convolutions, residuals)


def _locate(wanted: IntArray, offsets: IntArray, rank: IntArray) -> tuple[IntArray, IntArray]:
    """The wanted offsets, -1 where `offsets` lacks them, and their ranks in `offsets` (0 where lacking)."""
    present = np.isin(wanted, offsets)
    safe = np.where(present, wanted, 0)
    return np.where(present, wanted, -1).astype(np.int32), np.where(present, rank[safe], 0).astype(np.int32)


def _convolution_geometry(
    o_in: IntArray, rank_in: IntArray, o_out: IntArray, rank_out: IntArray, dilation: int, kernel_size: int, length: int
) -> ConvGeometry:
    shifts = (np.arange(kernel_size - 1, -1, -1, dtype=np.int32) * dilation)[:, None]
    read_offset = o_out + shifts
    reader_offset, reader_rank = _locate(o_in - shifts, o_out, rank_out)
    return ConvGeometry(read_offset, rank_in[np.minimum(read_offset, length)], reader_offset, reader_rank)


def real_lengths(x: Tensor) -> npt.NDArray[np.int64]:
    """Number of positions from each sequence's first real item (id not 0) to its end; 0 for all pads.

    Args:
        x: int64 `[B, L]` on any device (a device tensor is copied to the host, which waits for the device).
    """
    real = x.detach().cpu().numpy() != 0
    length = real.shape[1]
    if length == 0:
        return np.zeros(real.shape[0], np.int64)
    return np.where(real.any(axis=1), length - real.argmax(axis=1), 0).astype(np.int64)


class Spans:
    """Spans of offsets `[low, high)`: for each request its pad chain, then its streams.

    `table`, int32 `[4, spans]`, holds `low`, `high`, `chain` (which span is the request's chain) and `total` (how many
    offsets its sequences have); `user`, int64 `[spans]`, is a row of `x` with the span's items.
    """

    def __init__(self, lengths: npt.NDArray[np.int64], requests: Sequence[Streams], length: int) -> None:
        low, high, chain, total, user = [], [], [], [], []
        self.request_ends = []
        self.stream_slices = []
        count = 0
        for users, drop in requests:
            available = length - drop
            if available < 1:
                raise ShapeError(f"drop_last is {drop}, expected less than the sequence length {length}")
            real = np.maximum(lengths[users] - drop, 0)
            n = len(users)
            shortest = int(real.argmin()) if n else 0
            # The chain begins where the shortest stream ends; that stream's own cells hold its pad items.
            low += [np.array([real[shortest] if n else available]), np.zeros(n, np.int64)]
            high += [np.array([available]), real]
            user += [np.array([users[shortest] if n else 0]), users]
            chain.append(np.full(n + 1, count))
            total.append(np.full(n + 1, available))
            self.stream_slices.append(slice(count + 1, count + 1 + n))
            count += n + 1
            self.request_ends.append(count)
        self.table = np.zeros((4, count), np.int32)
        if count:
            self.table[:] = [np.concatenate(part) for part in (low, high, chain, total)]
        self.low, self.high, self.chain, self.total = self.table
        self.user = np.concatenate(user).astype(np.int64) if user else np.zeros(0, np.int64)


class Layer:
    """Rows of one layer."""

    def __init__(self, spans: Spans, offsets: IntArray, rank: IntArray) -> None:
        counts = rank[spans.high] - rank[spans.low]
        ends = np.cumsum(counts, dtype=np.int64)
        self.rows = int(ends[-1]) if len(ends) else 0
        if self.rows >= 2**31:
            raise ShapeError(f"packed batch has {self.rows} rows, expected less than 2**31: encode fewer users at once")
        # Row of (span, offset) = start[span] + rank[offset].
        self.start = (ends - counts - rank[spans.low]).astype(np.int32)
        bounds = ends[np.array(spans.request_ends, dtype=np.int64) - 1] if spans.request_ends else ends
        self.rows_per_request = tuple(int(n) for n in np.diff(bounds, prepend=0))
        self.row_ends = torch.from_numpy(bounds.astype(np.int32))
        self.offsets, self.rank, self._counts = offsets, rank, counts

    @cached_property
    def spans_and_places(self) -> tuple[IntArray, IntArray]:
        """For each row its span and its place, int32 `[rows]` each. Only numpy needs them."""
        span = np.repeat(np.arange(len(self._counts), dtype=np.int32), self._counts)
        return span, np.arange(self.rows, dtype=np.int32) - self.start[span]


def _tap_table(spans: Spans, geo: ConvGeometry, inputs: Layer, outputs: Layer) -> TapTable:
    if _native.available():
        lookups = (spans.table, inputs.rank, outputs.rank, geo.read_offset, geo.reader_offset)
        tensors = torch.ops.teracon_fast.pack_taps(*map(torch.from_numpy, lookups), torch.get_num_threads())
    else:
        tensors = map(torch.from_numpy, _numpy_packing.taps(spans, geo, inputs, outputs))
    taps, readers, bag_rows, bag_offsets = tensors
    return TapTable(taps, readers, bag_rows, bag_offsets, outputs.rows_per_request, outputs.row_ends, inputs.rows)


def _cells(spans: Spans, first: Layer, length: int) -> Tensor:
    if _native.available():
        cells: Tensor = torch.ops.teracon_fast.pack_cells(*map(torch.from_numpy, (spans.table, spans.user, first.rank)))
        return cells
    return torch.from_numpy(_numpy_packing.cells(spans, first, length))


def pack(lengths: npt.NDArray[np.int64], requests: Sequence[Streams], geo: Geometry) -> PackedBatch:
    """Build the tables of one packed pass.

    Args:
        lengths: int64 `[B]`, real length of every row of `x` (see `real_lengths`), at most `geo.length`.
        requests: one entry per (mask, set of users); request `i` uses mask `i` of each site.
        geo: from `geometry(...)`.

    Raises:
        ShapeError: for lengths, users or drop_last outside their range.
    """
    lengths = np.asarray(lengths)
    if lengths.ndim != 1 or (len(lengths) and not (0 <= lengths.min() and lengths.max() <= geo.length)):
        raise ShapeError(f"lengths must be one number in 0..{geo.length} per sequence, got {lengths!r}")
    for i, request in enumerate(requests):
        users = request.users
        if len(users) and not (0 <= users.min() and users.max() < len(lengths)):
            raise ShapeError(f"request {i} names users {users.min()}..{users.max()}, expected 0..{len(lengths) - 1}")
    spans = Spans(lengths, requests, geo.length)
    layers: list[Layer] = []
    for i, offsets in enumerate(geo.offsets):
        same = i > 0 and offsets is geo.offsets[i - 1]
        layers.append(layers[-1] if same else Layer(spans, offsets, geo.ranks[i]))
    built: dict[tuple[int, int, int], TapTable] = {}

    def table(conv: ConvGeometry, i: int, o: int, dilation: int) -> TapTable:
        key = (id(layers[i]), id(layers[o]), dilation)
        if key not in built:
            built[key] = _tap_table(spans, conv, layers[i], layers[o])
        return built[key]

    convolutions = [table(conv, i, i + 1, geo.dilations[i]) for i, conv in enumerate(geo.convolutions)]
    added = [table(conv, 2 * i, 2 * i + 2, 0) for i, conv in enumerate(geo.residuals)]
    residuals = [ResidualTable(one.taps.view(-1), one.readers.view(-1)) for one in added]
    outputs = [_output_rows(spans, layers[-1], geo, part) for part in spans.stream_slices]
    return PackedBatch(_cells(spans, layers[0], geo.length), convolutions, residuals, outputs)


def _output_rows(spans: Spans, last: Layer, geo: Geometry, streams: slice) -> Tensor:
    """Rows of a request's outputs: the last position's, or those of positions 0..L-1 in order."""
    available = int(spans.total[streams.start - 1])
    offsets = np.arange(available - 1, -1, -1, dtype=np.int32) if geo.every_position else np.zeros(1, np.int32)
    own = offsets[None, :] < spans.high[streams][:, None]
    start = np.where(own, last.start[streams][:, None], last.start[spans.chain[streams]][:, None])
    rows = (start + geo.ranks[-1][offsets][None, :]).astype(np.int64)
    return torch.from_numpy(rows if geo.every_position else rows[:, 0])
