"""Piggyback (Mallya et al. 2018, arXiv 1801.06519): a binary mask on the weights of one frozen network for each later task."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor, nn

from teracon_fast.errors import ConfigError
from teracon_fast.methods.base import Group, Sizes, group
from teracon_fast.methods.options import Option
from teracon_fast.methods.shared_backbone import SharedBackbone


class Piggyback(SharedBackbone):
    """Task 0 trains the network, which is frozen from then on. A later task trains a mask on its convolution weights, and a head.

    Each convolution weight has a real number r; the weight counts where r is above the threshold and is zero elsewhere. The
    gradient of r is that of the binary mask (straight through). After the task only the binary masks remain, as bits.

    Args:
        sizes: of the network.
        init, threshold, mask_lr: see their `Option`.

    Attributes:
        backbone: the network.
        reals: r of each convolution `[f, f, 1, K]`, from `begin_phase` to `end_phase` of a later task, else empty.
        bits1, bits2, ...: uint8 `[S, ceil(f * f * K / 8)]` of each later task, see `pack_bits`.

    Raises:
        ConfigError: the learning rate is not positive, or a number is not finite.
    """

    name = "piggyback"

    def __init__(
        self,
        sizes: Sizes,
        init: Annotated[float, Option("initial value of the real masks")] = 1e-2,
        threshold: Annotated[float, Option("above it a weight counts")] = 5e-3,
        mask_lr: Annotated[float, Option("learning rate of Adam for the real masks; the head has the task's", above=0)] = 1e-4,
    ) -> None:
        super().__init__(sizes)
        self.init, self.threshold, self.mask_lr = init, threshold, mask_lr
        self.check_options()
        self.reals = nn.ParameterList()

    def _start(self, task: int) -> None:
        super()._start(task)
        self.reals = nn.ParameterList()
        if task > 0:
            ones = [pack_bits(torch.ones(weight.numel(), dtype=torch.bool)) for weight in self.convolutions]
            self.register_buffer(f"bits{task}", torch.stack(ones))

    def bits(self, task: int) -> Tensor:
        """The packed masks of a later task: all ones until it is finished."""
        self.check_task(task)
        if task == 0:
            raise ConfigError("piggyback: task 0 has no masks, expected a later task")
        return self.get_buffer(f"bits{task}")

    def masks(self, task: int) -> list[Tensor]:
        """Which convolution weights a later task uses, bool `[f, f, 1, K]` each; of one in training, as they are now."""
        bits = self.bits(task)
        if task == self.task and len(self.reals):
            return [real.detach() > self.threshold for real in self.reals]
        return [unpack_bits(row, weight.numel()).view_as(weight) for row, weight in zip(bits, self.convolutions, strict=True)]

    def _groups(self, phase: str) -> list[Group]:
        head = self.head(self.task)
        if self.task == 0:
            return [group(self.backbone, head)]
        # Here and not in `_start`: a task that is finished has none in its state.
        self.reals = nn.ParameterList(torch.full_like(weight, self.init) for weight in self.convolutions)
        return [group(self.reals, lr=self.mask_lr), group(head)]

    def end_phase(self, phase: str) -> None:
        """The masks become bits."""
        if self.task > 0:
            found = [pack_bits(mask.flatten()) for mask in self.masks(self.task)]
            self.bits(self.task).copy_(torch.stack(found))
            self.reals = nn.ParameterList()

    def backbone_options(self, task: int) -> dict[str, Any]:
        """Masked weights of a later task; of the one in training their gradient goes to the real masks."""
        if task == 0:
            return {}
        if task == self.task and len(self.reals):
            pairs = zip(self.reals, self.convolutions, strict=True)
            return {"weights": [_Masked.apply(real, weight.detach(), self.threshold) for real, weight in pairs]}
        return {"weights": [torch.where(mask, own, 0) for mask, own in zip(self.masks(task), self.convolutions, strict=True)]}

    def describe(self) -> dict[str, Any]:
        """Share of the convolution weights that each task leaves out; the first has all."""
        total = sum(weight.numel() for weight in self.convolutions)
        kept = [sum(int(mask.sum()) for mask in self.masks(task)) for task in range(1, self.task + 1)]
        return {"sparsity": [0.0, *(1 - count / total for count in kept)]}


class _Masked(torch.autograd.Function):
    """`weight * (real > threshold)`, with the gradient of the binary mask as that of the real one."""

    @staticmethod
    def forward(ctx: Any, real: Tensor, weight: Tensor, threshold: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(weight)
        return torch.where(real > threshold, weight, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return grad * weight, None, None


def pack_bits(flags: Tensor) -> Tensor:
    """Bools `[n]` as uint8 `[ceil(n / 8)]`: number 8 i + j is bit j of byte i, counted from the lowest; bits left over are 0."""
    padded = torch.zeros(-(-len(flags) // 8) * 8, dtype=torch.uint8, device=flags.device)
    padded[: len(flags)] = flags
    places = torch.arange(8, dtype=torch.uint8, device=flags.device)
    return (padded.view(-1, 8) << places).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first bools of `pack_bits`, `[count]`."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> places) & 1).flatten()[:count].bool()
