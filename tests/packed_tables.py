"""Random passes for the packer, and equality of the tables that it builds for them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from teracon_fast import packing
from teracon_fast.packing import PackedBatch, Streams

Pass = tuple[np.ndarray, list[Streams], packing.Geometry]


@st.composite
def passes(draw: st.DrawFn, longest: int = 40, blocks: int = 4) -> Pass:
    """Arguments of `ops.pack`."""
    length, batch = draw(st.integers(1, longest)), draw(st.integers(0, 8))
    dilations = draw(st.lists(st.integers(1, 9), max_size=blocks))
    geometry = packing.geometry(length, tuple(dilations), draw(st.integers(2, 5)), draw(st.booleans()))
    lengths = draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch))
    users = st.lists(st.integers(0, batch - 1), max_size=12) if batch else st.just([])
    chosen = draw(st.lists(st.tuples(users, st.integers(0, length - 1)), max_size=3))
    return np.array(lengths, np.int64), [Streams(np.array(u, np.int64), drop) for u, drop in chosen], geometry


def tensors(packed: PackedBatch) -> Iterator[Tensor]:
    """All tables of a batch, one after the other."""
    yield packed.cells
    yield from packed.outputs
    for table in packed.convolutions:
        yield from (table.taps, table.readers, table.bag_rows, table.bag_offsets, table.row_ends)
    for residual in packed.residuals:
        yield from residual


def assert_same(result: PackedBatch, expected: PackedBatch) -> None:
    """The same numbers in dense tables, bit by bit."""
    assert len(result.outputs) == len(expected.outputs)
    for one, other in zip(tensors(result), tensors(expected), strict=True):
        assert one.is_contiguous()
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    for table, other_table in zip(result.convolutions, expected.convolutions, strict=True):
        assert table.rows_per_request == other_table.rows_per_request and table.rows_in == other_table.rows_in
