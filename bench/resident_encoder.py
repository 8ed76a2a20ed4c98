"""What an encoder that keeps its users' rows in shared memory would save on a GPU, counted: `python bench/resident_encoder.py`.

Bytes and operations of the last position's state under one mask, at the TTL shape, per user. Nothing is measured here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.cases import REAL_LENGTHS, TTL, Shape
from teracon_fast.ops import pack
from teracon_fast.packing import Streams, geometry

ELEMENT_BYTES = 2  # bf16
SHARED_BYTES = 227 << 10
TILE_ROWS = 64  # of a warp group's product on sm_90


def counts(shape: Shape = TTL, users: int = 1000) -> dict[str, float]:
    """The counts, per user, by what they are of."""
    lengths, channels = shape.lengths(users), shape.channels
    layers = geometry(shape.length, shape.dilations, shape.kernel_size)
    packed = pack(lengths, [Streams(np.arange(users))], layers)
    outputs = np.array([len(table.taps) for table in packed.convolutions]) / users
    inputs = np.array([table.rows_in for table in packed.convolutions]) / users
    row = channels * ELEMENT_BYTES
    weights = len(outputs) * shape.kernel_size * channels**2 * ELEMENT_BYTES
    operations = 2 * shape.kernel_size * channels**2 * outputs.sum()
    # A block of threads holds a layer's input and output at once.
    together = max(1, int(SHARED_BYTES // (2 * row * lengths.mean())))
    return {
        "rows": outputs.sum(),
        "operations": operations,
        "bytes, a launch a convolution": row * (inputs.sum() + outputs.sum() + outputs[1::2].sum()),
        "bytes, resident": row * (inputs[0] + 1),
        "weights from L2, a user a block": weights,
        "users of mean length that a block holds": together,
        "weights from L2, with so many": weights / together,
        "share of its products that a user a block needs": _used(shape, 1),
        "the same with so many": _used(shape, together),
    }


def _used(shape: Shape, together: int) -> float:
    """Rows that are needed, of those that whole tiles of a block's users have."""
    layers = geometry(shape.length, shape.dilations, shape.kernel_size).offsets[1:]
    needed = computed = 0
    for low in range(0, len(REAL_LENGTHS), together):
        lengths = np.resize(REAL_LENGTHS, low + together)[low:] * shape.length // 100
        for offsets in layers:
            rows = sum(int((offsets < length).sum()) for length in lengths)
            needed, computed = needed + rows, computed + -(-rows // TILE_ROWS) * TILE_ROWS
    return needed / computed


if __name__ == "__main__":
    for name, value in counts().items():
        print(f"{name:48} {value:14,.2f}")
