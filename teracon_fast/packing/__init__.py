"""Packed rows: which (user, mask, position) states are really needed, and the tables of what each convolution reads."""

from __future__ import annotations

from teracon_fast.packing.tables import (
    ConvGeometry,
    Geometry,
    IntArray,
    Layer,
    PackedBatch,
    ResidualTable,
    Spans,
    Streams,
    TapTable,
    geometry,
    pack,
    real_lengths,
)

__all__ = [
    "ConvGeometry",
    "Geometry",
    "IntArray",
    "Layer",
    "PackedBatch",
    "ResidualTable",
    "Spans",
    "Streams",
    "TapTable",
    "geometry",
    "pack",
    "real_lengths",
]
