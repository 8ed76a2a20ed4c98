"""Tables built by Triton's kernels are those that the host builds, number by number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from called import Calls
from dense_check import ragged
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_tables import Pass, assert_same, passes, tensors
from torch import Tensor
from triton_here import require_triton

require_triton()

from teracon_fast import FastTCN, Request, ops, packing
from teracon_fast.errors import ShapeError
from teracon_fast.kernels import packing as kernels
from teracon_fast.ops import backends
from teracon_fast.packing import Streams, buckets

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def built(*case: Any, padded: bool = False) -> packing.PackedBatch:
    return ops.pack(*case, device=DEVICE, backend="triton", padded=padded)


def assert_as_on_the_host(case: Pass, padded: bool) -> None:
    result = built(*case, padded=padded)
    assert all(tensor.device.type == DEVICE.type and tensor.data_ptr() % 16 == 0 for tensor in tensors(result))
    assert_same(result.to(torch.device("cpu")), ops.pack(*case, padded=padded))


@settings(max_examples=30, deadline=None)
@given(passes(longest=24, blocks=2), st.booleans())
def test_random_passes(case: Pass, padded: bool) -> None:
    assert_as_on_the_host(case, padded)


EVERYONE, NOBODY = Streams(np.arange(5)), Streams(np.zeros(0, np.int64))
ALL_PADS, NO_PADS, MIXED = [0] * 5, [12] * 5, [0, 1, 12, 7, 12]


@pytest.mark.parametrize(
    ("lengths", "requests"),
    [
        (ALL_PADS, [EVERYONE]),
        (NO_PADS, [EVERYONE]),
        (MIXED, [EVERYONE, Streams(np.array([4, 1, 1])), Streams(np.array([1, 0, 3]), 1)]),
        (MIXED, [NOBODY, Streams(np.array([3])), NOBODY]),
        (MIXED, [Streams(np.arange(5), 11)]),
        (MIXED, [NOBODY]),
        (MIXED, []),
    ],
)
@pytest.mark.parametrize("every_position", [False, True])
def test_users_of_every_kind(lengths: list[int], requests: list[Streams], every_position: bool) -> None:
    assert_as_on_the_host((np.array(lengths), requests, packing.geometry(12, (1, 2), 3, every_position)), False)


@pytest.mark.parametrize(
    ("length", "dilations", "kernel_size"),
    [(1, (1, 4), 3), (1, (2,), 2), (40, (1,), 2), (40, (2,), 3), (6, (1, 4, 1, 4), 3), (30, (1, 4, 1, 4), 3)],
)
def test_lengths_below_and_above_the_receptive_field(length: int, dilations: tuple[int, ...], kernel_size: int) -> None:
    lengths = np.array([length, 0, length // 2, max(length - 2, 0)])
    requests = [Streams(np.arange(4)), Streams(np.array([2, 0]), min(1, length - 1))]
    assert_as_on_the_host((lengths, requests, packing.geometry(length, dilations, kernel_size)), True)


def test_more_streams_and_longer_ones_than_a_program_takes_at_once() -> None:
    lengths = np.random.default_rng(0).integers(20, 23, 140)
    lengths[::20] = 50
    requests = [Streams(np.array([3, 7])), Streams(np.arange(140))]
    case = lengths, requests, packing.geometry(50, (3,), 3, True)
    host = ops.pack(*case)
    assert max(np.diff(host.convolutions[0].bag_offsets.numpy())) > kernels._SIZES.rows
    assert_as_on_the_host(case, False)


def test_equal_tables_are_built_once() -> None:
    geometry = packing.geometry(9, (1, 4) * 2, every_position=True)
    packed = built(np.array([3, 9]), [Streams(np.arange(2))], geometry)
    assert len({id(table) for table in packed.convolutions}) == 4  # of dilations 1, 2, 4 and 8
    assert packed.residuals[0] is packed.residuals[1]


def test_a_model_trains_on_them_as_on_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = ragged([9, 0, 4, 9, 7], 9).to(DEVICE)
    model = FastTCN(num_items=30, channels=8, labels=[30, 7], dilations=(1, 2), backend="torch").to(DEVICE)
    parameters = [p for name, p in model.named_parameters() if "classifier" not in name]

    def results() -> list[Tensor]:
        requests = [Request(1), Request(0, torch.tensor([2, 3]), 1)]
        last = sum((state.square().sum() for state in model.encode(x, requests, 2.0)), torch.zeros((), device=DEVICE))
        loss = last + model.next_item_loss(x, 2.0)
        return [loss, *torch.autograd.grad(loss, parameters)]

    expected, host = results(), ops.pack
    calls = []

    def pack(lengths: Any, requests: Any, geo: Any, device: torch.device, backend: str, padded: bool) -> packing.PackedBatch:
        calls.append(backend)
        return host(lengths, requests, geo, device, "triton", padded)

    monkeypatch.setattr(ops, "pack", pack)
    for one, other in zip(results(), expected, strict=True):
        assert torch.equal(one, other)
    assert calls == ["torch"] * 2, "the model's own backend is what it asks for"


WAITS = (
    "item", "cpu", "tolist", "nonzero", "numpy", "unique", "is_nonzero", "__bool__", "__int__", "__float__", "__index__",
    "__len__", "__iter__", "__getitem__", "masked_select",
)  # fmt: skip


@pytest.mark.parametrize("padded", [False, True])
def test_nothing_waits_for_the_device(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the meta device hold no numbers: whatever needs one fails. And what would read them is not called."""
    launched: list[tuple[str, tuple[int, ...]]] = []
    lengths, geometry = np.array([9, 0, 4, 9]), packing.geometry(9, (1, 4))
    requests = [Streams(np.arange(4)), Streams(np.array([2, 3]), 1)]
    host = ops.pack(lengths, requests, geometry)
    bags = sum(table.bag_offsets.shape[0] - 1 for table in host.convolutions)
    monkeypatch.setattr(kernels, "launch", lambda kernel, grid, *_, **__: launched.append((kernel.__name__, grid)))
    monkeypatch.setattr(backends, "resolve", lambda *_: "triton")
    kernels._lookups_on(geometry, torch.device("meta"), 0)  # once for a geometry, a device and a stream
    sent = []

    def told(name: str, arguments: tuple[Any, ...]) -> None:
        if name in WAITS:
            # The one tensor of the host is the buffer that is sent, and is written through numpy.
            tensor = arguments[0]
            assert name == "numpy" and tensor.device.type == "cpu", f"Tensor.{name} of a tensor on {tensor.device}"
            sent.append(tensor)

    with monkeypatch.context() as patch, Calls(told):
        for name in ("unique", "nonzero", "tensor", "as_tensor", "masked_select", "where"):
            patch.setattr(torch, name, None)
        result = ops.pack(lengths, requests, geometry, torch.device("meta"), padded=padded)
    assert len(sent) == 1, "all of a batch goes in one buffer"
    sizes = buckets.sizes(host)
    assert buckets.sizes(result) == (buckets.bucket(sizes) if padded else sizes)
    programs = 8 + padded * kernels._PADDERS
    tables = len(geometry.tables[0])
    assert launched == [("tables_kernel", (programs, tables)), ("bags_kernel", (bags,)), ("cells_kernel", (programs,))]


def test_so_many_rows_that_their_numbers_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real members of bags that many would take gigabytes: their count is made large instead."""
    bags = kernels._bags

    def many(*arguments: Any) -> Any:
        found = bags(*arguments)
        return found._replace(starts=found.starts * 2**31)

    monkeypatch.setattr(kernels, "_bags", many)
    with pytest.raises(ShapeError, match=r"2\*\*31 rows and bags, or members of bags"):
        built(np.array([3, 0]), [Streams(np.arange(2))], packing.geometry(4, (1,)))
