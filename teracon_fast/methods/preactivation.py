"""The residual block of the original CONURE on packed rows: LayerNorm and ReLU before each convolution instead of after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from teracon_fast import ops, packing
from teracon_fast.errors import ConfigError
from teracon_fast.model.backbone import Backbone, Convolution


class PreActivationBackbone(Backbone):
    """A `Backbone` of pre-activation blocks: `y = conv2(relu(LN2(conv1(relu(LN1(x)))))) + x` (He et al. 2016, arXiv 1603.05027).

    Parameters have the same names and shapes. The first convolution with the LayerNorm and ReLU behind it is one
    `ops.masked_conv`, exactly. The first LayerNorm and ReLU are plain PyTorch over the rows of the block's input, and the last
    convolution, which nothing follows, is `ops.packed_conv`: a gather and a matrix product without a compiled kernel. So half of
    the products run at the speed of the "torch" backend, and the compiled encoder does not serve.

    `run` raises ConfigError where masks or `convolve` are given.
    """

    def run(
        self, x: Tensor, requests: Sequence[tuple[Tensor | None, int]], masks: Tensor | None = None,
        lengths: np.ndarray | None = None, every_position: bool = False, weights: Sequence[Tensor] | None = None,
        convolve: Convolution | None = None,
    ) -> tuple[Tensor, packing.PackedBatch]:  # fmt: skip
        if masks is not None or convolve is not None:
            given = "masks" if masks is not None else "convolve"
            raise ConfigError(f"a pre-activation backbone got {given}, expected neither masks nor convolve")
        return super().run(x, requests, None, lengths, every_position, weights)

    def layers(
        self, hidden: Tensor, masks: Tensor, packed: packing.PackedBatch, weights: Sequence[Tensor] | None = None,
        convolve: Convolution | None = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        for i, (block, residual) in enumerate(zip(self.blocks, packed.residuals, strict=True)):
            first, second = packed.convolutions[2 * i : 2 * i + 2]
            own = (block.conv1.weight, block.conv2.weight) if weights is None else weights[2 * i : 2 * i + 2]
            biases = block.conv1.bias, block.conv2.bias
            assert biases[0] is not None and biases[1] is not None
            active = F.layer_norm(hidden, (self.channels,), block.ln1.weight, block.ln1.bias, block.ln1.eps).relu()
            inner = ops.masked_conv(
                active, own[0].squeeze(2), biases[0], block.ln2.weight, block.ln2.bias, masks[2 * i], first,
                eps=block.ln2.eps, backend=self.backend, algorithm=self.algorithm,
            )  # fmt: skip
            yield inner
            hidden = ops.packed_conv(
                inner, own[1].squeeze(2), biases[1], second, residual=hidden, residual_table=residual
            )
            yield hidden
