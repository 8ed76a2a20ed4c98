"""Tables padded to the sizes of a bucket give the results and gradients of those that are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from dense_check import ragged
from hypothesis import given, settings
from packed_tables import Pass, assert_same, passes
from torch import Tensor

from teracon_fast import FastTCN, Request, ops, packing
from teracon_fast.errors import ShapeError
from teracon_fast.ops import native
from teracon_fast.packing import PackedBatch, Streams, buckets


def small() -> PackedBatch:
    geometry = packing.geometry(9, (1, 4))
    return ops.pack(np.array([9, 0, 4, 9]), [Streams(np.arange(4)), Streams(np.array([2, 3]), 1)], geometry)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, 0), (1, 256), (256, 256), (257, 512), (1025, 1280), (1281, 1792), (2000, 2304)],
)
def test_buckets_are_multiples_of_256_a_quarter_apart(count: int, expected: int) -> None:
    assert buckets.rounded(count) == expected
    assert buckets.rounded(expected) == expected


def test_a_bucket_adds_a_quarter_at_most() -> None:
    for count in range(1, 100_000, 997):
        found = buckets.rounded(count)
        assert found % 256 == 0 and count <= found < 1.25 * count + 2 * 256


def test_neighbouring_batches_share_a_bucket_and_distant_ones_do_not() -> None:
    real = buckets.sizes(small())
    near = replace(real, rows=tuple(rows + 1 for rows in real.rows))
    assert buckets.bucket(near) == buckets.bucket(real) and hash(buckets.bucket(near)) == hash(buckets.bucket(real))
    assert buckets.bucket(replace(real, rows=(300, *real.rows[1:]))) != buckets.bucket(real)
    assert buckets.bucket(replace(real, outputs=((5,), (2,)))) != buckets.bucket(real)
    assert buckets.bucket(buckets.sizes(buckets.pad(small()))).rows == buckets.bucket(real).rows


def test_a_full_bucket_of_bags_still_gets_an_empty_one() -> None:
    assert [buckets.rounded_bags(count) for count in (0, 1, 255, 256)] == [0, 256, 256, 512]


@settings(max_examples=60, deadline=None)
@given(passes())
def test_what_is_added_reads_nothing_and_is_read_by_nothing(case: Pass) -> None:
    packed = ops.pack(*case)
    wanted = buckets.bucket(buckets.sizes(packed))
    result = buckets.pad(packed)
    assert buckets.sizes(result) == wanted
    assert_same(ops.pack(*case, padded=True), result)
    assert torch.equal(result.cells[: len(packed.cells)], packed.cells) and not result.cells[len(packed.cells) :].any()
    for table, real in zip(result.convolutions, packed.convolutions, strict=True):
        rows, more = len(real.taps), len(table.taps)
        assert torch.equal(table.taps[:rows], real.taps) and (table.taps[rows:] == -1).all()
        readers, rest = table.readers[: real.rows_in], table.readers[real.rows_in :]
        assert torch.equal(readers, torch.where(real.readers < rows, real.readers, real.readers - rows + more))
        assert (rest == -1).all() and table.rows_in == len(table.readers)
        assert torch.equal(table.bag_rows[: len(real.bag_rows)], real.bag_rows)
        added = table.bag_offsets[len(real.bag_offsets) :]
        assert torch.equal(table.bag_offsets[: len(real.bag_offsets)], real.bag_offsets)
        assert (added == len(real.bag_rows)).all() and (len(added) > 0 or len(table.bag_rows) == len(real.bag_rows))
        assert sum(table.rows_per_request) == more and torch.equal(table.row_ends, real.row_ends)
        assert table.rows_per_request[:-1] == real.rows_per_request[:-1]
    for both, one in zip(result.residuals, packed.residuals, strict=True):
        assert torch.equal(both.rows[: len(one.rows)], one.rows) and not both.rows[len(one.rows) :].any()
        assert torch.equal(both.readers[: len(one.readers)], one.readers) and (both.readers[len(one.readers) :] == -1).all()


def test_equal_tables_stay_one() -> None:
    geometry = packing.geometry(9, (1, 4) * 4, every_position=True)
    packed = ops.pack(np.array([3, 9]), [Streams(np.arange(2))], geometry, padded=True)
    assert len({id(table) for table in packed.convolutions}) == 4


@pytest.mark.parametrize(("backend", "dtype"), [("torch", torch.float64), ("cpu", torch.float32)])
def test_a_model_gives_the_same_results_and_gradients(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "cpu" and not native.available():
        pytest.skip(f"compiled extension: {native.missing_reason()}")
    x = ragged([9, 0, 4, 9, 7], 9)
    model = FastTCN(num_items=30, channels=8, labels=[30, 7], dilations=(1, 2), backend="torch").to(dtype)
    model.backend = backend
    parameters = [p for name, p in model.named_parameters() if "classifier.1" not in name]

    def results() -> list[Tensor]:
        # Users that share their pads, and with them one's first cell: what padding stands for.
        one, other = model.encode(x, [Request(1), Request(0, torch.tensor([2, 3, 0]), 1)], 2.0)
        loss = (one * torch.arange(1, 9)).sum() - other.square().sum() + model.next_item_loss(x, 2.0)
        return [one, other, loss, *torch.autograd.grad(loss, parameters)]

    expected, pack = results(), ops.pack
    seen: list[PackedBatch] = []

    def padded(*arguments: object) -> PackedBatch:
        seen.append(pack(*arguments[:-1], padded=True))
        return seen[-1]

    monkeypatch.setattr(ops, "pack", padded)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for found, value in zip(results(), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=tolerance, atol=tolerance)
    assert len(seen) == 2 and all(sizes % 256 == 0 for batch in seen for sizes in buckets.sizes(batch).rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda real: replace(real, rows=(real.rows[0] - 1, *real.rows[1:])), "cannot pad to .* expected at least"),
        (lambda real: replace(real, bags=real.bags[1:]), "cannot pad to"),
        (lambda real: replace(real, outputs=()), "the same outputs"),
        (lambda real: replace(real, rows=(2**31, *real.rows[1:])), r"less than 2\*\*31"),
        (lambda real: replace(real, members=(real.members[0] + 1, *real.members[1:])), "expected more bags too"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: Callable[[buckets.Sizes], buckets.Sizes], message: str) -> None:
    packed = small()
    with pytest.raises(ShapeError, match=message):
        buckets.pad(packed, change(buckets.sizes(packed)))


def test_a_batch_without_users_cannot_be_padded_to_rows() -> None:
    geometry = packing.geometry(4, (1,))
    empty = ops.pack(np.zeros(0, np.int64), [Streams(np.zeros(0, np.int64))], geometry, padded=True)
    assert empty.cells.shape == (0,)
    with pytest.raises(ShapeError, match="without users"):
        buckets.pad(empty, replace(buckets.sizes(empty), rows=(256, 256, 256)))
    with pytest.raises(ShapeError, match="too many to pad"):
        buckets.rounded(2**31 - 1)
    assert 2**30 <= buckets.rounded(2**30) < 2**31
