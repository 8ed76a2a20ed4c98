"""What the growth of any method checks, and the rows that it copies; see `Method.grown`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from teracon_fast.errors import ConfigError


def check_growth(name: str, refusal: str, old: Sequence[int], new: Sequence[int]) -> None:
    """Check that a method can grow.

    Args:
        name: of the method. refusal: why it cannot grow at all, or "".
        old, new: number of items, then of labels of each task.

    Raises:
        ConfigError: it cannot, there would be fewer items or labels, or counts of other tasks are given.
    """
    if refusal:
        raise ConfigError(f"{name} cannot grow: {refusal}")
    if len(new) != len(old) or any(count < before for count, before in zip(new, old, strict=True)):
        counts = (f"{items} items and {labels} labels" for items, *labels in (new, old))
        raise ConfigError("{}: got {}, expected one count per task, at least {}".format(name, *counts))


def copy_rows(name: str, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
    """Copy every tensor of a state into the first rows of the tensor of that name in a larger one.

    Raises:
        ConfigError: tensors differ in more than their number of rows.
    """
    for key, value in old.items():
        if key not in new or new[key].shape[1:] != value.shape[1:] or len(new[key]) < len(value):
            raise ConfigError(f"{name}: {key} of shape {list(value.shape)} cannot grow by rows")
        new[key][: len(value)] = value
