"""Parameters of methods: their gradients, and which have changed."""

from __future__ import annotations

from torch import Tensor, equal

from teracon_fast.methods import Method


def gradients(method: Method) -> dict[str, Tensor]:
    """Gradients of all parameters that have one; afterwards none has."""
    found = {name: p.grad.to_dense().clone() for name, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    return found


def snapshot(method: Method) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {name: value.clone() for name, value in method.state_dict().items()}


def changed(before: dict[str, Tensor], method: Method) -> set[str]:
    """Names of what in the state dict is no longer the same, bit by bit."""
    now = method.state_dict()
    return {name for name, value in before.items() if not equal(value, now[name])}
