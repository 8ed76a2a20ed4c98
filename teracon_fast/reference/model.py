"""The masked NextItNet backbone with one linear head per task, dense: computes every position of every sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teracon_fast.errors import ConfigError, ShapeError
from teracon_fast.reference.masks import check_variant, num_relation_weights, plain_masks, relation_mask

_KEYS = ("item_size", "dilated_channels", "dilations", "kernel_size", "task_embs")


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    """out[p] = bias + sum_k weight[:, :, 0, k] @ x[p - (K-1-k) * dilation]; positions before the first are zero.

    Args:
        x: [B, L, f]. weight: [f, f, 1, K]. bias: [f].

    Returns:
        [B, L, f].
    """
    zeros_left = (weight.shape[-1] - 1) * dilation
    # As an image of height 1, as published: conv1d sums in another order and gives other last bits.
    padded = F.pad(x.transpose(1, 2).unsqueeze(2), (zeros_left, 0))
    return F.conv2d(padded, weight, bias, dilation=dilation).squeeze(2).transpose(1, 2)


class ReferenceBlock(nn.Module):
    """One residual block: h = m1 * relu(LN1(conv1(x))), out = m2 * relu(LN2(conv2(h))) + x (Eq. 7).

    conv1 has the block's dilation, conv2 twice that. It also has the task embeddings `ec` and the relation weights
    `mlp1`, `mlp2` of its two sites, under the published state-dict names.
    """

    def __init__(
        self, channels: int, kernel_size: int, dilation: int, e_range: tuple[float, float], tasks: int, rows: int
    ) -> None:
        super().__init__()
        self.dilation = dilation
        # Created and initialized in the published order, so that a seed gives the published program's weights.
        self.conv1 = nn.Conv2d(channels, channels, (1, kernel_size))
        self.ln1 = nn.LayerNorm(channels, eps=1e-8)
        self.conv2 = nn.Conv2d(channels, channels, (1, kernel_size))
        self.ln2 = nn.LayerNorm(channels, eps=1e-8)
        self.ec = nn.ModuleList(nn.Embedding(2, channels) for _ in range(tasks))
        for embedding in self.ec:
            nn.init.uniform_(embedding.weight, *e_range)  # type: ignore[arg-type]
        if rows:
            self.mlp1 = nn.ModuleList(nn.Linear(rows, 1) for _ in range(tasks))
            self.mlp2 = nn.ModuleList(nn.Linear(rows, 1) for _ in range(tasks))
            for first, second in zip(self.mlp1, self.mlp2, strict=True):
                init_linear(first)
                init_linear(second)

    def relation_masks(self, task: int, s: float, variant: str) -> list[Tensor]:
        """Eq. 12 at both sites: two tensors [f]."""
        embeddings = torch.stack([embedding.weight for embedding in self.ec], 1)  # type: ignore[misc]  # [2, T, f]
        mlps = self.mlp1[task], self.mlp2[task]
        pairs = zip(embeddings, mlps, strict=True)
        return [relation_mask(e, mlp.weight[0], mlp.bias[0], task, s, variant) for e, mlp in pairs]  # type: ignore[index]

    def plain_masks(self, task: int, s: float) -> list[Tensor]:
        """Eq. 6 at both sites: two tensors [f]."""
        return [plain_masks(self.ec[task].weight[site], s) for site in (0, 1)]  # type: ignore[index]

    def forward(self, x: Tensor, mask1: Tensor, mask2: Tensor) -> Tensor:
        """x [B, L, f], masks [f] -> [B, L, f] (Eq. 7)."""
        h = mask1 * F.relu(self.ln1(causal_conv(x, self.conv1.weight, self.conv1.bias, self.dilation)))  # type: ignore[arg-type]
        h = mask2 * F.relu(self.ln2(causal_conv(h, self.conv2.weight, self.conv2.bias, 2 * self.dilation)))  # type: ignore[arg-type]
        return h + x


def init_linear(linear: nn.Module) -> None:
    """Published initialization of heads and relation weights: weight N(0, 0.01), bias 0.1."""
    assert isinstance(linear, nn.Linear)
    nn.init.normal_(linear.weight, 0.0, 0.01)
    nn.init.constant_(linear.bias, 0.1)


class ReferenceTCN(nn.Module):
    """The published network: constructor dict, call and state-dict names of the published program.

    Args:
        model_para: keys item_size (V, of which index 0 is the pad, embedded like any item), dilated_channels (f), dilations,
            kernel_size, task_embs (range of the uniform initialization of e). With num_task (T) and target_item_size
            (labels of each task) it is the network of several tasks; without num_task it is the network of task 1, which
            has one head over the items, plain masks and no relation weights. Other keys are kept but unused.
        variant: mask variant, see `masks.relation_mask`.

    Raises:
        ConfigError: a key is missing or the number of heads is not num_task.
    """

    def __init__(self, model_para: Mapping[str, Any], variant: str = "relation") -> None:
        super().__init__()
        check_variant(variant)
        multi_task = "num_task" in model_para
        missing = [key for key in (*_KEYS, *(("target_item_size",) if multi_task else ())) if key not in model_para]
        if missing:
            raise ConfigError(f"model_para: got keys {sorted(model_para)}, missing {', '.join(missing)}")
        self.model_para = dict(model_para)
        self.variant = variant
        self.num_tasks = int(model_para["num_task"]) if multi_task else 1
        # The published program passes the labels of all tasks to the teacher too, which uses all but the last.
        heads = list(model_para["target_item_size"])[: self.num_tasks] if multi_task else [model_para["item_size"]]
        self.labels = [int(n) for n in heads]
        if len(self.labels) != self.num_tasks:
            raise ConfigError(f"target_item_size: got {len(self.labels)} entries, expected num_task = {self.num_tasks}")
        channels, items = int(model_para["dilated_channels"]), int(model_para["item_size"])
        rows = num_relation_weights(self.num_tasks, variant) if multi_task else 0
        self.has_relation = rows > 0

        self.embeding = nn.Embedding(items, channels)
        nn.init.uniform_(self.embeding.weight, -((1.0 / items) ** 0.5), (1.0 / items) ** 0.5)
        low, high = model_para["task_embs"]
        self.residual_blocks = nn.ModuleList(
            ReferenceBlock(channels, int(model_para["kernel_size"]), int(d), (low, high), self.num_tasks, rows)
            for d in model_para["dilations"]
        )
        self.task_classifier = nn.ModuleList(nn.Linear(channels, n) for n in self.labels)
        for head in self.task_classifier:
            init_linear(head)

    def task_masks(self, task: int, s: float, plain: bool = False) -> Tensor:
        """Masks of one task, [S, f], S = 2 * blocks sites in network order: Eq. 6 if `plain`, else Eq. 12."""
        masks: list[Tensor] = []
        for block in self.residual_blocks:
            assert isinstance(block, ReferenceBlock)
            if plain or not self.has_relation:
                masks += block.plain_masks(task, s)
            else:
                masks += block.relation_masks(task, s, self.variant)
        return torch.stack(masks)

    def all_masks(self, s: float) -> Tensor:
        """[S, T, f]: masks of all tasks at all sites; those of a single task are plain (Eq. 6)."""
        return torch.stack([self.task_masks(t, s, plain=self.num_tasks == 1) for t in range(self.num_tasks)], dim=1)

    def hidden(self, x: Tensor, mask_per_site: Tensor) -> Tensor:
        """M(x; m) at every position (Eq. 8).

        Args:
            x: item indices, int64 [B, L]. mask_per_site: [S, f].

        Returns:
            [B, L, f].
        """
        if x.dim() != 2 or len(mask_per_site) != 2 * len(self.residual_blocks):
            raise ShapeError(
                f"hidden: got x {list(x.shape)} and masks {list(mask_per_site.shape)}, "
                f"expected [B, L] and [{2 * len(self.residual_blocks)}, f]"
            )
        state: Tensor = self.embeding(x)
        for k, block in enumerate(self.residual_blocks):
            state = block(state, mask_per_site[2 * k], mask_per_site[2 * k + 1])
        return state

    def forward(
        self, x: Tensor, s: float, masks_list: list[Tensor], task_num: int, gpu_num: Any = None, onecall: bool = False,
        backward: bool = False, new_task: int = 2,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """The published call.

        Args:
            x: int64 [B, L]. s: mask scale.
            masks_list: extended in place with the S masks, each [1, f], in network order.
            task_num: task whose mask and head are used, from 0.
            gpu_num: ignored; the model runs where its parameters are.
            onecall: logits of the last position only.
            backward, new_task: the plain mask (Eq. 6) is used when `task_num != new_task and new_task == 1 and not
                backward`, else the relation mask. The network of task 1 always uses the plain mask.

        Returns:
            (logits, masks_list): logits [B, C] if onecall, else [B*L, C].
        """
        plain = task_num != new_task and new_task == 1 and not backward
        masks = self.task_masks(task_num, s, plain)
        masks_list += [mask.unsqueeze(0) for mask in masks]
        state = self.hidden(x, masks)
        state = state[:, -1] if onecall else state.flatten(0, 1)
        return self.task_classifier[task_num](state), masks_list

    def extended(self, num_labels: int) -> ReferenceTCN:
        """A model with one more task: backbone, e and heads copied, the new task and all relation weights newly initialized."""
        model_para = {**self.model_para, "num_task": self.num_tasks + 1, "target_item_size": [*self.labels, num_labels]}
        model = ReferenceTCN(model_para, self.variant).to(self.embeding.weight)
        kept = {name: value for name, value in self.state_dict().items() if ".mlp" not in name}
        model.load_state_dict(kept, strict=False)
        return model
