"""The tables of `teracon_fast.packing` in numpy, without the compiled extension, which gives the same numbers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from teracon_fast.packing.geometry import ConvGeometry
from teracon_fast.packing.rows import Layer, Spans
from teracon_fast.packing.types import IntArray


def taps(spans: Spans, geo: ConvGeometry, inputs: Layer, outputs: Layer) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """One convolution's taps `[rows_out, K]`, readers `[rows_in, K]`, bag_rows and bag_offsets, all int32.

    See `teracon_fast.packing.TapTable` for their meaning.
    """
    kernel_size = len(geo.read_rank)
    (span_in, place_in), (span_out, place_out) = inputs.spans_and_places, outputs.spans_and_places
    # One tap at a time: numpy is several times faster on long vectors than on [rows, K] with a short last axis.
    taps = np.empty((outputs.rows, kernel_size), np.int32)
    readers = np.empty((inputs.rows, kernel_size), np.int32)
    own_start = inputs.start.take(span_out)
    chain_start = inputs.start.take(spans.chain).take(span_out)
    high, total = spans.high.take(span_out), spans.total.take(span_out)
    reader_start, low = outputs.start.take(span_in), spans.low.take(span_in)
    keys, members = [], []
    for k in range(kernel_size):
        offset = geo.read_offset[k].take(place_out)
        own, inside = offset < high, offset < total
        row = np.where(own, own_start, chain_start)
        row += geo.read_rank[k].take(place_out)
        taps[:, k] = np.where(inside, row, -1)
        # Streams that read into their chain: these pad rows have several readers through a tap.
        across = np.flatnonzero(inside > own)
        keys.append(row[across].astype(np.int64) * kernel_size + k)
        members.append(across)

        reader = reader_start + geo.reader_rank[k].take(place_in)
        # Offset -1 marks "no reader"; low is never below 0, so one comparison covers both cases.
        readers[:, k] = np.where(geo.reader_offset[k].take(place_in) < low, -1, reader)

    # Sum the readers of such pad rows bag by bag; the chain's own reader is a member too.
    key, member = np.concatenate(keys), np.concatenate(members)
    bags = np.unique(key)
    flat = readers.reshape(-1)
    chained = flat[bags]
    key = np.concatenate([bags[chained >= 0], key])
    member = np.concatenate([chained[chained >= 0], member])
    order = np.argsort(key * outputs.rows + member)  # unique numbers: by bag, then by row
    flat[bags] = outputs.rows + np.arange(len(bags), dtype=np.int32)
    bag_offsets = np.searchsorted(key[order], np.append(bags, np.iinfo(np.int64).max)).astype(np.int32)
    return taps, readers, member[order].astype(np.int32), bag_offsets


def cells(spans: Spans, first: Layer, length: int) -> npt.NDArray[np.int64]:
    """For each row of layer 0 the index into `x.reshape(-1)` of its item, int64 `[rows]`."""
    span, place = first.spans_and_places
    position = spans.total[span].astype(np.int64) - 1 - first.offsets[place]
    return spans.user[span] * length + position
