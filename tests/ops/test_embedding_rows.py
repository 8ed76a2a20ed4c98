"""Rows of an embedding: the sparse gradient has the bits of the dense one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from teracon_fast import ops
from teracon_fast.errors import ShapeError


def batch(n: int = 400, num_items: int = 90) -> Tensor:
    """Few items often, many never."""
    return (torch.rand(n) ** 3 * num_items).long()


def sparse_gradient(weight: Tensor, items: Tensor, upstream: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(ops.embedding_rows(weight, items, sparse=True), weight, upstream)
    assert gradient.layout == torch.sparse_coo and gradient.is_coalesced() and gradient.shape == weight.shape
    return gradient


def dense_gradient(weight: Tensor, items: Tensor, upstream: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(F.embedding(items, weight), weight, upstream)
    return gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 7, 256])
def test_values_and_gradients_have_the_bits_of_torchs_embedding(dtype: torch.dtype, channels: int) -> None:
    weight = torch.randn(90, channels, dtype=dtype, requires_grad=True)
    items, upstream = batch(), torch.randn(400, channels, dtype=dtype)
    for sparse in (False, True):
        assert torch.equal(ops.embedding_rows(weight, items, sparse), weight[items])
    gradient = sparse_gradient(weight, items, upstream)
    assert torch.equal(gradient.indices()[0], items.unique())
    assert torch.equal(gradient.to_dense(), dense_gradient(weight, items, upstream))
    assert torch.equal(sparse_gradient(weight, items, upstream).values(), gradient.values())
    assert torch.equal(sparse_gradient(weight, items.int(), upstream).values(), gradient.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_each_sum_once(dtype: torch.dtype) -> None:
    weight = torch.randn(90, 16, dtype=dtype, requires_grad=True)
    items, upstream = batch(), torch.randn(400, 16).to(dtype)
    exact = torch.zeros(90, 16, dtype=torch.float64).index_add(0, items, upstream.double())
    gradient = sparse_gradient(weight, items, upstream)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.to_dense().double(), exact, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=1e-5)


def test_upstream_gradients_of_any_layout() -> None:
    weight, items = torch.randn(90, 6, requires_grad=True), batch()
    wide = torch.randn(400, 12)
    for upstream in (torch.tensor(1.0).expand(400, 6), torch.randn(6, 400).t(), wide[:, ::2], wide[:1, :6].expand(400, 6)):
        assert torch.equal(sparse_gradient(weight, items, upstream).to_dense(), dense_gradient(weight, items, upstream))


def test_no_items_one_item_and_all_the_same() -> None:
    weight = torch.randn(9, 4, requires_grad=True)
    for items in (torch.zeros(0, dtype=torch.int64), torch.tensor([8]), torch.full((50,), 3)):
        upstream = torch.randn(len(items), 4)
        assert torch.equal(sparse_gradient(weight, items, upstream).to_dense(), dense_gradient(weight, items, upstream))


def test_two_passes_add_up() -> None:
    weight, items = torch.randn(90, 6, requires_grad=True), batch()
    for part in (items[:150], items[150:]):
        ops.embedding_rows(weight, part, sparse=True).sum().backward()
    assert weight.grad is not None and weight.grad.layout == torch.sparse_coo
    ones = torch.ones(400, 6)
    torch.testing.assert_close(weight.grad.to_dense(), dense_gradient(weight, items, ones), rtol=0, atol=0)


def test_without_gradient_and_beside_a_dense_use() -> None:
    weight, items = torch.randn(90, 6, requires_grad=True), batch()
    assert not ops.embedding_rows(weight.detach(), items, sparse=True).requires_grad
    with torch.no_grad():
        assert not ops.embedding_rows(weight, items, sparse=True).requires_grad
    (ops.embedding_rows(weight, items, sparse=True).sum() + weight.square().sum()).backward()
    expected = dense_gradient(weight, items, torch.ones(400, 6)) + 2 * weight.detach()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("sparse", [False, True])
def test_compiles_in_one_graph_with_a_dense_gradient(sparse: bool) -> None:
    weight, items = torch.randn(90, 6, requires_grad=True), batch()
    upstream = torch.randn(400, 6)

    def rows(weight: Tensor, items: Tensor) -> Tensor:
        return ops.embedding_rows(weight, items, sparse) * 2

    found = torch.compile(rows, fullgraph=True, backend="aot_eager")(weight, items)
    assert torch.equal(found, rows(weight, items))
    (gradient,) = torch.autograd.grad(found, weight, upstream)
    assert torch.equal(gradient, dense_gradient(weight, items, 2 * upstream))


@pytest.mark.parametrize("sparse", [False, True])
def test_inputs_that_do_not_fit_are_refused(sparse: bool) -> None:
    weight, items = torch.randn(9, 4), torch.tensor([1, 2])
    with pytest.raises(ShapeError, match=r"weight is torch.float32 \[9\], expected a floating \[V, f\]"):
        ops.embedding_rows(weight[:, 0], items, sparse)
    with pytest.raises(ShapeError, match=r"weight is torch.int64 \[9, 4\]"):
        ops.embedding_rows(weight.long(), items, sparse)
    with pytest.raises(ShapeError, match=r"items are torch.int64 \[1, 2\], expected int64 \[n\]"):
        ops.embedding_rows(weight, items[None], sparse)
    with pytest.raises(ShapeError, match="items are torch.float32"):
        ops.embedding_rows(weight, items.float(), sparse)
    for far in (9, -1):
        with pytest.raises(IndexError):
            ops.embedding_rows(weight, torch.tensor([far]), sparse)
