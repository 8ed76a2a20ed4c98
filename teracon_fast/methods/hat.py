"""HAT: hard attention to the task (Serra et al. 2018, arXiv 1801.01423) on the outputs of the convolutions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from teracon_fast.data import Batch
from teracon_fast.methods.base import Group, Sizes, StepContext, group
from teracon_fast.methods.options import Option
from teracon_fast.methods.shared_backbone import SharedBackbone
from teracon_fast.ops.task_masks import plain_masks

Protection = Literal["strict", "as_published"]


class HAT(SharedBackbone):
    """One network under a mask per task, `sigmoid(s e)`; what masks of earlier tasks use is protected from later ones.

    A is the largest mask of the earlier tasks at s_max, `[S, f]`. While a later task trains,

    - a convolution's weights may move by the share `1 - min(A_out, A_in)`: A_out of the channel they make, A_in of the channel
      they read. A block's first convolution reads the residual stream, whose every channel holds the item embedding, which no
      mask touches: there A_in = 1. Its second reads the output of the first: A_in = A_out of that.
    - biases may move by `1 - A_out`, as in the original, and likewise the scale and shift of LayerNorm, which belong to one
      channel of the same site.
    - the item embedding is read by task 0 in full, so A = 1: it stays, unless `train_items`. Each row is a parameter of all
      tasks, and moving it would undo any protection above it.
    - heads and task embeddings of earlier tasks stay.

    LayerNorm divides by statistics over all channels of a site, also those that a mask then drops. So a later task moves what
    an earlier one sees even where every weight that it uses is kept: here HAT forgets, as it does in the paper.

    Args:
        sizes: of the network.
        protection: "strict": the optimizer's update is scaled by that share. "as_published": the gradient is; Adam divides a
            gradient by its own size, so that only a share of exactly 0 then protects.
        weight: of the attention regularization `sum(a (1 - A)) / sum(1 - A)`, a the present mask.
        s_max: s rises to it within an epoch.
        All others: see their `Option`.

    Raises:
        ConfigError: unknown protection, a negative weight, a bound that is not positive, or s_max below 1.
    """

    name = "hat"

    def __init__(
        self,
        sizes: Sizes,
        protection: Annotated[
            Protection,
            Option("what is scaled by the share that may move: the optimizer's update, or the gradient (as published)"),
        ] = "strict",
        weight: Annotated[float, Option("weight of the attention regularization", least=0)] = 0.75,
        s_max: Annotated[float, Option("largest mask scale, also that of inference", per_task=True, least=1)] = 50.0,
        embedding_bound: Annotated[float, Option("task embeddings are clamped to it after each step", above=0)] = 6.0,
        cosh_bound: Annotated[float, Option("bound of s e in the compensation of the embeddings' gradient", above=0)] = 50.0,
        train_items: Annotated[bool, Option("later tasks train the item embedding too")] = False,
    ) -> None:
        super().__init__(sizes)
        self.protection, self.weight, self.s_max = protection, weight, s_max
        self.embedding_bound, self.cosh_bound, self.train_items = embedding_bound, cosh_bound, train_items
        self.check_options()
        self.embeddings = nn.ParameterList()
        self._scale = s_max  # of the step
        self._used: Tensor  # A
        self._protected: list[Tensor] = []
        self._shares: list[Tensor] = []  # by which each protected parameter may move
        self._before: list[Tensor] = []  # copies of them from before the optimizer's step

    def _start(self, task: int) -> None:
        super()._start(task)
        self.embeddings.append(nn.Parameter(torch.randn(self.backbone.num_sites, self.sizes.channels)))

    def masks(self, task: int, s: float) -> Tensor:
        """Masks of a task at all sites, `[S, f]`."""
        return plain_masks(self.embeddings[task], s)

    @torch.no_grad()
    def used(self) -> Tensor:
        """A: the largest mask of all tasks before the present one at s_max, `[S, f]`; zeros for task 0."""
        used = torch.zeros_like(self.embeddings[self.task])
        for task in range(self.task):
            used = torch.maximum(used, self.masks(task, self.s_max))
        return used

    def shares(self, used: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Parameters of the convolutions and LayerNorms, and by what share each of their elements may move; it broadcasts."""
        found: list[tuple[Tensor, Tensor]] = []
        for site in range(self.backbone.num_sites):
            conv, norm = self.backbone.site(site)
            assert conv.bias is not None
            out = used[site]
            read = used[site - 1] if site % 2 else torch.ones_like(out)
            found.append((conv.weight, 1 - torch.minimum(out[:, None], read)[:, :, None, None]))
            found += [(parameter, 1 - out) for parameter in (conv.bias, norm.weight, norm.bias)]
        return found

    def _groups(self, phase: str) -> list[Group]:
        self._used, self._before = self.used(), []
        protected = self.shares(self._used) if self.task else []
        self._protected, self._shares = [parameter for parameter, _ in protected], [share for _, share in protected]
        trained = self.backbone if self.task == 0 or self.train_items else self.backbone.residual_blocks
        return [group(trained, self.head(self.task), [self.embeddings[self.task]])]

    def loss(self, batch: Batch, context: StepContext) -> Tensor:
        """Cross-entropy under the present mask, and the attention regularization times its weight."""
        self._scale = self.result.log["scale"] = context.scale(self.s_max)
        masks = self.masks(self.task, self._scale)
        loss = self.task_loss(self.task, self.backbone, batch, context, masks=masks[:, None])
        free = 1 - self._used
        # Where nothing is free the numerator is zero too.
        open_and_free, most = (masks * free).sum(), free.sum().clamp_min(1e-6)
        self.result.add("class_loss", loss)
        self.result.add("attention_loss", open_and_free / most, self.weight)
        return loss + self.weight * open_and_free / most

    @torch.no_grad()
    def after_backward(self) -> None:
        """Compensate the embeddings' gradient for the annealing; scale the others, or copy the weights before the step."""
        embedding = self.embeddings[self.task]
        if embedding.grad is not None:
            bent = torch.cosh((self._scale * embedding).clamp(-self.cosh_bound, self.cosh_bound)) + 1
            embedding.grad.mul_(self.s_max / self._scale * bent / (torch.cosh(embedding) + 1))
        if self.protection == "as_published":
            for parameter, share in zip(self._protected, self._shares, strict=True):
                if parameter.grad is not None:
                    parameter.grad.mul_(share)
        elif self._protected:
            if not self._before:
                self._before = [torch.empty_like(parameter) for parameter in self._protected]
            torch._foreach_copy_(self._before, self._protected)

    @torch.no_grad()
    def after_step(self) -> None:
        """Clamp the embedding; strict: take back all of the update but its share."""
        self.embeddings[self.task].clamp_(-self.embedding_bound, self.embedding_bound)
        if self.protection == "strict":
            for parameter, share, before in zip(self._protected, self._shares, self._before, strict=True):
                # A share of 0 gives the bits from before, one of 1 those after.
                torch.lerp(before, parameter, share, out=parameter)

    def end_phase(self, phase: str) -> None:
        """Let go of what only training needs."""
        self._protected, self._shares, self._before = [], [], []

    def backbone_options(self, task: int) -> dict[str, Any]:
        """The task's mask at s_max."""
        return {"masks": self.masks(task, self.s_max)[:, None]}

    @torch.no_grad()
    def describe(self) -> dict[str, Any]:
        """Share of mask channels above 1/2 at s_max, of each task; share of channels that no task so far uses."""
        masks = torch.stack([self.masks(task, self.s_max) for task in range(self.task + 1)], 1)
        return {
            "open_mask_share": (masks > 0.5).float().mean((0, 2)).tolist(),
            "free_channels": float((masks.amax(1) <= 0.5).float().mean()),
        }
