"""Packed rows: which (user, mask, position) states are really needed, and which rows each convolution reads.

Activations of the fast path are `[rows, channels]`. A row is one state that some output depends on. Two facts make the
number of rows small without changing any result:

* Receptive-field cone. If only the last position is used, layer `l` needs only the offsets from the end that the layers
  above it read.
* Shared pad prefix. The state at a left pad depends on the position and the mask alone, so all users of one mask share
  one chain of pad rows.

Everything follows from arithmetic on the users' real lengths, so row counts are known on the host and nothing here looks
at activations. Numbers per user and per offset are computed here; `ops.pack` fills the tables, which have an entry per row.

Vocabulary: an *offset* counts positions back from a sequence's last position; a *stream* is one user under one mask; a
*chain* is the pad prefix that the streams of one request share. Streams and chains are both spans of offsets `[low, high)`;
each span owns consecutive rows, ordered by offset, in every layer.
"""

from __future__ import annotations

from teracon_fast.packing.geometry import ConvGeometry, Geometry, geometry
from teracon_fast.packing.rows import Layer, Plan, Spans, plan, real_lengths
from teracon_fast.packing.types import IntArray, PackedBatch, ResidualTable, Streams, TapTable

__all__ = [
    "ConvGeometry", "Geometry", "IntArray", "Layer", "PackedBatch", "Plan", "ResidualTable", "Spans", "Streams",
    "TapTable", "geometry", "plan", "real_lengths",
]  # fmt: skip
