"""What the kernels share: a tile of logits, preparation of operands, targets by row, launching.

Row numbers and labels are 32-bit inside a tile and 64-bit wherever they are multiplied by a stride: rows * f and labels * f
may pass 2^31. Names: `o_*` offsets, `p_*` pointers, `m_*` masks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from teracon_fast.kernels.configs import Config, architecture

# Start of a running maximum: finite, because -inf minus -inf is NaN.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def product_tile(
    a, b, o_a, o_b, m_a, m_b, channels, stride_a, stride_b,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """`a[o_a] @ b[o_b].T`, fp32 `[BLOCK_A, BLOCK_B]`; rows under a false mask count as zero.

    An element has the same bits anywhere in a tile of the same size: its sum runs over channels in one order.
    """
    # One pointer per row: a loop that carries one per element needs twice the registers.
    p_a, p_b = a + o_a.to(tl.int64) * stride_a, b + o_b.to(tl.int64) * stride_b
    total = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    for done in range(0, channels, DEPTH):
        o_depth = done + tl.arange(0, DEPTH)
        m_depth = o_depth < channels
        left = tl.load(p_a[:, None] + o_depth[None, :], mask=m_a[:, None] & m_depth[None, :], other=0.0).to(COMPUTE)
        right = tl.load(p_b[None, :] + o_depth[:, None], mask=m_b[None, :] & m_depth[:, None], other=0.0).to(COMPUTE)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def feature_tile(base, o, m, o_features, channels, stride, COMPUTE: tl.constexpr):
    """`base[o, o_features]`, zero under a false mask."""
    p_values = base + o.to(tl.int64)[:, None] * stride + o_features[None, :]
    return tl.load(p_values, mask=m[:, None] & (o_features < channels)[None, :], other=0.0).to(COMPUTE)


# Whether TRITON_INTERPRET was set when the kernels were defined.
INTERPRETED = not isinstance(product_tile, triton.JITFunction)


def operand_dtype(hidden: Tensor) -> Any:
    """Triton's dtype for operands of products; fp32 in the interpreter, which is silently wrong for bfloat16."""
    return tl.float32 if INTERPRETED else _DTYPES[hidden.dtype]


def dot_precision(device: torch.device) -> str:
    """Precision of products of float32: "ieee", exact, or "tf32" once `torch.set_float32_matmul_precision` allows it.

    Of AMD's chips only gfx942 has TF32.
    """
    if torch.get_float32_matmul_precision() == "highest" or (torch.version.hip and architecture(device) != "gfx942"):
        return "ieee"
    return "tf32"


def operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` with contiguous channels; the kernel rounds to `dtype`.

    The interpreter truncates where a GPU rounds, so for it the tensor is rounded here, and widened again.
    """
    if INTERPRETED:
        tensor = tensor.to(dtype).float()
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def vector(tensor: Tensor) -> Tensor:
    """A bias for the kernels: never rounded."""
    return (tensor.float() if INTERPRETED else tensor).contiguous()


def result(shape: Sequence[int], dtype: torch.dtype, device: torch.device, parts: int = 1) -> Tensor:
    """Memory for a result, or for `parts` parts of it in fp32 that `finished` adds in order."""
    wide = INTERPRETED or parts > 1
    return torch.empty((parts, *shape), dtype=torch.float32 if wide else dtype, device=device)


def finished(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The ordered sum of the parts of a `result`."""
    return (parts[0] if parts.shape[0] == 1 else parts.sum(0)).to(dtype)


@dataclass(frozen=True)
class Targets:
    """Targets by row: those of row r are `order[starts[r]:starts[r + 1]]`, ascending."""

    targets: Tensor
    rows: Tensor
    order: Tensor
    starts: Tensor


def by_row(targets: Tensor, rows: Tensor, count: int) -> Targets:
    """Sorts the numbers of targets by row, without waiting for the device."""
    ordered, order = rows.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(count + 1, device=rows.device))
    return Targets(targets.contiguous(), rows.contiguous(), order, starts)


def launch(kernel: Any, grid: tuple[int, ...], config: Config, device: torch.device, **arguments: Any) -> None:
    """Runs a kernel on the device of its tensors, which need not be the current one."""
    if 0 in grid:
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](**arguments, num_warps=config.warps, num_stages=config.stages)


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least `value` and 16, the least size of a product's tile."""
    return max(16, 1 << max(value - 1, 0).bit_length())
