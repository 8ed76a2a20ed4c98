"""PeterRec: the network of task 1 stays as it is, and every later task has small patches beside its convolutions.

Yuan et al., "Parameter-Efficient Transfer from Sequential Behaviors for User Modeling and Recommendation", SIGIR 2020, with
parallel patches: the output of each convolution, before LayerNorm, gains `W2 leaky(W1 x + b1) + b2` of its input at the same
position, f -> f/4 -> f.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from teracon_fast import ops, packing
from teracon_fast.errors import ConfigError
from teracon_fast.methods.base import Group, Sizes, group
from teracon_fast.methods.options import Option
from teracon_fast.methods.shared_backbone import SharedBackbone
from teracon_fast.model.backbone import Backbone


class Patch(nn.Module):
    """What one task adds to one convolution: `up(leaky(down(x)))`, run by `Patches.convolve`.

    It begins as zero: `up` is zeros, so a new task starts as the frozen network, exactly. `down` has PyTorch's default
    initialization, so that `up` has a gradient from the first step on; `down` has one from the second.
    """

    def __init__(self, channels: int, bottleneck: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, bottleneck), nn.Linear(bottleneck, channels)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)


class Patches(nn.Module):
    """The patches of one task, one a convolution.

    Args:
        sites: S, number of convolutions. channels: f. bottleneck: width between the two layers. slope: of the LeakyReLU.
    """

    def __init__(self, sites: int, channels: int, bottleneck: int, slope: float) -> None:
        super().__init__()
        self.patches = nn.ModuleList(Patch(channels, bottleneck) for _ in range(sites))
        self.slope = slope

    def convolve(
        self, backbone: Backbone, site: int, x: Tensor, mask: Tensor, table: packing.TapTable,
        residual: Tensor | None = None, residual_table: packing.ResidualTable | None = None, weight: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """`Backbone.convolve` with the site's patch beside the convolution; its last tap is what reads the same position."""
        conv, norm = backbone.site(site)
        patch = cast(Patch, self.patches[site])
        assert conv.bias is not None
        # The bottleneck of all input rows, then of those wanted: less is gathered than of the input. Padding reads any.
        bottleneck = ops.gather_rows(F.leaky_relu(patch.down(x), self.slope), table.taps[:, -1].clamp_min(0).long())
        return ops.masked_conv(
            x, (conv.weight if weight is None else weight).squeeze(2), conv.bias, norm.weight, norm.bias, mask, table,
            residual=residual, residual_table=residual_table, addend=patch.up(bottleneck), eps=norm.eps,
            backend=backbone.backend, algorithm=backbone.algorithm,
        )  # fmt: skip


class PeterRec(SharedBackbone):
    """Task 0 trains the network. After it the network is frozen; each later task trains its patches and its head.

    Nothing that an earlier task uses changes, so nothing is forgotten. The patches of a task have 529,408 parameters at
    f = 256 and 8 blocks, a sixth of what the convolutions have.

    Args:
        sizes: of the network.
        reduction, slope: see their `Option`.

    Attributes:
        backbone: the network of task 0.
        patches: of each later task.

    Raises:
        ConfigError: the bottleneck would have no channel, or a slope outside [0, 1).
    """

    name = "peterrec"

    def __init__(
        self,
        sizes: Sizes,
        reduction: Annotated[int, Option("channels divided by the width of a patch's bottleneck")] = 4,
        slope: Annotated[float, Option("of the LeakyReLU inside a patch")] = 0.01,
    ) -> None:
        super().__init__(sizes)
        if not 1 <= reduction <= sizes.channels:
            raise ConfigError(f"peterrec: reduction is {reduction}, expected 1 to {sizes.channels}, the channels")
        if not 0 <= slope < 1:
            raise ConfigError(f"peterrec: slope is {slope}, expected at least 0 and less than 1")
        self.reduction, self.slope = reduction, slope
        self.bottleneck = sizes.channels // reduction
        self.patches = nn.ModuleList()

    def _start(self, task: int) -> None:
        super()._start(task)
        if task:
            self.patches.append(Patches(self.backbone.num_sites, self.sizes.channels, self.bottleneck, self.slope))

    def _groups(self, phase: str) -> list[Group]:
        return [group(self.backbone if self.task == 0 else self.patches[self.task - 1], self.head(self.task))]

    def backbone_options(self, task: int) -> dict[str, Any]:
        """Convolutions with the patches of a later task."""
        return {"convolve": partial(cast(Patches, self.patches[task - 1]).convolve, self.backbone)} if task else {}
