"""The compiled builders of packed tables fill the numbers that numpy fills, and never leave an array."""

from __future__ import annotations

import os
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_tables import Pass, assert_same, passes
from torch import Tensor

from teracon_fast import ops, packing
from teracon_fast.ops import native
from teracon_fast.packing import PackedBatch, Streams

pytestmark = pytest.mark.skipif(
    not native.available() and os.environ.get("TERACON_BUILD_EXT") != "1",
    reason=f"compiled extension: {native.missing_reason()}",
)


def in_numpy(lengths: np.ndarray, requests: list[Streams], geometry: packing.Geometry) -> PackedBatch:
    with mock.patch.object(native, "available", return_value=False):
        return ops.pack(lengths, requests, geometry)


@settings(max_examples=200, deadline=None)
@given(passes(), st.integers(1, 3))
def test_tables_equal_numpy(case: Pass, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = ops.pack(*case)
    finally:
        torch.set_num_threads(before)
    assert_same(result, in_numpy(*case))


@pytest.mark.parametrize("every_position", [False, True])
def test_tables_of_a_training_batch_equal_numpy(every_position: bool) -> None:
    lengths = np.random.default_rng(0).integers(0, 101, 300)
    requests = [Streams(np.arange(300)), Streams(np.arange(0, 300, 3), 1), Streams(np.zeros(0, np.int64))]
    geometry = packing.geometry(100, (1, 4) * 4, every_position=every_position)
    assert_same(ops.pack(lengths, requests, geometry), in_numpy(lengths, requests, geometry))


def test_equal_layers_share_their_table() -> None:
    packed = ops.pack(np.array([3, 9]), [Streams(np.arange(2))], packing.geometry(9, (1, 4) * 4, every_position=True))
    assert len({id(table) for table in packed.convolutions}) == 4  # of dilations 1, 2, 4 and 8


def arguments(**changes: Tensor) -> list[Tensor]:
    """What `pack_taps` takes for lengths 1 and 3 of 4, K = 2 and dilation 1, last position wanted; with some changed."""
    good = {
        "spans": torch.tensor([[1, 0, 0], [4, 1, 3], [0, 0, 0], [4, 4, 4]], dtype=torch.int32),
        "rank_in": torch.tensor([0, 1, 2, 2, 2], dtype=torch.int32),
        "rank_out": torch.tensor([0, 1, 1, 1, 1], dtype=torch.int32),
        "read_offset": torch.tensor([[1], [0]], dtype=torch.int32),
        "reader_offset": torch.tensor([[-1, 0], [0, -1]], dtype=torch.int32),
    }
    return list((good | changes).values())


def spans(change: tuple[int, int], value: int) -> Tensor:
    table = arguments()[0].clone()
    table[change] = value
    return table


def test_the_arguments_of_the_next_test_are_good_but_for_their_change() -> None:
    taps, readers, bag_rows, bag_offsets = torch.ops.teracon_fast.pack_taps(*arguments(), 1)
    # Rows of the input: the chain's offset 1, the first stream's 0, the second's 0 and 1.
    assert taps.tolist() == [[0, 1], [3, 2]]
    assert readers.tolist() == [[2, -1], [-1, 0], [-1, 1], [1, -1]]
    assert bag_rows.tolist() == [0] and bag_offsets.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spans": torch.zeros(3, 2, dtype=torch.int32)}, r"spans \[4, spans\]"),
        ({"spans": arguments()[0].long()}, "spans has 12 elements, expected a dense CPU tensor of 12 of type Int"),
        ({"spans": arguments()[0].T.contiguous().T}, "expected a dense CPU tensor"),
        ({"spans": spans((0, 1), -1)}, "span 1 has offsets -1 to 1 of 4"),
        ({"spans": spans((1, 1), 5)}, "span 1 has offsets 0 to 5 of 4, expected 0 <= low <= high <= total <= 4"),
        ({"spans": spans((3, 1), 5)}, "total <= 4"),
        ({"spans": spans((2, 1), 2)}, "span 1 names chain 2"),
        ({"spans": spans((2, 0), -1)}, "span 0 names chain -1"),
        ({"spans": spans((1, 1), 0)}, "span 1 ends at 0 of 4, but its chain has offsets 1 to 4"),
        ({"spans": spans((3, 1), 3)}, "span 1 ends at 1 of 3, but its chain has offsets 1 to 4"),
        ({"rank_in": torch.zeros(0, dtype=torch.int32)}, r"ranks \[length \+ 1\]"),
        ({"rank_in": torch.tensor([0, 1, 3, 3, 3], dtype=torch.int32)}, "rank_in is no count of offsets"),
        ({"rank_in": torch.tensor([1, 1, 2, 2, 2], dtype=torch.int32)}, "rank_in is no count of offsets"),
        ({"rank_out": torch.tensor([0, 1, 0, 0, 0], dtype=torch.int32)}, "rank_out is no count of offsets"),
        ({"rank_out": torch.tensor([0, 1, 1, 1], dtype=torch.int32)}, "rank_out has 4 elements, .* of 5"),
        ({"read_offset": torch.tensor([1, 0], dtype=torch.int32)}, r"read_offset \[K, offsets\]"),
        ({"read_offset": torch.zeros(2, 2, dtype=torch.int32)}, "read_offset has 4 elements, .* of 2"),
        ({"read_offset": torch.tensor([[2], [0]], dtype=torch.int32)}, "read_offset has offset 2, which its layer lacks"),
        ({"read_offset": torch.tensor([[-1], [0]], dtype=torch.int32)}, "read_offset has offset -1"),
        ({"reader_offset": torch.full((2, 2), 1, dtype=torch.int32)}, "reader_offset has offset 1, which its layer lacks"),
        ({"reader_offset": torch.full((2, 2), 4, dtype=torch.int32)}, "reader_offset has offset 4"),
        ({"reader_offset": torch.full((2, 2), -2, dtype=torch.int32)}, "reader_offset has offset -2"),
    ],
)
def test_what_would_leave_an_array_is_refused(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.teracon_fast.pack_taps(*arguments(**changes), 1)


@pytest.mark.parametrize("threads", [0, -1, 4097])
def test_a_bad_thread_count_is_refused(threads: int) -> None:
    with pytest.raises(RuntimeError, match=f"1 to 4096 threads, got {threads}"):
        torch.ops.teracon_fast.pack_taps(*arguments(), threads)


def test_cells_of_bad_users_are_refused() -> None:
    table, rank = arguments()[:2]
    with pytest.raises(RuntimeError, match="users has 2 elements, expected a dense CPU tensor of 3"):
        torch.ops.teracon_fast.pack_cells(table, torch.zeros(2, dtype=torch.int64), rank)
    with pytest.raises(RuntimeError, match="users has row -1 of x"):
        torch.ops.teracon_fast.pack_cells(table, torch.tensor([0, -1, 1]), rank)
