"""TERACON in plain PyTorch, slow and obvious: the specification that every optimized operation is tested against.

Of the rest of the package only the errors are imported here, and no optimized code imports this folder. Every function works
in any floating-point dtype on any device. Equation numbers are those of Kim et al., "Task Relation-aware
Continual User Representation Learning", KDD 2023; the "published program" is the code released by its authors.

    masks.py    task embeddings -> masks (Eq. 6, 11 to 13)
    model.py    the masked NextItNet backbone with one head per task (Eq. 7, 8, 20)
    losses.py   cross-entropy, retention loss, rho, annealing (Eq. 15, 16, 18, 19)
    step.py     drawing users and one training step (Eq. 9, 14, 17)
    metrics.py  ranks of the targets, and metrics of the ranks
    dense.py    the backbone as the other methods use it: without relations, with other weights, patches, pre-activation
"""

from __future__ import annotations

from teracon_fast.reference.dense import dense_loss, dense_states, patch_addend
from teracon_fast.reference.losses import annealed_scale, cross_entropy, retention_loss, rho
from teracon_fast.reference.masks import plain_masks, relation_mask
from teracon_fast.reference.metrics import target_rank, top_labels
from teracon_fast.reference.model import ReferenceTCN
from teracon_fast.reference.step import clamp_task_embeddings, continual_step, draw_users, sample_counts, t1_step

__all__ = [
    "ReferenceTCN",
    "annealed_scale",
    "clamp_task_embeddings",
    "continual_step",
    "cross_entropy",
    "dense_loss",
    "dense_states",
    "draw_users",
    "patch_addend",
    "plain_masks",
    "relation_mask",
    "retention_loss",
    "rho",
    "sample_counts",
    "t1_step",
    "target_rank",
    "top_labels",
]
