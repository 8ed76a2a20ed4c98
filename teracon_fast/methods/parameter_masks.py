"""TERACON with masks on parameters in place of outputs: the comparison of the paper's Figure 3.

What is masked. Appendix B.3 compares with "directly masking the model parameters": "masking all parameters require the same
number of parameters for masking since the masking operation is done via an elementwise product operation". Section 4.1 says of
masks on parameters, CONURE's, that they lie on "the actual model parameters in each layer (e.g., weights of convolutional filters
in a CNN layer)", of the shape of the layer's parameter (Section 3.4). So here: every element of every convolution's weight has a
mask of its own, `W * m`; biases, LayerNorms, item embedding and heads have none. All else is TERACON's: task embeddings, now
`[f * f * K]` at each site, relation masks by Eq. 12 over them, rho by Eq. 15, retention, annealing, the clamp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from teracon_fast import ops
from teracon_fast.methods.teracon import Teracon
from teracon_fast.model.backbone import Convolution, PackedPositions
from teracon_fast.model.fast_tcn import Encode, FastTCN


class WeightMaskedTCN(FastTCN):
    """`FastTCN` whose masks multiply the convolutions' weights: wherever it takes or returns masks, they are `[S, n, f * f * K]`.

    A task's embedding at a site is in the order of the weight `[f, f, 1, K]`. Tasks have weights of their own, so each is a pass
    of its own over its users. Task masks are formed by plain PyTorch whatever the backend: the kernels hold f channels of a mask
    at once, not f^2 * K.

    Arguments: those of `FastTCN`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for block in self.blocks:
            size = block.conv1.weight.numel()
            block.ec = nn.ModuleList(nn.Embedding(2, size) for _ in range(self.num_tasks))
            for embedding in block.task_embeddings:
                nn.init.uniform_(embedding, *self.task_embedding_range)

    def masked_weights(self, masks: Tensor) -> list[Tensor]:
        """The weights of all convolutions under one set of masks `[S, f * f * K]`: S tensors `[f, f, 1, K]`."""
        weights = [self.site(number)[0].weight for number in range(self.num_sites)]
        return [weight * mask.view_as(weight) for weight, mask in zip(weights, masks.unbind(0), strict=True)]

    def positions(
        self, x: Tensor, masks: Tensor | None = None, lengths: np.ndarray | None = None,
        weights: Sequence[Tensor] | None = None, convolve: Convolution | None = None,
    ) -> PackedPositions:  # fmt: skip
        if masks is not None:
            weights = self.masked_weights(masks[:, 0])
        return super().positions(x, None, lengths, weights, convolve)

    def _last_states(
        self, x: Tensor, requests: Sequence[tuple[Tensor | None, int]], chosen: Tensor, lengths: np.ndarray | None
    ) -> list[Tensor]:
        found = []
        for (users, drop), masks in zip(requests, chosen.unbind(1), strict=True):
            weights = self.masked_weights(masks)
            if users is None:
                found.append(self.represent(x, None, drop, lengths, weights))
            else:
                hidden, packed = self.run(x, [(users, drop)], None, lengths, weights=weights)
                found.append(ops.gather_rows(hidden, packed.outputs[0]))
        return found

    def encoder(self, s: float = 50.0) -> Encode:  # type: ignore[override]
        with torch.no_grad():
            masks = self.masks(s)

        @torch.no_grad()
        def encode(x: Tensor, task: int, drop_last: int = 0, lengths: np.ndarray | None = None) -> Tensor:
            self._check_task(task)
            return self._last_states(x, [(None, drop_last)], masks[:, task : task + 1], lengths)[0]

        return encode

    def _backend_of(self, operation: str) -> str:
        return "torch" if operation == "task_masks" else super()._backend_of(operation)


class ParameterMasks(Teracon):
    """TERACON with masks on the convolutions' weights (Figure 3): a task costs as many parameters as those weights are.

    Arguments and attributes: those of `Teracon`; its network is a `WeightMaskedTCN`.
    """

    name = "parameter_masks"
    network = WeightMaskedTCN
