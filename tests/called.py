"""Tells of every call of PyTorch while it is active.

Methods of tensors are not replaced for that where they are special: `Tensor.__getitem__`, replaced and put back, leaves the
class a sequence to Python's C interface, and from then on `torch.tensor` of a list of numbers that are tensors fails in the
whole process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode


class Calls(TorchFunctionMode):
    """Calls `told(name, arguments)` before each function or method of PyTorch runs."""

    def __init__(self, told: Callable[[str, tuple[Any, ...]], None]) -> None:
        super().__init__()
        self.told = told

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.told(function.__name__, arguments)
        return function(*arguments, **(options or {}))
