"""Gradients of the reference against finite differences in float64, with respect to every parameter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from teracon_fast.reference import ReferenceTCN
from teracon_fast.reference.step import continual_loss, frozen_copy, next_item_loss

PARA = {"item_size": 5, "dilated_channels": 3, "dilations": [1, 2], "kernel_size": 3, "task_embs": [-1, 1]}


def generic_model(labels: list[int] | None, variant: str = "relation", blocks: int = 2) -> ReferenceTCN:
    """Float64, every parameter moved away from its initial value, so that no term is small or zero by chance."""
    para = {**PARA, "dilations": PARA["dilations"][:blocks]}  # type: ignore[index]
    if labels is not None:
        para |= {"num_task": len(labels), "target_item_size": labels}
    model = ReferenceTCN(para, variant).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


class Loss(nn.Module):
    """A function of a model, as a module, so that gradcheck can replace the model's parameters."""

    def __init__(self, model: ReferenceTCN, function: Callable[[ReferenceTCN], Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self) -> Tensor:
        return self.function(self.model)


def check(model: ReferenceTCN, function: Callable[[ReferenceTCN], Tensor]) -> None:
    module = Loss(model, function)
    names, values = zip(*module.named_parameters(), strict=True)

    def of_parameters(*new_values: Tensor) -> Tensor:
        result: Tensor = functional_call(module, dict(zip(names, new_values, strict=True)), ())
        return result

    assert torch.autograd.gradcheck(of_parameters, values, atol=1e-7, rtol=1e-5)


def test_next_item_loss() -> None:
    x = torch.tensor([[0, 0, 3, 1, 4], [0, 2, 2, 1, 3]])
    check(generic_model(None), lambda model: next_item_loss(model, x, s=1.3))


@pytest.mark.parametrize("variant", ["relation", "positive_only", "none"])
def test_logits_of_the_last_position(variant: str) -> None:
    x = torch.tensor([[0, 0, 3, 1], [1, 2, 2, 4]])
    check(generic_model([5, 3, 2], variant), lambda model: model(x, 1.3, [], 1, onecall=True)[0])


@pytest.mark.parametrize("student_mask", ["past", "current"])
def test_loss_of_a_later_task(student_mask: str) -> None:
    x, y = torch.tensor([[0, 0, 3, 1], [1, 2, 2, 4], [0, 4, 1, 1]]), torch.tensor([1, 0, 1])
    users = [torch.tensor([2, 0]), torch.tensor([1])]
    teacher = frozen_copy(generic_model([5, 3], blocks=1))

    def loss(model: ReferenceTCN) -> Tensor:
        class_loss, retention = continual_loss(model, teacher, x, y, users, [0.4, 0.1], 1.3, student_mask)
        return class_loss + 0.7 * retention

    check(generic_model([5, 3, 2], blocks=1), loss)
