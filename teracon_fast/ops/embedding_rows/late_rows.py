"""Parameters with late rows: a lazy optimizer registers their missed updates, which readers of rows apply first."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class Updates(Protocol):
    """The updates that rows of a parameter have missed."""

    def catch_up(self, parameter: Tensor, items: Tensor | None = None) -> None:
        """Apply them to the rows `items`, int64 `[n]`, or to all rows."""


_registered: WeakIdKeyDictionary = WeakIdKeyDictionary()


def registered(parameter: Tensor) -> Updates | None:
    """The updates that rows of a parameter may have missed, if any are registered."""
    found: Updates | None = _registered.get(parameter)
    return found


def register(parameter: Tensor, updates: Updates | None) -> None:
    """Register the updates that rows of a parameter may have missed; None: no row is late."""
    if updates is not None:
        _registered[parameter] = updates
    elif parameter in _registered:
        del _registered[parameter]


def catch_up(parameter: Tensor, items: Tensor | None = None) -> None:
    """Bring the rows `items`, int64 or int32 of any shape, or all rows of a parameter up to date, before they are read.

    Items out of range are skipped here; reading them raises.
    """
    # Not as a decorator: it would load the compiler with this module.
    run = torch.compiler.disable(_catch_up) if torch.compiler.is_compiling() else _catch_up
    run(parameter, items)


@torch.no_grad()
def _catch_up(parameter: Tensor, items: Tensor | None) -> None:
    updates = registered(parameter)
    if updates is not None:
        updates.catch_up(parameter, items)
