"""Packed results and gradients equal the dense network's, for any lengths, masks, tasks and shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dense_check import assert_close, gradients, ragged, twins
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_tables import Pass, assert_same, passes, tensors

from teracon_fast import Request, ops, packing
from teracon_fast.errors import ShapeError
from teracon_fast.ops.backends import BackendError
from teracon_fast.packing import Streams

TTL_LENGTHS = [46, 12, 100, 43, 100, 27, 100, 100, 37, 62, 26, 90, 30, 21, 45, 13, 13, 49, 20, 14]


@st.composite
def cases(draw: st.DrawFn) -> dict:
    length = draw(st.integers(2, 24))
    batch = draw(st.integers(1, 6))
    tasks = draw(st.integers(2, 4))
    requests = []
    for _ in range(draw(st.integers(1, 4))):
        users = draw(st.none() | st.lists(st.integers(0, batch - 1), max_size=batch))
        requests.append((draw(st.integers(0, tasks - 1)), users, draw(st.integers(0, 1))))
    return {
        "length": length,
        "lengths": draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch)),
        "tasks": tasks,
        "requests": requests,
        "dilations": draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)),
        "kernel_size": draw(st.integers(2, 4)),
        "channels": draw(st.sampled_from([3, 8])),
        "variant": draw(st.sampled_from(["relation", "positive_only", "none"])),
        "seed": draw(st.integers(0, 99)),
    }


@settings(max_examples=60, deadline=None)
@given(cases())
def test_last_position_of_several_requests_equals_dense(case: dict) -> None:
    fast, dense = twins(
        [7] * case["tasks"], case["channels"], dilations=case["dilations"], kernel_size=case["kernel_size"],
        variant=case["variant"], seed=case["seed"],
    )  # fmt: skip
    x = ragged(case["lengths"], case["length"], seed=case["seed"])
    requests = [Request(t, None if u is None else torch.tensor(u, dtype=torch.int64), d) for t, u, d in case["requests"]]
    results = fast.encode(x, requests, s=2.0)
    weights = [torch.randn_like(r) for r in results]
    sum((w * r).sum() for w, r in zip(weights, results, strict=True)).backward()

    loss = 0.0
    for weight, result, request in zip(weights, results, requests, strict=True):
        chosen = x if request.users is None else x[request.users]
        expected = dense.hidden(chosen[:, : x.shape[1] - request.drop_last], dense.all_masks(2.0)[:, request.task])[:, -1]
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
        loss = loss + (weight * expected).sum()
    loss.backward()
    expected_gradients = gradients(dense)
    assert_close({k: v for k, v in gradients(fast).items() if k in expected_gradients}, expected_gradients, 1e-9)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_every_position_equals_dense(case: dict) -> None:
    fast, dense = twins(
        [7] * case["tasks"], case["channels"], dilations=case["dilations"], kernel_size=case["kernel_size"],
        variant=case["variant"], seed=case["seed"],
    )  # fmt: skip
    x = ragged(case["lengths"], case["length"], seed=case["seed"])
    positions = fast.encode_all(x, 1, s=2.0)
    expected = dense.hidden(x, dense.all_masks(2.0)[:, 1])
    result = positions.hidden[positions.row_of]
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(expected)
    (weight * result).sum().backward()
    (weight * expected).sum().backward()
    expected_gradients = gradients(dense)
    assert_close({k: v for k, v in gradients(fast).items() if k in expected_gradients}, expected_gradients, 1e-9)


@pytest.mark.parametrize("length", [60, 150])
def test_eight_blocks_shorter_and_longer_than_the_receptive_field(length: int) -> None:
    fast, dense = twins([9, 5], 8, dilations=(1, 4) * 4)
    x = ragged([0, 1, 2, length // 2, length - 1, length], length)
    (result,) = fast.encode(x, [Request(1)], s=50.0)
    expected = dense.hidden(x, dense.all_masks(50.0)[:, 1])[:, -1]
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


def test_cone_has_the_published_row_counts() -> None:
    """Of 1600 (position, convolution) outputs of 8 blocks at L=100 the last position needs 921; 1/1.38 at 60, 1/1.24 at 30."""

    def rows(length: int) -> int:
        return sum(len(offsets) for offsets in packing.geometry(length, (1, 4) * 4).offsets[1:])

    assert rows(100) == 921
    assert 16 * 60 / rows(60) == pytest.approx(1.38, abs=0.01)
    assert 16 * 30 / rows(30) == pytest.approx(1.24, abs=0.01)
    assert int(packing.geometry(200, (1, 4) * 4).offsets[0][-1]) == 120  # receptive field 121


def test_pads_and_cone_leave_a_third_of_the_work() -> None:
    lengths = np.array(TTL_LENGTHS * 50)
    packed = ops.pack(lengths, [Streams(np.arange(1000))], packing.geometry(100, (1, 4) * 4))
    assert 1000 * 1600 / packed.convolution_rows == pytest.approx(3.1, abs=0.1)


def test_all_pad_users_share_every_row() -> None:
    geometry = packing.geometry(50, (1, 4))
    one = ops.pack(np.array([0]), [Streams(np.arange(1))], geometry)
    many = ops.pack(np.zeros(100, np.int64), [Streams(np.arange(100))], geometry)
    assert many.convolution_rows == one.convolution_rows
    assert len(set(many.outputs[0].tolist())) == 1


@settings(max_examples=40, deadline=None)
@given(cases(), st.booleans())
def test_readers_are_the_transpose_of_taps(case: dict, every_position: bool) -> None:
    """Each (output row, tap) stands exactly once among the readers of the row it reads, directly or in one bag."""
    streams = [
        Streams(np.arange(len(case["lengths"])) if users is None else np.array(users, np.int64), drop)
        for _, users, drop in case["requests"]
    ]
    geometry = packing.geometry(case["length"], tuple(case["dilations"]), case["kernel_size"], every_position)
    packed = ops.pack(np.array(case["lengths"]), streams, geometry)
    for table in packed.convolutions:
        taps, readers = table.taps.numpy(), table.readers.numpy()
        forward = sorted((int(t), k, r) for r, row in enumerate(taps) for k, t in enumerate(row) if t >= 0)
        backward = []
        for row, entries in enumerate(readers):
            for k, reader in enumerate(entries):
                bag = int(reader) - len(taps)
                if bag >= 0:
                    low, high = table.bag_offsets[bag : bag + 2].tolist()
                    members = table.bag_rows[low:high].tolist()
                    assert members == sorted(members)
                    backward += [(row, k, member) for member in members]
                elif reader >= 0:
                    backward.append((row, k, int(reader)))
        assert sorted(backward) == forward
        assert sum(table.rows_per_request) == len(taps)


def test_item_zero_inside_a_sequence_is_an_item_like_any_other() -> None:
    fast, dense = twins([9, 5], 8)
    x = ragged([12, 5], 12)
    x[0, 6] = 0
    x[1, -1] = 0
    (result,) = fast.encode(x, [Request(0)], s=1.0)
    torch.testing.assert_close(result, dense.hidden(x, dense.all_masks(1.0)[:, 0])[:, -1], rtol=1e-10, atol=1e-10)


def test_what_the_host_builds_for_a_gpu_goes_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing.PackedBatch, "copied", lambda packed, device: (packed, device))
    case, gpu = (np.array([3, 0]), [Streams(np.arange(2))], packing.geometry(4, (1,))), torch.device("cuda", 0)
    packed, device = ops.pack(*case, gpu, "torch")
    assert_same(packed, ops.pack(*case))
    assert device == gpu
    with pytest.raises(BackendError, match="cannot run pack, expected"):
        ops.pack(*case, gpu, "numpy")


def test_no_users_and_no_requests() -> None:
    fast, _ = twins([9, 5], 8)
    x = ragged([3, 4], 6)
    empty, full = fast.encode(x, [Request(0, torch.empty(0, dtype=torch.int64)), Request(1)])
    assert empty.shape == (0, 8) and full.shape == (2, 8)
    assert fast.encode(x[:0], [Request(0)])[0].shape == (0, 8)
    assert fast.encode(x, []) == []


@pytest.mark.parametrize(
    ("lengths", "users", "drop", "message"),
    [
        ([3, 7], [0], 0, r"0\.\.6"),
        ([3, -1], [0], 0, r"0\.\.6"),
        ([3, 4], [2], 0, "users 2..2"),
        ([3, 4], [-1], 0, "users -1..-1"),
        ([3, 4], [0], 6, "drop_last is 6"),
    ],
)
def test_arguments_out_of_range_are_refused(lengths: list[int], users: list[int], drop: int, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        ops.pack(np.array(lengths), [Streams(np.array(users), drop)], packing.geometry(6, (1,)))


def test_geometry_refuses_impossible_networks() -> None:
    for arguments, message in [((0, (1,)), "length is 0"), ((5, (0,)), "dilations"), ((5, (1,), 1), "kernel_size is 1")]:
        with pytest.raises(ShapeError, match=message):
            packing.geometry(*arguments)


@settings(max_examples=30, deadline=None)
@given(passes())
def test_a_copy_in_one_buffer_is_the_same_batch(case: Pass) -> None:
    packed = ops.pack(*case)
    result = packed.copied(torch.device("cpu"))
    assert_same(result, packed)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors(result) if tensor.numel()}) <= 1
    tables, copies = ([id(table) for table in batch.convolutions] for batch in (packed, result))
    assert [tables.index(i) for i in tables] == [copies.index(i) for i in copies], "equal tables stay one"
    assert packed.to(torch.device("cpu")) is packed
    assert packed.to(torch.device("meta")).cells.device.type == "meta"
