"""The tables of a packed pass in Triton, built on the device: the host sends lengths and counts, not tables.

All sizes are known on the host: rows from prefix sums over the spans, bags from a histogram of the streams' ends. A pad row at
offset o is read through a tap by the rows at one smaller offset r, of the streams that end between the two, r < high <= o. So
little needs to be sent, in one buffer.

Terms and meaning of the tables: see `teracon_fast.packing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from teracon_fast.errors import ShapeError
from teracon_fast.kernels.configs import Config
from teracon_fast.kernels.tiles import launch
from teracon_fast.packing import Geometry, Layer, PackedBatch, Plan, ResidualTable, Spans, TapTable, buckets, transfers
from teracon_fast.packing.transfers import dense

# Entries of a table, or streams of a bag's request, that a program handles in one step.
_SIZES = Config(rows=128, columns=1, depth=1, warps=4, stages=1)
# Programs that write the padding of a table.
_PADDERS = 8
# Alignment of the parts of a shared buffer, in int32.
_ALIGNMENT = transfers.ALIGNMENT // 4

# The record of a table, int64 `[tables, RECORD]`: numbers of its layers, where its lookups are, the row that its padding adds
# (-1: reads nothing); sizes without and with padding; where it is in memory, where its bags' offsets are, its first bag.
(KERNEL_SIZE, INPUTS, OUTPUTS, READS, BACKS, FILL, ROWS_IN, ROWS_OUT, MEMBERS, PADDED_IN, PADDED_OUT, PADDED_MEMBERS,
 TAPS_AT, READERS_AT, MEMBERS_AT, OFFSETS_AT, FIRST_BAG, RECORD) = (tl.constexpr(i) for i in range(18))  # fmt: skip


@triton.jit
def _fill(p_first, count, value, padder, PADDERS: tl.constexpr, BLOCK: tl.constexpr):
    """A program's share of filling `count` numbers of a table."""
    for done in range(padder * BLOCK, count, PADDERS * BLOCK):
        o = done + tl.arange(0, BLOCK)
        tl.store(p_first + o, tl.zeros([BLOCK], tl.int32) + value.to(tl.int32), mask=o < count)


@triton.jit(do_not_specialize=["count", "length"])
def tables_kernel(
    spans, starts, ranks, read_offsets, read_ranks, back_offsets, back_ranks, records, memory, count, length,
    PADDERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Taps and readers of one span's rows in one table, without bags; or, after the last span, a share of its padding."""
    span = tl.program_id(0)
    p_record = records + tl.program_id(1).to(tl.int64) * RECORD
    kernel_size = tl.load(p_record + KERNEL_SIZE)
    p_taps = memory + tl.load(p_record + TAPS_AT)
    p_readers = memory + tl.load(p_record + READERS_AT)
    if span < count:
        low, high = tl.load(spans + span), tl.load(spans + count + span)
        chain = tl.load(spans + count.to(tl.int64) * 2 + span)
        total = tl.load(spans + count.to(tl.int64) * 3 + span)
        inputs, outputs = tl.load(p_record + INPUTS), tl.load(p_record + OUTPUTS)
        p_starts_in, p_starts_out = starts + inputs * count, starts + outputs * count
        start_in, chain_in, start_out = tl.load(p_starts_in + span), tl.load(p_starts_in + chain), tl.load(p_starts_out + span)

        p_ranks = ranks + outputs * (length + 1)
        first = tl.load(p_ranks + low)
        entries = (tl.load(p_ranks + high) - first) * kernel_size
        o_lookup = tl.load(p_record + READS) + first * kernel_size
        o_table = (start_out + first).to(tl.int64) * kernel_size
        for done in range(0, entries, BLOCK):
            o = done + tl.arange(0, BLOCK)
            m = o < entries
            offset = tl.load(read_offsets + o_lookup + o, mask=m, other=0)
            row = tl.where(offset < high, start_in, chain_in) + tl.load(read_ranks + o_lookup + o, mask=m, other=0)
            tl.store(p_taps + o_table + o, tl.where(offset < total, row, -1), mask=m)

        p_ranks = ranks + inputs * (length + 1)
        first = tl.load(p_ranks + low)
        entries = (tl.load(p_ranks + high) - first) * kernel_size
        o_lookup = tl.load(p_record + BACKS) + first * kernel_size
        o_table = (start_in + first).to(tl.int64) * kernel_size
        for done in range(0, entries, BLOCK):
            o = done + tl.arange(0, BLOCK)
            m = o < entries
            # Offset -1 marks "no reader"; low is never below 0, so one comparison covers both cases.
            offset = tl.load(back_offsets + o_lookup + o, mask=m, other=-1)
            row = start_out + tl.load(back_ranks + o_lookup + o, mask=m, other=0)
            tl.store(p_readers + o_table + o, tl.where(offset < low, -1, row), mask=m)
    else:
        padder = (span - count).to(tl.int64)
        fill = tl.load(p_record + FILL)
        rows_in, rows_out = tl.load(p_record + ROWS_IN) * kernel_size, tl.load(p_record + ROWS_OUT) * kernel_size
        members = tl.load(p_record + MEMBERS)
        padded_in = tl.load(p_record + PADDED_IN) * kernel_size
        padded_out = tl.load(p_record + PADDED_OUT) * kernel_size
        _fill(p_taps + rows_out, padded_out - rows_out, fill, padder, PADDERS, BLOCK)
        _fill(p_readers + rows_in, padded_in - rows_in, fill * 0 - 1, padder, PADDERS, BLOCK)
        p_members = memory + tl.load(p_record + MEMBERS_AT)
        _fill(p_members + members, tl.load(p_record + PADDED_MEMBERS) - members, fill * 0, padder, PADDERS, BLOCK)


@triton.jit(do_not_specialize=["count"])
def bags_kernel(spans, starts, entries, bags, requests, offsets, records, memory, count, BLOCK: tl.constexpr):
    """The members of one bag, ascending, and its entry in the readers."""
    bag = tl.program_id(0)
    p_entry = entries + tl.load(bags + bag * 2).to(tl.int64) * 5
    request = tl.load(bags + bag * 2 + 1)
    p_record = records + tl.load(p_entry).to(tl.int64) * RECORD
    offset, reader = tl.load(p_entry + 1), tl.load(p_entry + 2)
    slot, rank = tl.load(p_entry + 3), tl.load(p_entry + 4)
    number = bag - tl.load(p_record + FIRST_BAG)
    p_members = memory + tl.load(p_record + MEMBERS_AT) + tl.load(offsets + tl.load(p_record + OFFSETS_AT) + number)
    p_starts_out = starts + tl.load(p_record + OUTPUTS) * count
    chain, end = tl.load(requests + request), tl.load(requests + request + 1)

    # The chain's own reader comes first: its row is before those of all streams.
    own = reader >= tl.load(spans + chain)
    tl.store(p_members, tl.load(p_starts_out + chain) + rank, mask=own)
    before = own.to(tl.int32)
    for first in range(chain + 1, end, BLOCK):
        o = first + tl.arange(0, BLOCK)
        high = tl.load(spans + count + o, mask=o < end, other=0)
        m = (reader < high) & (high <= offset)
        place = before + tl.cumsum(m.to(tl.int32), 0) - 1
        tl.store(p_members + place, tl.load(p_starts_out + o, mask=m, other=0) + rank, mask=m)
        before += tl.sum(m.to(tl.int32), 0)

    start_in = tl.load(starts + tl.load(p_record + INPUTS) * count + chain)
    p_reader = memory + tl.load(p_record + READERS_AT) + start_in * tl.load(p_record + KERNEL_SIZE) + slot
    tl.store(p_reader, (tl.load(p_record + PADDED_OUT) + number).to(tl.int32))


@triton.jit(do_not_specialize=["count", "rows_count", "padded_count"])
def cells_kernel(
    spans, starts, ranks, layer_offsets, origins, cells, count, rows_count, padded_count,
    PADDERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The cells of one span's rows in layer 0; after the last span, a share of the padding, which is cell 0."""
    span = tl.program_id(0)
    if span < count:
        first = tl.load(ranks + tl.load(spans + span))
        entries = tl.load(ranks + tl.load(spans + count + span)) - first
        origin = tl.load(origins + span)
        p_cells = cells + tl.load(starts + span).to(tl.int64) + first
        for done in range(0, entries, BLOCK):
            o = done + tl.arange(0, BLOCK)
            m = o < entries
            tl.store(p_cells + o, origin - tl.load(layer_offsets + first + o, mask=m, other=0), mask=m)
    else:
        added = padded_count - rows_count
        for done in range((span - count) * BLOCK, added, PADDERS * BLOCK):
            o = done + tl.arange(0, BLOCK)
            tl.store(cells + rows_count.to(tl.int64) + o, tl.zeros([BLOCK], tl.int64), mask=o < added)


class _Lookups(NamedTuple):
    """What depends on the geometry only."""

    ranks: Any  # int32 [layers, L + 1]
    offsets: Any  # int32, of layer 0
    read_offsets: Any  # int32, of each table `[places out, K]`, one after the other
    read_ranks: Any
    back_offsets: Any  # int32, of each table `[places in, K]`
    back_ranks: Any
    entries: Any  # int32 [E, 5]: where bags can be: table, offset, offset of the reader, place * K + tap, rank of the reader
    records: Any  # int64 [tables, FILL + 1], the first columns of the records


@lru_cache(maxsize=64)
def _lookups(geo: Geometry) -> _Lookups:
    """In numpy."""
    forms = geo.tables[0]
    kinds = [(c.read_offset, c.read_rank, c.reader_offset, c.reader_rank) for c in (form.lookups for form in forms)]
    flat = [[lookup.T.ravel() for lookup in kind] for kind in kinds]
    read_offsets, read_ranks, back_offsets, back_ranks = (
        np.concatenate([np.zeros(0, np.int32), *parts]) for parts in (zip(*flat, strict=True) if flat else [()] * 4)
    )
    entries, records = [], np.zeros((len(forms), FILL.value + 1), np.int64)
    reads = backs = 0
    for table, (form, (read, _, back, back_rank)) in enumerate(zip(forms, flat, strict=True)):
        kernel_size = len(form.lookups.read_rank)
        # A residual table has one tap, which stays at the row's own offset: its padding must name a row.
        fill = 0 if form.dilation == 0 else -1
        records[table] = kernel_size, form.inputs, form.outputs, reads, backs, fill
        reads, backs = reads + len(read), backs + len(back)
        offset = np.repeat(geo.offsets[geo.distinct_layers[form.inputs]], kernel_size)
        slot = np.flatnonzero((back >= 0) & (back < offset))
        entries.append(np.stack([np.full(len(slot), table), offset[slot], back[slot], slot, back_rank[slot]], axis=1))
    all_entries = np.concatenate([np.zeros((0, 5), np.int64), *entries]).astype(np.int32)
    return _Lookups(
        geo.rank_table, geo.offsets[0], read_offsets, read_ranks, back_offsets, back_ranks, all_entries, records
    )


@lru_cache(maxsize=64)
def _lookups_on(geo: Geometry, device: torch.device, stream: int) -> _Lookups:
    """On a device. One copy per stream, so that later launches need no synchronisation."""
    return _Lookups(*transfers.together(_lookups(geo), device))


class _Candidates(NamedTuple):
    """Where a batch with a number of requests can have bags, by table, then request, then place and tap."""

    entry: npt.NDArray[np.int32]
    request: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int32]
    reader: npt.NDArray[np.int32]
    at_offset: npt.NDArray[np.int64]  # index of (request, offset) in `[requests, L + 1]`
    at_reader: npt.NDArray[np.int64]
    bounds: npt.NDArray[np.int64]  # [tables + 1]


@lru_cache(maxsize=64)
def _candidates(geo: Geometry, requests: int) -> _Candidates:
    entries = _lookups(geo).entries
    bounds = np.searchsorted(entries[:, 0], np.arange(len(geo.tables[0]) + 1))
    parts = [np.arange(low, high) for low, high in zip(bounds, bounds[1:], strict=False)]
    entry = np.concatenate([np.zeros(0, np.int64), *(np.tile(part, requests) for part in parts)])
    request = np.concatenate([np.zeros(0, np.int64), *(np.repeat(np.arange(requests), len(part)) for part in parts)])
    offset, reader = entries[entry, 1], entries[entry, 2]
    at = request * (geo.length + 1)
    return _Candidates(
        entry.astype(np.int32), request.astype(np.int32), offset, reader, at + offset, at + reader, bounds * requests
    )


class _Bags(NamedTuple):
    places: npt.NDArray[np.int32]  # [bags, 2]: number of its entry in the lookups, and its request
    starts: npt.NDArray[np.int64]  # [bags + 1], in the members of all
    bounds: npt.NDArray[np.int64]  # [tables + 1], the first bag of each table


def _bags(spans: Spans, geo: Geometry, chains: npt.NDArray[np.int32]) -> _Bags:
    requests, width = len(spans.request_ends), geo.length + 1
    found = _candidates(geo, requests)
    first = chains[:-1]
    # Number of spans of a request that end at or before an offset. A chain ends after all these offsets.
    request = np.repeat(np.arange(requests), np.diff(chains))
    ended = np.bincount(request * width + spans.high, minlength=requests * width).reshape(requests, width).cumsum(axis=1)
    counts = ended.take(found.at_offset) - ended.take(found.at_reader)
    counts *= found.offset < spans.total[first].take(found.request)
    there = np.flatnonzero(counts)
    asking = found.request[there]
    sizes = counts[there] + (found.reader[there] >= spans.low[first].take(asking))
    starts = np.zeros(len(there) + 1, np.int64)
    np.cumsum(sizes, out=starts[1:])
    return _Bags(np.stack([found.entry[there], asking], axis=1), starts, np.searchsorted(there, found.bounds))


def _places(sizes: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], int]:
    """Aligned starts of parts of these sizes in a shared buffer of int32, and its size."""
    aligned = -(-sizes // _ALIGNMENT) * _ALIGNMENT
    return np.cumsum(aligned) - aligned, int(aligned.sum())


def _records(
    layers: Sequence[Layer], geo: Geometry, bags: _Bags, padded: bool
) -> tuple[npt.NDArray[np.int64], list[int], npt.NDArray[np.int32], int]:
    """Every table's record, its number of bags, the bags' offsets of all, and the size of all tables in int32."""
    forms = geo.tables[0]
    records = np.empty((len(forms), RECORD.value), np.int64)
    records[:, : FILL.value + 1] = _lookups(geo).records
    first, members = bags.bounds[:-1], np.diff(bags.starts[bags.bounds])
    rows = [layer.rows for layer in layers]
    real = np.array([[rows[form.inputs], rows[form.outputs]] for form in forms], np.int64).reshape(-1, 2)
    real = np.concatenate([real, members[:, None]], axis=1)
    found = np.diff(bags.bounds).tolist()
    records[:, ROWS_IN.value : MEMBERS.value + 1] = real
    sized = found
    if padded:
        sized = [buckets.rounded_bags(count) for count in found]
        real = np.array([buckets.rounded(count) for count in real.ravel().tolist()], np.int64).reshape(-1, 3)
    records[:, PADDED_IN.value : PADDED_MEMBERS.value + 1] = real
    if len(forms) and max(int(members.max()), int((real[:, 1] + sized).max())) >= 2**31:
        raise ShapeError("packed batch has 2**31 rows and bags, or members of bags, or more: encode fewer users at once")
    kernel_sizes = records[:, KERNEL_SIZE.value]
    numbers = np.stack([real[:, 1] * kernel_sizes, real[:, 0] * kernel_sizes, real[:, 2]], axis=1)
    places, size = _places(numbers.ravel())
    records[:, TAPS_AT.value : MEMBERS_AT.value + 1] = places.reshape(-1, 3)
    at, offsets_size = _places(np.array(sized, np.int64) + 1)
    records[:, OFFSETS_AT.value], records[:, FIRST_BAG.value] = at, first
    offsets = np.zeros(offsets_size, np.int32)
    for place, begin, count, more in zip(at.tolist(), first.tolist(), found, sized, strict=True):
        ends = bags.starts[begin : begin + count + 1] - bags.starts[begin]
        offsets[place : place + count + 1] = ends
        offsets[place + count + 1 : place + more + 1] = ends[-1]
    return records, sized, offsets, size


def pack(plan: Plan, device: torch.device, padded: bool = False) -> PackedBatch:
    """The tables of one packed pass on a device, without waiting for it: `ops.pack` with backend "triton".

    All tables are aligned views of three allocations: data from the host, the tables, the cells.

    Args:
        plan: spans, layers and outputs of the batch.
        padded: whether tables have the sizes of the batch's bucket, see `teracon_fast.packing.buckets`.

    Raises:
        ShapeError: for bags of 2^31 members and more in a table.
    """
    spans, layers, outputs, geo = plan
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    lookups = _lookups_on(geo, device, stream)
    chains = np.array([0, *spans.request_ends], np.int32)
    bags = _bags(spans, geo, chains)
    records, sized, offsets, memory_size = _records(layers, geo, bags, padded)
    requests, count = len(spans.request_ends), len(spans.low)
    row_ends = np.zeros((len(layers), -(-requests // _ALIGNMENT) * _ALIGNMENT), np.int32)
    row_ends[:, :requests] = [layer.request_ends for layer in layers]
    o_spans, o_starts, o_origins, o_chains, o_bags, o_offsets, o_row_ends, o_records, *o_outputs = transfers.together(
        [
            spans.table, np.stack([layer.start for layer in layers]), spans.user * geo.length + spans.total - 1, chains,
            bags.places, offsets, row_ends, records, *outputs,
        ],
        device,
    )  # fmt: skip
    rows = layers[0].rows
    padded_rows = buckets.rounded(rows) if padded else rows
    memory = torch.empty(memory_size, dtype=torch.int32, device=device)
    cells = torch.empty(padded_rows, dtype=torch.int64, device=device)
    programs = count + _PADDERS if padded else count
    launch(
        tables_kernel, (programs, len(records)), _SIZES, device, spans=o_spans, starts=o_starts, ranks=lookups.ranks,
        read_offsets=lookups.read_offsets, read_ranks=lookups.read_ranks, back_offsets=lookups.back_offsets,
        back_ranks=lookups.back_ranks, records=o_records, memory=memory, count=count, length=geo.length, PADDERS=_PADDERS,
        BLOCK=_SIZES.rows,
    )  # fmt: skip
    # After the readers, some of which it overwrites.
    launch(
        bags_kernel, (len(bags.places),), _SIZES, device, spans=o_spans, starts=o_starts, entries=lookups.entries, bags=o_bags,
        requests=o_chains, offsets=o_offsets, records=o_records, memory=memory, count=count, BLOCK=_SIZES.rows,
    )  # fmt: skip
    launch(
        cells_kernel, (programs,), _SIZES, device, spans=o_spans, starts=o_starts, ranks=lookups.ranks,
        layer_offsets=lookups.offsets, origins=o_origins, cells=cells, count=count, rows_count=rows,
        padded_count=padded_rows, PADDERS=_PADDERS, BLOCK=_SIZES.rows,
    )  # fmt: skip
    forms, convolutions, residuals = geo.tables
    built = []
    for form, record, of_table in zip(forms, records.tolist(), sized, strict=True):
        rows_in, rows_out, members = record[PADDED_IN.value : PADDED_MEMBERS.value + 1]
        kernel_size = record[KERNEL_SIZE.value]
        layer = layers[form.outputs]
        built.append(TapTable(
            dense(memory, (rows_out, kernel_size), record[TAPS_AT.value]),
            dense(memory, (rows_in, kernel_size), record[READERS_AT.value]),
            dense(memory, (members,), record[MEMBERS_AT.value]),
            dense(o_offsets, (of_table + 1,), record[OFFSETS_AT.value]),
            buckets.padded_rows(layer.rows_per_request, rows_out),
            dense(o_row_ends, (requests,), form.outputs * row_ends.shape[1]),
            rows_in,
        ))  # fmt: skip
    added = {n: ResidualTable(built[n].taps.view(-1), built[n].readers.view(-1)) for n in residuals}
    return PackedBatch(cells, [built[n] for n in convolutions], [added[n] for n in residuals], o_outputs)
