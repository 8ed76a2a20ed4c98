"""Counts and places of the rows of every layer: arithmetic on the users' real lengths, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from teracon_fast.errors import ShapeError
from teracon_fast.packing.geometry import Geometry
from teracon_fast.packing.types import IntArray, Streams


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
        """int32 `[requests]`, end of each request's rows."""
        return torch.from_numpy(self.request_ends)

    @cached_property
    def spans_and_places(self) -> tuple[IntArray, IntArray]:
        """For each row its span and its place, int32 `[rows]` each. Only numpy needs them."""
        span = np.repeat(np.arange(len(self._counts), dtype=np.int32), self._counts)
        return span, np.arange(self.rows, dtype=np.int32) - self.start[span]


def _layers(spans: Spans, geo: Geometry) -> list[Layer]:
    """The distinct layers, all computed at once."""
    ranks = geo.rank_table
    below = ranks.take(spans.low, axis=1)
    counts = ranks.take(spans.high, axis=1) - below
    ends = np.cumsum(counts, axis=1, dtype=np.int64)
    start = (ends - counts - below).astype(np.int32)
    request_ends = ends.take(np.array(spans.request_ends, dtype=np.int64) - 1, axis=1)
    rows = np.diff(request_ends, prepend=0, axis=1).tolist()
    parts = zip(geo.distinct_layers, ranks, counts, start, request_ends.astype(np.int32), rows, strict=True)
    return [Layer(geo.offsets[layer], *of_layer) for layer, *of_layer in parts]


class Plan(NamedTuple):
    """What the tables of a pass are filled from: spans, the distinct layers of the geometry, rows of each request's outputs."""

    spans: Spans
    layers: list[Layer]
    outputs: list[npt.NDArray[np.int64]]
    geometry: Geometry


def plan(lengths: npt.NDArray[np.int64], requests: Sequence[Streams], geometry: Geometry) -> Plan:
    """Check the requests and count the rows of every layer. Arguments as `ops.pack`.

    Raises:
        ShapeError: for lengths, users or drop_last outside their range.
    """
    lengths = np.asarray(lengths)
    if lengths.ndim != 1 or (len(lengths) and not (0 <= lengths.min() and lengths.max() <= geometry.length)):
        raise ShapeError(f"lengths must be one number in 0..{geometry.length} per sequence, got {lengths!r}")
    for i, (users, _) in enumerate(requests):
        if len(users) and not (0 <= users.min() and users.max() < len(lengths)):
            raise ShapeError(f"request {i} names users {users.min()}..{users.max()}, expected 0..{len(lengths) - 1}")
    spans = Spans(lengths, requests, geometry.length)
    layers = _layers(spans, geometry)
    return Plan(spans, layers, [_output_rows(spans, layers[-1], geometry, part) for part in spans.stream_slices], geometry)


def _output_rows(spans: Spans, last: Layer, geo: Geometry, streams: slice) -> npt.NDArray[np.int64]:
    """Rows of a request's outputs: the last position's, or those of positions 0..L-1 in order."""
    available = int(spans.total[streams.start - 1])
    offsets = np.arange(available - 1, -1, -1, dtype=np.int32) if geo.every_position else np.zeros(1, np.int32)
    own = offsets[None, :] < spans.high[streams][:, None]
    start = np.where(own, last.start[streams][:, None], last.start[spans.chain[streams]][:, None])
    rows = (start + geo.ranks[-1][offsets][None, :]).astype(np.int64)
    return rows if geo.every_position else rows[:, 0]
