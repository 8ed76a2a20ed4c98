"""The masked convolution's Triton kernels behind the operation and the network: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from dense_check import assert_close, gradients, ragged
from torch import Tensor
from triton_here import require_triton

from teracon_fast import FastTCN, env_report, ops, packing
from teracon_fast.model.fast_tcn import Request
from teracon_fast.ops import backends
from teracon_fast.ops.backends import BackendError, resolve
from teracon_fast.ops.masked_conv.api import Inputs, Parameters, Tables, _masked_conv
from teracon_fast.ops.registration import flat
from teracon_fast.packing import Streams

require_triton()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS = [0, 2, 9]


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Operations that do not repeat are refused, and fresh memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def packed(every: bool = False) -> packing.PackedBatch:
    users = np.arange(3)
    requests = [Streams(users), Streams(users[1:], 1)]
    return ops.pack(np.array(LENGTHS), requests, packing.geometry(9, (1,), 3, every)).to(DEVICE)


def model(backend: str) -> FastTCN:
    torch.manual_seed(2)
    return FastTCN(num_items=30, channels=6, labels=[30, 4], dilations=[1], backend=backend).to(DEVICE)


def encoded(network: FastTCN) -> Tensor:
    """States of two requests, one for other users and without their last items."""
    users = torch.tensor([0, 2], device=DEVICE)
    found = network.encode(ragged(LENGTHS, 9), [Request(1), Request(0, users, 1)], 3.0)
    return torch.cat(found)


def test_the_network_and_all_its_gradients(deterministic: None) -> None:
    found = {}
    for backend in ("torch", "triton"):
        network = model(backend)
        states = encoded(network)
        states.square().sum().backward()
        found[backend] = {"states": states.detach(), **gradients(network)}
    assert_close(found["triton"], found["torch"], 1e-5)


def test_autocast_takes_the_low_precision_and_keeps_float32_parameters() -> None:
    network = model("triton")
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        states = encoded(network)
    assert states.dtype == torch.bfloat16
    expected = encoded(model("torch"))
    assert (states.float() - expected).norm() < 0.03 * expected.norm()
    states.float().sum().backward()
    assert all(gradient.dtype == torch.float32 for gradient in gradients(network).values())


def test_layers_compile_as_one_graph() -> None:
    network, tables = model("triton"), packed()
    masks = network.masks(3.0).detach()
    items = torch.randn(len(tables.cells), 6, device=DEVICE, requires_grad=True)

    def top(hidden: Tensor) -> Tensor:
        for rows in network.layers(hidden, masks, tables):
            hidden = rows
        return hidden

    compiled = torch.compile(top, fullgraph=True, backend="aot_eager")
    leaves = [items, *(network.blocks[0].conv1.parameters())]
    got, expected = (torch.autograd.grad(run(items).square().sum(), leaves) for run in (compiled, top))
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_schema_and_fake() -> None:
    table, back = packed(True).convolutions[1], packed(True).residuals[0]
    shapes = [(table.rows_in, 5), (5, 5, 3), (5,), (5,), (5,), (2, 5)]
    values = [torch.randn(shape, device=DEVICE) for shape in shapes]
    added = torch.randn(back.readers.shape[0], 5, device=DEVICE)
    given = Tables(*table.tensors, list(table.rows_per_request), *back)
    addend = torch.randn(table.taps.shape[0], 5, device=DEVICE)
    for before, save in ((None, True), (None, False), (addend, True)):
        arguments = Inputs(values[0], Parameters(*values[1:]), given, added, before, 1e-8, "triton", "auto", save)
        torch.library.opcheck(_masked_conv, tuple(flat(arguments)), test_utils=("test_schema", "test_faketensor"))


def test_it_runs_on_request_only_and_is_refused_where_it_cannot_run() -> None:
    assert resolve("auto", "masked_conv", DEVICE) != "triton" and env_report()["auto"]["masked_conv"] != "triton"
    assert resolve("triton", "masked_conv", DEVICE) == "triton"
    table = packed().convolutions[0]

    def run(f: int, algorithm: str = "auto", dtype: torch.dtype = torch.float32) -> Tensor:
        shapes = [(table.rows_in, f), (f, f, 3), (f,), (f,), (f,), (2, f)]
        values = [torch.zeros(shape, device=DEVICE, dtype=dtype) for shape in shapes]
        return ops.masked_conv(*values, table, backend="triton", algorithm=algorithm)

    with pytest.raises(BackendError, match="'winograd' needs backend 'cpu', got 'triton'"):
        run(4, "winograd")
    with pytest.raises(BackendError, match="takes up to 512 channels, got 513"):
        run(513)
    with pytest.raises(BackendError, match=r"it runs torch\.float32 and torch\.bfloat16"):
        run(4, dtype=torch.float64)
    assert not run(4, "direct").any()


def test_a_network_for_a_gpu_is_built_before_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parameters move to the GPU later: the name alone is checked."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    resolve.cache_clear()
    try:
        assert model("triton").backend == "triton"
        with pytest.raises(BackendError, match="'nonsense' cannot run masked_conv"):
            backends.check_name("nonsense")
    finally:
        resolve.cache_clear()


def test_tables_of_no_rows_at_all() -> None:
    """An operation on nothing: empty output, gradients of zero."""
    table = packed().convolutions[0]
    table = replace(
        table, taps=table.taps[:0], readers=torch.full_like(table.readers, -1), bag_rows=table.bag_rows[:0],
        bag_offsets=table.bag_offsets[:1], rows_per_request=(0, 0), row_ends=table.row_ends * 0,
    )  # fmt: skip
    shapes = [(table.rows_in, 5), (5, 5, 3), (5,), (5,), (5,), (2, 5)]
    values = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in shapes]
    out = ops.masked_conv(*values, table, backend="triton")
    assert out.shape == (0, 5)
    assert all(not gradient.any() for gradient in torch.autograd.grad(out.sum(), values))


def test_tf32_is_used_once_torch_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from teracon_fast.kernels import masked_conv as kernels
    from teracon_fast.kernels import tiles

    table = packed().convolutions[0]
    used = []
    forward = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *arguments: used.append(arguments[-2]) or forward(*arguments))
    values = [torch.randn(shape, device=DEVICE) for shape in [(table.rows_in, 5), (5, 5, 3), (5,), (5,), (5,), (2, 5)]]
    before = torch.get_float32_matmul_precision()
    try:
        for name in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(name)
            ops.masked_conv(*values, table, backend="triton")
        monkeypatch.setattr(torch.version, "hip", "6.4")
        for architecture, expected in (("gfx942", "tf32"), ("gfx90a", "ieee")):
            monkeypatch.setattr(tiles, "architecture", lambda device, name=architecture: name)
            assert tiles.dot_precision(DEVICE) == expected
    finally:
        torch.set_float32_matmul_precision(before)
    assert used == ["ieee", "tf32", "tf32"]
