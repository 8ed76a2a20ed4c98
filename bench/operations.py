"""Floating-point operations of a case: those that its results need, and those that a dense network spends on them.

A multiply-add counts as two. Only convolutions and heads are counted: normalisation, masks, the loss and Adam are less
than a hundredth. *Useful* convolution outputs are the packer's rows: the receptive-field cone of the positions asked
for, with the pad prefix of one mask computed once. A backward pass costs twice its forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from teracon_fast.ops import pack
from teracon_fast.packing import PackedBatch, Streams, geometry


@dataclass(frozen=True)
class Operations:
    """Operations of one call: `useful` ones, and those of a `dense` network, which computes every position."""

    useful: float
    dense: float

    def __add__(self, other: Operations) -> Operations:
        return Operations(self.useful + other.useful, self.dense + other.dense)

    def __mul__(self, times: int) -> Operations:
        return Operations(times * self.useful, times * self.dense)


@dataclass(frozen=True)
class Network:
    """What the number of operations depends on: channels f, dilation of each block, taps of a convolution."""

    channels: int
    dilations: tuple[int, ...]
    kernel_size: int

    def pack(self, lengths: NDArray[np.int64], length: int, requests: Sequence[Streams], every: bool = False) -> PackedBatch:
        """The packed rows of a pass over sequences of the given real lengths."""
        return pack(lengths, requests, geometry(length, self.dilations, self.kernel_size, every))

    def encoder(self, packed: PackedBatch, positions: int) -> Operations:
        """Forward pass of the backbone; `positions` is what the dense one computes in each convolution."""
        per_output = 2 * self.kernel_size * self.channels**2
        return Operations(per_output * packed.convolution_rows, per_output * positions * 2 * len(self.dilations))

    def head(self, rows: int, labels: int, dense_rows: int | None = None) -> Operations:
        """Forward pass of a linear head over `rows` states."""
        per_row = 2 * self.channels * labels
        return Operations(per_row * rows, per_row * (rows if dense_rows is None else dense_rows))
