"""`linear_cross_entropy` by the compiled C++ kernels: float32 and bfloat16 hidden states on the CPU. The `cpu` backend.

Labels are taken in blocks: the logits of some rows under a block stay in the cache. Arithmetic is float32 throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor

Shape = tuple[int, ...]

# Backward is a third faster with the exponentials of all logits kept from forward. Beyond this size it forms them again: malloc
# gives larger memory back to the system every time, and getting it anew can cost more than the product.
KEPT_BYTES = 32 << 20
# Labels in a block: a multiple of what every register tile covers. Their weights, two copies, fit a second-level cache.
_TILE, _BLOCK = 14, 126
# As many blocks as this, where there are labels enough, give many threads nearly equal shares.
_FEWEST_BLOCKS = 24


def _block(labels: int) -> int:
    """Never depends on the number of threads: forward and backward need not run with the same one."""
    return min(_BLOCK, -(-labels // (_FEWEST_BLOCKS * _TILE)) * _TILE)


def kept_shapes(rows: int, labels: int, save: bool) -> tuple[Shape, Shape]:
    """Shapes of what forward keeps for backward: exponentials, and the maxima that they refer to; see csrc/cpu."""
    padded = (rows + 31) // 32 * 32
    if not save or 4 * labels * padded > KEPT_BYTES:
        return (0,), (0,)
    return (labels * padded,), (-(-labels // _block(labels)), padded)


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_torch_linear_cross_entropy.forward`."""
    labels = weight.shape[0]
    losses, statistics = torch.empty(targets.shape[0]), torch.empty(2, hidden.shape[0])
    exponentials, highest = (torch.empty(shape) for shape in kept_shapes(hidden.shape[0], labels, save))
    torch.ops.teracon_fast.linear_cross_entropy_cpu_forward(
        *_dense(hidden, weight, bias), targets.contiguous(), rows.contiguous(), _block(labels), torch.get_num_threads(),
        losses, statistics, exponentials, highest,
    )  # fmt: skip
    return losses, statistics, exponentials, highest


def backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, statistics: Tensor,
    exponentials: Tensor, highest: Tensor, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `_torch_linear_cross_entropy.backward`."""
    d_hidden = torch.empty(hidden.shape if need_hidden else 0)
    d_weight = torch.empty(weight.shape if need_weight else 0)
    d_bias = torch.empty(bias.shape)
    torch.ops.teracon_fast.linear_cross_entropy_cpu_backward(
        *_dense(hidden, weight, bias), targets.contiguous(), rows.contiguous(), _block(weight.shape[0]),
        torch.get_num_threads(), statistics, exponentials, highest, grad.contiguous(), d_hidden, d_weight, d_bias,
    )  # fmt: skip
    return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), d_bias.to(bias.dtype)


def _dense(*tensors: Tensor) -> list[Tensor]:
    return [tensor.float().contiguous() for tensor in tensors]
