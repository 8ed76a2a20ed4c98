"""Which offsets every layer must produce: the receptive field of the outputs, the same for all users."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from teracon_fast.errors import ShapeError
from teracon_fast.packing.types import IntArray


@dataclass(frozen=True)
class ConvGeometry:
    """Static lookups of one convolution, indexed by tap and by a row's place (its rank among the layer's offsets)."""

    read_offset: IntArray  # [K, |O_out|] offset read by each tap
    read_rank: IntArray  # [K, |O_out|] its rank in the input layer
    reader_offset: IntArray  # [K, |O_in|] offset of the reader through each tap, -1 where there is none
    reader_rank: IntArray  # [K, |O_in|] its rank in the output layer


class TableForm(NamedTuple):
    """What a table of the network depends on. Equal tables are built once."""

    lookups: ConvGeometry
    inputs: int  # numbers, among the distinct ones, of the layers that it reads and produces
    outputs: int
    dilation: int


@dataclass(frozen=True, eq=False)
class Geometry:
    """Offsets that every layer must produce, for one length, network and kind of output. Layer 0 is the embedding.

    Compared by identity, hashable: `geometry` returns the same object for the same arguments.
    """

    length: int
    kernel_size: int
    dilations: tuple[int, ...]  # one per convolution
    every_position: bool
    offsets: tuple[IntArray, ...]
    ranks: tuple[IntArray, ...]  # ranks[l][o] = number of offsets of layer l below o, for o in 0..length
    convolutions: tuple[ConvGeometry, ...]
    residuals: tuple[ConvGeometry, ...]  # a block's input is read through one tap that stays at the row's own offset

    @cached_property
    def layer_numbers(self) -> tuple[int, ...]:
        """The number of each layer among the distinct ones: neighbours with the same offsets are one."""
        new = [i == 0 or offsets is not self.offsets[i - 1] for i, offsets in enumerate(self.offsets)]
        return tuple(int(number) - 1 for number in np.cumsum(new))

    @cached_property
    def distinct_layers(self) -> tuple[int, ...]:
        """One layer of each number."""
        return tuple(self.layer_numbers.index(number) for number in range(self.layer_numbers[-1] + 1))

    @cached_property
    def rank_table(self) -> IntArray:
        """Ranks of the distinct layers, int32 `[layers, L + 1]`."""
        return np.stack([self.ranks[layer] for layer in self.distinct_layers])

    @cached_property
    def tables(self) -> tuple[list[TableForm], list[int], list[int]]:
        """The distinct tables, and which of them each convolution and each residual block has."""
        forms: dict[tuple[int, int, int], TableForm] = {}

        def key(lookups: ConvGeometry, i: int, o: int, dilation: int) -> tuple[int, int, int]:
            form = TableForm(lookups, self.layer_numbers[i], self.layer_numbers[o], dilation)
            forms.setdefault(form[1:], form)
            return form[1:]

        convolutions = [key(conv, i, i + 1, self.dilations[i]) for i, conv in enumerate(self.convolutions)]
        residuals = [key(conv, 2 * i, 2 * i + 2, 0) for i, conv in enumerate(self.residuals)]
        numbers = {found: number for number, found in enumerate(forms)}
        return list(forms.values()), [numbers[k] for k in convolutions], [numbers[k] for k in residuals]


@lru_cache(maxsize=64)
def geometry(length: int, block_dilations: tuple[int, ...], kernel_size: int = 3, every_position: bool = False) -> Geometry:
    """Walk the network backwards from its outputs and list the offsets that each layer must produce.

    Args:
        length: sequence length L, at least 1.
        block_dilations: dilation d of each residual block; its convolutions have dilations d and 2d.
        kernel_size: K, at least 2.
        every_position: whether all positions are outputs (task 1) or the last one only.

    Raises:
        ShapeError: for a length, dilation or kernel size that is not valid.
    """
    if length < 1:
        raise ShapeError(f"sequence length is {length}, expected at least 1")
    if kernel_size < 2:
        raise ShapeError(f"kernel_size is {kernel_size}, expected at least 2")
    if any(d < 1 for d in block_dilations):
        raise ShapeError(f"dilations are {block_dilations}, expected all at least 1")
    dilations = tuple(d * factor for d in block_dilations for factor in (1, 2))
    every = np.arange(length, dtype=np.int32)
    layers = [every if every_position else np.zeros(1, np.int32)]
    for dilation in reversed(dilations):
        reach = np.unique(np.add.outer(layers[0], np.arange(kernel_size, dtype=np.int32) * dilation))
        reach = reach[reach < length].astype(np.int32)
        # Equal sets become one object, so that equal tables are built once.
        layers.insert(0, layers[0] if np.array_equal(reach, layers[0]) else reach)
    ranks: list[IntArray] = []
    for layer, offsets in enumerate(layers):
        if layer and offsets is layers[layer - 1]:
            ranks.append(ranks[-1])
        else:
            ranks.append(np.searchsorted(offsets, np.arange(length + 1)).astype(np.int32))
    convolutions = tuple(
        _convolution_geometry(layers[i], ranks[i], layers[i + 1], ranks[i + 1], d, kernel_size, length)
        for i, d in enumerate(dilations)
    )
    residuals = tuple(
        _convolution_geometry(layers[i], ranks[i], layers[i + 2], ranks[i + 2], 0, 1, length)
        for i in range(0, len(dilations), 2)
    )
    return Geometry(length, kernel_size, dilations, every_position, tuple(layers), tuple(ranks), convolutions, residuals)


def _locate(wanted: IntArray, offsets: IntArray, rank: IntArray) -> tuple[IntArray, IntArray]:
    """The wanted offsets, -1 where `offsets` lacks them, and their ranks in `offsets` (0 where lacking)."""
    present = np.isin(wanted, offsets)
    safe = np.where(present, wanted, 0)
    return np.where(present, wanted, -1).astype(np.int32), np.where(present, rank[safe], 0).astype(np.int32)


def _convolution_geometry(
    o_in: IntArray, rank_in: IntArray, o_out: IntArray, rank_out: IntArray, dilation: int, kernel_size: int, length: int
) -> ConvGeometry:
    shifts = (np.arange(kernel_size - 1, -1, -1, dtype=np.int32) * dilation)[:, None]
    read_offset = o_out + shifts
    reader_offset, reader_rank = _locate(o_in - shifts, o_out, rank_out)
    return ConvGeometry(read_offset, rank_in[np.minimum(read_offset, length)], reader_offset, reader_rank)
