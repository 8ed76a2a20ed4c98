"""Everything here that calls the trainer or a method: training steps of ours, and of the methods in their eager dense form.

A step is a function without arguments that trains once and returns losses by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.shapes import Shape
from teracon_fast import FastTCN
from teracon_fast.data import Batch
from teracon_fast.methods import METHODS, Method, PeterRec, Sizes, StepContext, Teracon
from teracon_fast.methods.peterrec import Patches
from teracon_fast.methods.preactivation import PreActivationBackbone
from teracon_fast.model.backbone import Backbone
from teracon_fast.packing import real_lengths
from teracon_fast.reference import dense_loss, patch_addend
from teracon_fast.train.loop import make_optimizer, train_step

Step = Callable[[], dict[str, Tensor]]

CONTEXT = StepContext(batch=5, num_batches=10.0)  # halfway through an epoch
S_TRAINING = CONTEXT.scale(50.0)  # the mask scale there
ALPHA = 0.7
NAMES = tuple(name for name in METHODS if name not in ("teracon", "parameter_masks"))  # with the ordinary loss


def first_step(model: FastTCN, x: Tensor, lr: float, low: bool, graphs: bool = False) -> Step:
    """TERACON's step of task 1. `low`: in bf16. `graphs`: replayed as CUDA graphs."""
    step = _teracon_step(Teracon.around(model), x, x.new_empty(0), lr, low, graphs)
    return lambda: {"loss": step()["class_loss"]}


def later_step(
    model: FastTCN, teacher: FastTCN, x: Tensor, y: Tensor, users: Sequence[Tensor], rho: Sequence[float], lr: float, low: bool,
    graphs: bool = False,
) -> Step:  # fmt: skip
    """TERACON's step of a later task with retention of `users`, drawn with the rates `rho`; reads the next step's rates, as
    training does."""
    method = Teracon.around(model, teacher, alpha=ALPHA)
    method.draw_users = lambda *_: list(users)  # type: ignore[method-assign]
    step = _teracon_step(method, x, y, lr, low, graphs)

    def with_rates() -> dict[str, Tensor]:
        method.rho = list(rho)
        found = step()
        return {"loss": found["class_loss"], "retention": found["retention_loss"], "rho": torch.tensor(method.rho)}

    return with_rates


def _teracon_step(method: Teracon, x: Tensor, y: Tensor, lr: float, low: bool, graphs: bool) -> Step:
    if graphs:
        method.enable_graphs()
    optimizer = make_optimizer(method, lr, method.begin_phase("train"))
    batch, context = Batch(x, y, real_lengths(x)), replace(CONTEXT, precision="bf16" if low else "fp32")
    return lambda: train_step(method, optimizer, batch, context).losses


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
    context = replace(CONTEXT, companions={other: batches[other] for other in method.companions()})

    def step() -> dict[str, Tensor]:
        found = train_step(method, optimizer, batches[task], context)
        return {"loss": sum((found.weights.get(name, 1.0) * part for name, part in found.losses.items()), torch.zeros(()))}

    return step


def make_dense(method: Method, compiled: Callable[[Any], Any]) -> None:
    """From here on the method's losses are those of `reference.dense`; all else of it stays."""
    loss = compiled(dense_loss)

    def task_loss(
        task: int, backbone: Backbone, batch: Batch, context: StepContext | None = None, head: nn.Linear | None = None,
        masks: Tensor | None = None, weights: Sequence[Tensor] | None = None, convolve: object = None,
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
