"""User representations without gradient, by the compiled kernels: what does not depend on the users is computed once.

The kernels take blocks of users through all layers, each thread its own block, in memory of a few MiB. A layer holds only the
rows that the layers above read, in one of three buffers used in turn (a block's input, its inner activations, its output).
Computed once are the weights in the order of the register tiles, the masks folded into the LayerNorm's scale and shift
(`m * relu(a) = relu(m * a)` for m >= 0), and the states of the left pads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from teracon_fast import ops, packing
from teracon_fast.errors import ConfigError, ShapeError
from teracon_fast.ops import backends
from teracon_fast.ops.embedding_rows import catch_up
from teracon_fast.optim.lazy_rows import Embedding

Precision = Literal["fp32", "bf16"]


class Network(Protocol):
    """What an encoder reads of a `Backbone`."""

    channels: int
    kernel_size: int
    dilations: tuple[int, ...]
    backend: str
    algorithm: str
    embeding: Embedding

    @property
    def num_sites(self) -> int: ...

    def site(self, number: int) -> tuple[nn.Conv2d, nn.LayerNorm]: ...

    def layers(
        self, hidden: Tensor, masks: Tensor, packed: packing.PackedBatch, weights: Sequence[Tensor] | None = None
    ) -> Iterator[Tensor]: ...


class _Layers(NamedTuple):
    """Offsets of all layers in the kernels' form."""

    offsets: Tensor  # int32, layer after layer
    starts: Tensor  # int64 [layers + 1]
    ranks: Tensor  # int32 [layers, L + 1]
    dilations: Tensor  # int32 [convolutions]


@lru_cache(maxsize=64)
def _layers(length: int, block_dilations: tuple[int, ...], kernel_size: int) -> _Layers:
    geometry = packing.geometry(length, block_dilations, kernel_size)
    starts = np.cumsum([0, *(len(offsets) for offsets in geometry.offsets)]).astype(np.int64)
    parts = (np.concatenate(geometry.offsets), starts, np.stack(geometry.ranks), np.array(geometry.dilations, np.int32))
    return _Layers(*(torch.from_numpy(part) for part in parts))


class _TaskConstants(NamedTuple):
    """What depends on a task's mask."""

    mask: Tensor  # [S, f]
    ln_weight: Tensor  # [S, f]
    ln_bias: Tensor  # [S, f]
    pads: dict[int, Tensor]  # L -> [S + 1, L, f]


class Encoder:
    """A network prepared for inference on the CPU. Valid while its parameters keep their values.

    Args:
        model: a `Backbone` with float32 parameters on the CPU.
        masks: `[S, T, f]`, none negative; for example from `FastTCN.masks(s)`.
        weights: S tensors `[f, f, 1, K]` in place of the convolutions' own.
        precision: "fp32", or "bf16": rows are kept in bfloat16 between layers; sums and statistics stay float32.

    Raises:
        ConfigError: the compiled kernels cannot run this model here (see `Encoder.serves`), or the precision is unknown.
    """

    @staticmethod
    def serves(model: Network) -> bool:
        """Whether the model's parameters and backend allow an encoder."""
        parameter = model.embeding.stored
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            return False
        return backends.resolve(model.backend, "masked_conv", parameter.device, parameter.dtype) == "cpu"

    @torch.no_grad()
    def __init__(
        self, model: Network, masks: Tensor, precision: Precision = "fp32", weights: Sequence[Tensor] | None = None
    ) -> None:
        if not self.serves(model):
            raise ConfigError("Encoder needs float32 parameters on the CPU and the backend 'cpu'")
        if precision not in ("fp32", "bf16"):
            raise ConfigError(f"precision is {precision!r}, expected 'fp32' or 'bf16'")
        self._model, self._masks, self._weights, self._bf16 = model, masks, weights, precision == "bf16"
        if self._masks.dim() != 3 or self._masks.shape[0] != model.num_sites:
            raise ShapeError(f"masks are {list(self._masks.shape)}, expected [{model.num_sites}, T, {model.channels}]")
        pairs = [model.site(number) for number in range(model.num_sites)]
        self._bias = torch.stack([conv.bias for conv, _ in pairs if conv.bias is not None])
        self._ln_weight = torch.stack([norm.weight for _, norm in pairs])
        self._ln_bias = torch.stack([norm.bias for _, norm in pairs])
        self._eps = float(pairs[0][1].eps)
        words = torch.ops.teracon_fast.encoder_words(model.channels, model.kernel_size, self._bf16)
        self._words = torch.empty(len(pairs), words, dtype=torch.int32)
        chosen = [conv.weight for conv, _ in pairs] if weights is None else weights
        for weight, to in zip(chosen, self._words, strict=True):
            torch.ops.teracon_fast.encoder_pack(weight.squeeze(2).contiguous(), self._bf16, torch.get_num_threads(), to)
        self._tasks: dict[int, _TaskConstants] = {}

    @torch.no_grad()
    def encode(
        self, x: Tensor, task: int, drop_last: int = 0, lengths: npt.NDArray[np.int64] | None = None
    ) -> Tensor:
        """States of the last position under one task's mask, as `FastTCN.encode` (Eq. 8).

        Args:
            x: int64 or int32 `[B, L]` item ids on the CPU, oldest first, left-padded with 0.
            task: counted from 0, a column of the masks.
            drop_last: items dropped from the end of each sequence first.
            lengths: real lengths int64 `[B]` before the drop, if known; else computed from x.

        Returns:
            float32 `[B, f]`.

        Raises:
            ShapeError: x, drop_last or lengths do not fit. ConfigError: no such task.
        """
        model = self._model
        if x.dim() != 2 or x.dtype not in (torch.int64, torch.int32) or x.shape[1] < 1:
            raise ShapeError(f"x is {x.dtype} {list(x.shape)}, expected int64 [B, L]")
        length = x.shape[1]
        if not 0 <= drop_last < length:
            raise ShapeError(f"drop_last is {drop_last}, expected 0 to {length - 1}")
        constants = self._constants(task)
        if length not in constants.pads:
            constants.pads[length] = _pad_states(model, constants.mask, length, self._weights)
        lengths = packing.real_lengths(x) if lengths is None else np.asarray(lengths)
        if lengths.shape != (x.shape[0],) or (len(lengths) and not 0 <= lengths.min() <= lengths.max() <= length):
            raise ShapeError(f"lengths must be one number in 0..{length} per sequence, got {lengths!r}")
        real = torch.from_numpy(np.maximum(lengths - drop_last, 0).astype(np.int64))
        layers = _layers(length, model.dilations, model.kernel_size)
        table = model.embeding.stored
        catch_up(table, x)
        out = torch.empty(x.shape[0], model.channels)
        torch.ops.teracon_fast.encode(
            x.to(torch.int64).contiguous(), real, length - drop_last, table.detach().contiguous(), self._words,
            self._bias, constants.ln_weight, constants.ln_bias, constants.pads[length], layers.dilations, model.kernel_size,
            layers.offsets, layers.starts, layers.ranks, self._eps, self._filtered, self._bf16, torch.get_num_threads(), out,
        )  # fmt: skip
        return out

    @property
    def _filtered(self) -> bool:
        return self._model.kernel_size == 3 and self._model.algorithm != "direct"

    def _constants(self, task: int) -> _TaskConstants:
        if not 0 <= task < self._masks.shape[1]:
            raise ConfigError(f"task is {task}, expected 0..{self._masks.shape[1] - 1} (tasks are counted from 0)")
        if task not in self._tasks:
            mask = self._masks[:, task].float().contiguous()
            self._tasks[task] = _TaskConstants(mask, self._ln_weight * mask, self._ln_bias * mask, {})
        return self._tasks[task]


def _pad_states(model: Network, mask: Tensor, length: int, weights: Sequence[Tensor] | None = None) -> Tensor:
    """States of a sequence of pads only, under one mask `[S, f]`: every layer, every position, `[S + 1, L, f]`."""
    geometry = packing.geometry(length, model.dilations, model.kernel_size, every_position=True)
    packed = ops.pack(np.zeros(1, np.int64), [packing.Streams(np.zeros(1, np.int64))], geometry)
    hidden = model.embeding.rows(torch.zeros(1, dtype=torch.int64)).expand(length, -1)
    states = [hidden, *model.layers(hidden, mask[:, None], packed, weights)]
    return torch.stack([state.flip(0) for state in states])  # rows are ordered by offset from the end
