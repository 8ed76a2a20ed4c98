"""What the compiled C++ kernels of heads are given alike: dense arrays, and how labels are cut into blocks."""

from __future__ import annotations

import torch
from torch import Tensor

# Labels in a block: a multiple of what every register tile covers. Their weights, two copies, fit a second-level cache.
_TILE, _BLOCK = 14, 126
# As many blocks as this, where there are labels enough, give many threads nearly equal shares.
_FEWEST_BLOCKS = 24


def block_of(labels: int) -> int:
    """Labels in a block. Never depends on the number of threads: forward and backward need not run with the same one."""
    return min(_BLOCK, -(-labels // (_FEWEST_BLOCKS * _TILE)) * _TILE)


def schedule(labels: int) -> tuple[int, int]:
    """Labels in a block, and threads."""
    return block_of(labels), torch.get_num_threads()


def dense_head(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As the kernels take them: hidden and weight in the dtypes they have, the bias in float32."""
    return hidden.contiguous(), weight.contiguous(), bias.float().contiguous()
