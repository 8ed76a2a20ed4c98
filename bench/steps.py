"""Everything here that calls the trainer or a method: training steps of ours, and of the methods in their eager dense form.

A step is a function without arguments that trains once and returns losses by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.shapes import Shape
from teracon_fast import FastTCN
from teracon_fast.data import Batch
from teracon_fast.methods import METHODS, Method, PeterRec, Place, Sizes
from teracon_fast.methods.peterrec import Patches
from teracon_fast.methods.preactivation import PreActivationBackbone
from teracon_fast.methods.sequence import train_step
from teracon_fast.methods.teracon_graphs import StepGraphs
from teracon_fast.model.backbone import Backbone
from teracon_fast.reference import dense_loss, patch_addend
from teracon_fast.train.loop import continual_step, make_optimizer, t1_step

Step = Callable[[], dict[str, Tensor]]

PLACE = Place(5, 10)  # half way through an epoch
S_TRAINING = 25.0  # the mask scale there
ALPHA = 0.7
NAMES = tuple(name for name in METHODS if name not in ("teracon", "parameter_masks"))  # with the ordinary loss


def first_step(model: FastTCN, x: Tensor, lr: float, low: bool, graphs: bool = False) -> Step:
    """TERACON's step of task 1. `low`: in bf16. `graphs`: replayed as CUDA graphs."""
    precision: Any = "bf16" if low else "fp32"
    optimizer, recorded = make_optimizer(model, lr), StepGraphs(model, precision=precision) if graphs else None
    return lambda: {"loss": t1_step(model, optimizer, x, S_TRAINING, precision, graphs=recorded).class_loss}


def later_step(
    model: FastTCN, teacher: FastTCN, x: Tensor, y: Tensor, users: Sequence[Tensor], rho: Sequence[float], lr: float, low: bool,
    graphs: bool = False,
) -> Step:  # fmt: skip
    """TERACON's step of a later task with retention of `users`, drawn with the rates `rho`; reads the next step's rates, as
    training does."""
    precision: Any = "bf16" if low else "fp32"
    optimizer, recorded = make_optimizer(model, lr), StepGraphs(model, teacher, ALPHA, precision=precision) if graphs else None
    inputs = x, y, users, rho, S_TRAINING, ALPHA

    def step() -> dict[str, Tensor]:
        found = continual_step(model, teacher, optimizer, *inputs, precision=precision, graphs=recorded)
        assert found.retention_loss is not None and found.next_rho is not None
        rates = torch.tensor(found.next_rho.tolist())
        return {"loss": found.class_loss, "retention": found.retention_loss, "rho": rates}

    return step


def method_step(
    name: str, options: Mapping[str, Any], task: int, shape: Shape, dense: bool = False,
    compiled: Callable[[Any], Any] | None = None,
) -> Step:  # fmt: skip
    """A step of another method's first or second task (0 or 1), from weights that are the same in every call of this function.

    Args:
        options: of the method.
        dense: as an eager program computes it, all positions and logits (`reference.dense`), under `torch.optim.Adam`.
        compiled: applied to the dense loss.
    """
    sizes = Sizes(shape.labels[0], shape.channels, shape.dilations, shape.kernel_size)
    method = METHODS[name](sizes, **options)
    generator, batches = torch.Generator().manual_seed(0), []
    for number, users in zip(range(task + 1), (shape.first_batch, shape.batch), strict=False):
        method.start(number, shape.labels[number], generator)
        y = torch.randint(shape.labels[number], (users,), generator=torch.Generator().manual_seed(users))
        batches.append(Batch(shape.items(users), y, shape.lengths(users)))
    groups = method.begin_phase("train")
    optimizer = torch.optim.Adam(groups, lr=1e-4) if dense else make_optimizer(method, 1e-4, groups)
    if dense:
        make_dense(method, compiled or (lambda loss: loss))
    others = {other: batches[other] for other in method.companions()}
    return lambda: {"loss": train_step(method, optimizer, batches[task], PLACE, others)}


def make_dense(method: Method, compiled: Callable[[Any], Any]) -> None:
    """From here on the method's losses are those of `reference.dense`; all else of it stays."""
    loss = compiled(dense_loss)

    def task_loss(
        task: int, backbone: Backbone, batch: Batch, head: nn.Linear | None = None, masks: Tensor | None = None,
        weights: Sequence[Tensor] | None = None, convolve: object = None,
    ) -> Tensor:  # fmt: skip
        addend = None
        if convolve is not None:
            assert isinstance(method, PeterRec)
            patches = method.patches[task - 1]
            assert isinstance(patches, Patches)
            down, up = zip(*((patch.down, patch.up) for patch in patches.patches), strict=True)
            addend = patch_addend(down, up, method.slope)
        masks = None if masks is None else masks[:, 0]
        before = isinstance(backbone, PreActivationBackbone)
        found: Tensor = loss(task, backbone, head or method.head(task), batch, masks, weights, before, addend)
        return found

    method.task_loss = task_loss  # type: ignore[method-assign,assignment]
