"""Packed rows: which (user, mask, position) states are really needed, and which rows each convolution reads.

Activations of the fast path are `[rows, channels]`. A row is one state that some output depends on. Two facts make the
number of rows small without changing any result:

* Receptive-field cone. If only the last position is used, layer `l` needs only the offsets from the end that the layers
  above it read.
* Shared pad prefix. The state at a left pad depends on the position and the mask alone, so all users of one mask share
  one chain of pad rows.

Everything follows from arithmetic on the users' real lengths, so row counts are known on the host and nothing here looks
at activations. Numbers per user and per offset are worked out here; the tables, with an entry per row, are filled by the
compiled extension or, where it is missing, by `_numpy_packing`; or on a GPU, by `kernels.packing`.

Vocabulary: an *offset* counts positions back from a sequence's last position; a *stream* is one user under one mask; a
*chain* is the pad prefix that the streams of one request share. Streams and chains are both spans of offsets `[low, high)`;
each span owns consecutive rows, ordered by offset, in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from teracon_fast.errors import ShapeError
from teracon_fast.ops import backends, native
from teracon_fast.packing import buckets, numpy_tables, transfers

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class TapTable:
    """Which rows one convolution reads, forward and backward.

    A padded table (see `padding.pad`) has more rows and bags than the batch needs: nothing reads them.

    Attributes:
        taps: int32 `[rows_out, K]`. `taps[r, k]` is the input row that tap `k` of output row `r` reads; -1 reads zeros.
        readers: int32 `[rows_in, K]`. `readers[r, k]` is the output row that reads input row `r` through tap `k`; -1 none;
            `rows_out + b` stands for the sum over the output rows of bag `b`, for pad rows that several rows read.
        bag_rows: int32 `[sum of bag sizes]`, output rows of all bags, ascending in each; with padding, more behind them.
        bag_offsets: int32 `[bags + 1]`, start of each bag in `bag_rows`.
        rows_per_request: number of consecutive output rows of each request; one mask serves a request's rows. Padding counts
            to the last request, so that they sum to all rows.
        row_ends: int32 `[requests]`, where the tables are: behind the last row of each request, without padding.
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
    def tensors(self) -> tuple[Tensor, ...]:
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
        """The same tables on another device; from the host to a GPU by one copy, and without waiting for the GPU."""
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
        """All tensors of all tables; one that several share comes several times."""
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
        """Number of (row, convolution) outputs that the pass computes, padding too. Dense: `streams * L * convolutions`."""
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


class TableForm(NamedTuple):
    """What a table of the network depends on. Equal tables are built once."""

    lookups: ConvGeometry
    inputs: int  # numbers of the layers that it reads and makes, among the distinct ones
    outputs: int
    dilation: int


@dataclass(frozen=True, eq=False)
class Geometry:
    """Offsets that every layer must produce, for one length, network and kind of output. Layer 0 is the embedding.

    Equal to itself only, and hashable: `geometry` returns the same one for the same arguments.
    """

    length: int
    kernel_size: int
    dilations: tuple[int, ...]  # one per convolution
    every_position: bool
    offsets: tuple[IntArray, ...]
    ranks: tuple[IntArray, ...]  # ranks[l][o] = number of offsets of layer l below o, for o in 0..length
    convolutions: tuple[ConvGeometry, ...]
    residuals: tuple[ConvGeometry, ...]  # a block's input is read through one tap that stays at the row's own offset

    @cached_property
    def layer_numbers(self) -> tuple[int, ...]:
        """Of each layer its number among the distinct ones: neighbours with the same offsets are one."""
        new = [i == 0 or offsets is not self.offsets[i - 1] for i, offsets in enumerate(self.offsets)]
        return tuple(int(number) - 1 for number in np.cumsum(new))

    @cached_property
    def distinct_layers(self) -> tuple[int, ...]:
        """One layer of each number."""
        return tuple(self.layer_numbers.index(number) for number in range(self.layer_numbers[-1] + 1))

    @cached_property
    def rank_table(self) -> IntArray:
        """Ranks of the distinct layers, int32 `[layers, L + 1]`."""
        return np.stack([self.ranks[layer] for layer in self.distinct_layers])

    @cached_property
    def tables(self) -> tuple[list[TableForm], list[int], list[int]]:
        """The distinct tables, and which of them each convolution and each residual block has."""
        forms: dict[tuple[int, int, int], TableForm] = {}

        def key(lookups: ConvGeometry, i: int, o: int, dilation: int) -> tuple[int, int, int]:
            form = TableForm(lookups, self.layer_numbers[i], self.layer_numbers[o], dilation)
            forms.setdefault(form[1:], form)
            return form[1:]

        convolutions = [key(conv, i, i + 1, self.dilations[i]) for i, conv in enumerate(self.convolutions)]
        residuals = [key(conv, 2 * i, 2 * i + 2, 0) for i, conv in enumerate(self.residuals)]
        numbers = {found: number for number, found in enumerate(forms)}
        return list(forms.values()), [numbers[k] for k in convolutions], [numbers[k] for k in residuals]


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

    def __init__(
        self, offsets: IntArray, rank: IntArray, counts: IntArray, start: IntArray, request_ends: IntArray,
        rows_per_request: Sequence[int],
    ) -> None:  # fmt: skip
        self.rows = sum(rows_per_request)
        if self.rows >= 2**31:
            raise ShapeError(f"packed batch has {self.rows} rows, expected less than 2**31: encode fewer users at once")
        # Row of (span, offset) = start[span] + rank[offset].
        self.start = start
        self.request_ends, self.rows_per_request = request_ends, tuple(rows_per_request)
        self.offsets, self.rank, self._counts = offsets, rank, counts

    @cached_property
    def row_ends(self) -> Tensor:
        """int32 `[requests]`, behind the last row of each request."""
        return torch.from_numpy(self.request_ends)

    @cached_property
    def spans_and_places(self) -> tuple[IntArray, IntArray]:
        """For each row its span and its place, int32 `[rows]` each. Only numpy needs them."""
        span = np.repeat(np.arange(len(self._counts), dtype=np.int32), self._counts)
        return span, np.arange(self.rows, dtype=np.int32) - self.start[span]


def _layers(spans: Spans, geo: Geometry) -> list[Layer]:
    """The distinct layers: numbers of all of them are worked out at once."""
    ranks = geo.rank_table
    below = ranks.take(spans.low, axis=1)
    counts = ranks.take(spans.high, axis=1) - below
    ends = np.cumsum(counts, axis=1, dtype=np.int64)
    start = (ends - counts - below).astype(np.int32)
    request_ends = ends.take(np.array(spans.request_ends, dtype=np.int64) - 1, axis=1)
    rows = np.diff(request_ends, prepend=0, axis=1).tolist()
    parts = zip(geo.distinct_layers, ranks, counts, start, request_ends.astype(np.int32), rows, strict=True)
    return [Layer(geo.offsets[layer], *of_layer) for layer, *of_layer in parts]


def _tap_table(spans: Spans, geo: ConvGeometry, inputs: Layer, outputs: Layer) -> TapTable:
    if native.available():
        lookups = (spans.table, inputs.rank, outputs.rank, geo.read_offset, geo.reader_offset)
        tensors = torch.ops.teracon_fast.pack_taps(*map(torch.from_numpy, lookups), torch.get_num_threads())
    else:
        tensors = map(torch.from_numpy, numpy_tables.taps(spans, geo, inputs, outputs))
    taps, readers, bag_rows, bag_offsets = tensors
    return TapTable(taps, readers, bag_rows, bag_offsets, outputs.rows_per_request, outputs.row_ends, inputs.rows)


def _cells(spans: Spans, first: Layer, length: int) -> Tensor:
    if native.available():
        cells: Tensor = torch.ops.teracon_fast.pack_cells(*map(torch.from_numpy, (spans.table, spans.user, first.rank)))
        return cells
    return torch.from_numpy(numpy_tables.cells(spans, first, length))


def pack(
    lengths: npt.NDArray[np.int64], requests: Sequence[Streams], geo: Geometry, device: torch.device | None = None,
    backend: str = "auto", padded: bool = False,
) -> PackedBatch:  # fmt: skip
    """Build the tables of one packed pass. Never waits for the device.

    Args:
        lengths: int64 `[B]`, real length of every row of `x` (see `real_lengths`), at most `geo.length`.
        requests: one entry per (mask, set of users); request `i` uses mask `i` of each site.
        geo: from `geometry(...)`.
        device: where the tables shall be; None for the host.
        backend: "triton" builds them there, by `kernels.packing`; every other one on the host. The numbers are the same.
        padded: whether tables have the sizes of the batch's bucket, see `padding.pad`.

    Raises:
        ShapeError: for lengths, users or drop_last outside their range.
        BackendError: when an explicitly requested backend is not available for this device.
    """
    lengths = np.asarray(lengths)
    if lengths.ndim != 1 or (len(lengths) and not (0 <= lengths.min() and lengths.max() <= geo.length)):
        raise ShapeError(f"lengths must be one number in 0..{geo.length} per sequence, got {lengths!r}")
    for i, request in enumerate(requests):
        users = request.users
        if len(users) and not (0 <= users.min() and users.max() < len(lengths)):
            raise ShapeError(f"request {i} names users {users.min()}..{users.max()}, expected 0..{len(lengths) - 1}")
    device = torch.device("cpu") if device is None else device
    chosen = backends.resolve(backend, "packing", device)
    spans = Spans(lengths, requests, geo.length)
    layers = _layers(spans, geo)
    outputs = [_output_rows(spans, layers[-1], geo, part) for part in spans.stream_slices]
    if chosen == "triton":
        from teracon_fast.kernels import packing as kernels

        return kernels.pack(spans, layers, outputs, geo, device, padded)
    forms, convolutions, residuals = geo.tables
    tables = [_tap_table(spans, form.lookups, layers[form.inputs], layers[form.outputs]) for form in forms]
    added = {n: ResidualTable(tables[n].taps.view(-1), tables[n].readers.view(-1)) for n in residuals}
    packed = PackedBatch(
        _cells(spans, layers[0], geo.length),
        [tables[number] for number in convolutions],
        [added[number] for number in residuals],
        [torch.from_numpy(rows) for rows in outputs],
    )
    return (buckets.pad(packed) if padded else packed).to(device)


def _output_rows(spans: Spans, last: Layer, geo: Geometry, streams: slice) -> npt.NDArray[np.int64]:
    """Rows of a request's outputs: the last position's, or those of positions 0..L-1 in order."""
    available = int(spans.total[streams.start - 1])
    offsets = np.arange(available - 1, -1, -1, dtype=np.int32) if geo.every_position else np.zeros(1, np.int32)
    own = offsets[None, :] < spans.high[streams][:, None]
    start = np.where(own, last.start[streams][:, None], last.start[spans.chain[streams]][:, None])
    rows = (start + geo.ranks[-1][offsets][None, :]).astype(np.int64)
    return rows if geo.every_position else rows[:, 0]
