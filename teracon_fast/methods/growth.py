"""What any method's growth checks, and the rows that it copies; see `Method.grown`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from teracon_fast.errors import ConfigError

if TYPE_CHECKING:
    from teracon_fast.methods.base import Method


def check_growth(method: Method, num_items: int, labels: Sequence[int]) -> None:
    """Raise ConfigError if the method cannot grow, or if there would be fewer items or labels."""
    if method.growth_refusal:
        raise ConfigError(f"{method.name} cannot grow: {method.growth_refusal}")
    if num_items < method.sizes.num_items:
        raise ConfigError(f"{method.name}: got {num_items} items, expected at least {method.sizes.num_items}")
    if len(labels) != len(method.labels) or any(new < old for new, old in zip(labels, method.labels, strict=True)):
        raise ConfigError(f"{method.name}: got labels {list(labels)}, expected one count per task, at least {method.labels}")


def copy_rows(old: Method, new: Method) -> None:
    """Copy every tensor of a state into the first rows of the tensor of that name of a larger one.

    Raises:
        ConfigError: tensors differ in more than their number of rows.
    """
    state = new.state_dict()
    for name, value in old.state_dict().items():
        if name not in state or state[name].shape[1:] != value.shape[1:] or len(state[name]) < len(value):
            raise ConfigError(f"{old.name}: {name} of shape {list(value.shape)} cannot grow by rows")
        state[name][: len(value)] = value
