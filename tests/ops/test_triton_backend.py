"""The Triton kernels behind the operations on heads: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_here import require_triton

from teracon_fast import env_report, ops
from teracon_fast.errors import TeraconError
from teracon_fast.ops.backends import resolve

require_triton()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def head(rows: int, labels: int, channels: int, dtype: torch.dtype) -> list[Tensor]:
    values = [torch.randn(rows, channels).to(dtype), torch.randn(labels, channels), torch.randn(labels)]
    return [value.to(DEVICE).requires_grad_() for value in values]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_cross_entropy_and_its_predictions(dtype: torch.dtype, tolerance: float) -> None:
    values = head(20, 70, 12, dtype)
    targets, rows = (torch.randint(most, (30,), device=DEVICE) for most in (70, 20))
    found, expected = (
        ops.linear_cross_entropy(*values, targets, rows, predictions=True, backend=backend) for backend in ("triton", "torch")
    )
    torch.testing.assert_close(found.loss, expected.loss, rtol=tolerance, atol=tolerance)
    if dtype == torch.float32:
        assert torch.equal(found.argmax, expected.argmax) and torch.equal(found.rank, expected.rank)
    for g, e in zip(torch.autograd.grad(found.loss, values), torch.autograd.grad(expected.loss, values), strict=True):
        assert g.dtype == e.dtype and (g.float() - e.float()).norm() <= tolerance * e.float().norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_retention(dtype: torch.dtype, tolerance: float) -> None:
    student, teacher = head(5, 70, 12, dtype), [value.detach() for value in head(5, 70, 12, dtype)]
    found, expected = (ops.retention_mse(*student, *teacher, scale=0.7, backend=backend) for backend in ("triton", "torch"))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    for g, e in zip(torch.autograd.grad(found, student), torch.autograd.grad(expected, student), strict=True):
        assert g.dtype == e.dtype and (g.float() - e.float()).norm() <= tolerance * e.float().norm()


def test_ranking() -> None:
    values = [value.detach() for value in head(20, 70, 12, torch.float32)]
    targets, rows = (torch.randint(most, (30,), device=DEVICE) for most in (70, 20))
    exclude = [torch.randint(70, (row,), device=DEVICE) for row in range(20)]
    for call in (
        lambda backend: (ops.linear_rank(*values, targets, rows, backend=backend),),
        lambda backend: ops.linear_topk(*values, 5, backend=backend)[1:],
        lambda backend: ops.linear_topk(*values, 60, exclude, backend=backend)[1:],
    ):
        assert torch.equal(*call("triton"), *call("torch"))
    if DEVICE == "cpu":
        values[2][3] = torch.nan
        with pytest.raises(TeraconError, match="scores that are NaN"):
            ops.linear_rank(*values, targets, rows, backend="triton")
        with pytest.raises(IndexError, match="targets has 70"):
            ops.linear_rank(*values, targets + 70 - targets, rows, backend="triton")


def test_they_run_on_request_only() -> None:
    """Until they have been measured on a GPU."""
    for operation in ("linear_cross_entropy", "retention_mse", "linear_rank", "pack"):
        assert resolve("auto", operation) != "triton"
        assert resolve("triton", operation, torch.device(DEVICE)) == "triton"
        assert env_report()["auto"][operation] != "triton"
