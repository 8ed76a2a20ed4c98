"""Lazy Adam: rows of a parameter take their steps without a gradient when they are next read, with the same bits.

At every step Adam moves all rows of an embedding, but few of them are read before the next one. `LazyRows` keeps the number of
steps that each row has taken, and the constants of all steps; the missed ones are taken later, in the same order.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from teracon_fast.ops.embedding_rows import catch_up as catch_up
from teracon_fast.ops.embedding_rows import embedding_rows, registered

# From this eps on the compiled kernels may take moments below the smallest normal number for zero.
LEAST_EPS = 1e-10
# Floats in a vector of torch's fused kernel, which has no AVX-512 form.
_TORCH_LANES = 8
# Of the shrinking of an update from one step to the next, far more than roundings can undo.
_SHRINKS = 0.999
# Steps that are remembered. Then all rows are brought up to date once, which costs little in so many steps.
_MOST_STEPS = 1 << 16


class Constants(NamedTuple):
    """What is the same in all steps that are remembered together."""

    beta1: float
    beta2: float
    eps: float


class StepNumbers(NamedTuple):
    """What a step of Adam has of its own: lr / (1 - beta1^t) and sqrt(1 - beta2^t)."""

    step_size: float
    root: float


class LazyRows(ABC):
    """The steps that rows of one parameter have yet to take. Subclasses say by which kernels.

    The parameter is given to each call: the registry must not keep it alive.

    Args:
        rows: of the parameter.
        fresh: the moments are zero, so that no row has anything to catch up with before its first gradient.
    """

    def __init__(self, rows: int, exp_avg: Tensor, exp_avg_sq: Tensor, constants: Constants, fresh: bool) -> None:
        self.exp_avg, self.exp_avg_sq, self.constants = exp_avg, exp_avg_sq, constants
        self._last = torch.full((rows,), -1 if fresh else 0, dtype=torch.int32, device=exp_avg.device)
        self._reset()

    def _reset(self) -> None:
        """Forget all steps, all rows being up to date."""
        self._number, self._late = 0, False

    @abstractmethod
    def _take(self, parameter: Tensor, rows: Tensor, values: Tensor, numbers: StepNumbers) -> None:
        """Take step `_number + 1` in these rows, after what they have missed, and remember its numbers."""

    @abstractmethod
    def _bring(self, parameter: Tensor, items: Tensor | None) -> bool:
        """Bring rows to the end of `_number` steps; whether any may have changed."""

    def continues(self, moments: tuple[Tensor, Tensor], constants: Constants) -> bool:
        """Whether a step with these moments and constants can follow those that are remembered."""
        return moments[0] is self.exp_avg and moments[1] is self.exp_avg_sq and constants == self.constants

    def step(self, parameter: Tensor, rows: Tensor, values: Tensor, numbers: StepNumbers) -> None:
        """A step with a gradient in some rows, `[n]` and `[n, ...]`; the other rows are left behind.

        Rows are ascending for the compiled kernels, in any order and repeated for those of Triton.
        """
        if self._number == _MOST_STEPS:
            self.catch_up(parameter)
            self._last.clamp_(max=0)
            self._reset()
        self._take(parameter, rows, values, numbers)
        self._number += 1
        self._late = True
        self._changed(parameter)

    def catch_up(self, parameter: Tensor, items: Tensor | None = None) -> None:
        """Bring the rows `items`, int64 `[n]`, or all rows up to date."""
        if not self._late:
            return
        changed = self._bring(parameter, items)
        self._late = items is not None
        if changed:
            self._changed(parameter)

    def _changed(self, parameter: Tensor) -> None:
        # The kernels write behind autograd's back.
        torch.autograd.graph.increment_version((parameter, self.exp_avg, self.exp_avg_sq))


class CompiledLazyRows(LazyRows):
    """By the compiled kernels: float32 on the CPU."""

    def _reset(self) -> None:
        super()._reset()
        self._steps = torch.empty(256, 4)
        self._growing = torch.empty(0, dtype=torch.int64)
        self._newest: StepNumbers | None = None

    def _take(self, parameter: Tensor, rows: Tensor, values: Tensor, numbers: StepNumbers) -> None:
        self._remember(numbers)
        torch.ops.teracon_fast.adam_deferred(
            parameter, self.exp_avg, self.exp_avg_sq, self._last, rows.contiguous(), values.contiguous(),
            self._steps[: self._number + 1], self._growing, *self.constants, tail(parameter), torch.get_num_threads(),
        )  # fmt: skip

    def _bring(self, parameter: Tensor, items: Tensor | None) -> bool:
        wanted = torch.empty(0, dtype=torch.int64) if items is None else items.to("cpu", torch.int64).contiguous()
        late = torch.ops.teracon_fast.adam_catch_up(
            parameter, self.exp_avg, self.exp_avg_sq, self._last, wanted, items is None, self._steps[: self._number],
            self._growing, *self.constants, torch.get_num_threads(),
        )  # fmt: skip
        return bool(late)

    def _remember(self, numbers: StepNumbers) -> None:
        if self._number == len(self._steps):
            self._steps = torch.cat([self._steps, torch.empty_like(self._steps)])
        torch.ops.teracon_fast.adam_step(self._steps, self._number, *numbers)
        if not self._shrinks(numbers):
            self._growing = torch.cat([self._growing, torch.tensor([self._number])])
        self._newest = numbers

    def _shrinks(self, numbers: StepNumbers) -> bool:
        """Whether an update without gradient is smaller than the one of the step before, for any moments.

        It is step_size * m / (sqrt(v) / root + eps): m shrinks by beta1 and sqrt(v) by sqrt(beta2), which matters most where
        eps is nothing beside it and not at all where eps is everything.
        """
        before, (beta1, beta2, _) = self._newest, self.constants
        if before is None or beta2 == 0.0 or before.step_size == 0.0:
            return False
        denominator = max(1.0, numbers.root / before.root / math.sqrt(beta2))
        return numbers.step_size / before.step_size * beta1 * denominator < _SHRINKS


class TritonLazyRows(LazyRows):
    """By the Triton kernels: float32 on a GPU. Nothing waits for the device.

    Which rows were late is not known on the host, so autograd sees a change wherever there may have been one.
    """

    def __init__(self, rows: int, exp_avg: Tensor, exp_avg_sq: Tensor, constants: Constants, fresh: bool) -> None:
        super().__init__(rows, exp_avg, exp_avg_sq, constants, fresh)
        # All of it at once, 512 KiB: the kernels write it, and it never moves.
        self._history = torch.empty((_MOST_STEPS, 2), dtype=torch.float32, device=exp_avg.device)

    def _take(self, parameter: Tensor, rows: Tensor, values: Tensor, numbers: StepNumbers) -> None:
        from teracon_fast.kernels import adam

        adam.step(
            parameter, self.exp_avg, self.exp_avg_sq, self._last, rows, values, self._history, self._number + 1, *numbers,
            *self.constants,
        )  # fmt: skip

    def _bring(self, parameter: Tensor, items: Tensor | None) -> bool:
        from teracon_fast.kernels import adam

        wanted = None if items is None else items.reshape(-1).to(parameter.device)
        adam.catch_up(
            parameter, self.exp_avg, self.exp_avg_sq, self._last, wanted, self._history, self._number,
            *self.constants,
        )  # fmt: skip
        return True


def tail(parameter: Tensor) -> int:
    """Elements at the end of a parameter that are no whole vector of torch's kernel, which rounds them in another order."""
    return parameter.numel() % _TORCH_LANES


@contextmanager
def caught_up(parameter: Tensor) -> Iterator[None]:
    """Within it no row of the parameter counts as behind: the caller has brought all that are read there up to date."""
    rows = registered(parameter)
    if not isinstance(rows, LazyRows):
        yield
        return
    late, rows._late = rows._late, False
    try:
        yield
    finally:
        rows._late = late


class Embedding(nn.Embedding):
    """`nn.Embedding` whose readers never see a row that is behind.

    Attributes:
        sparse_grad: whether `ops.embedding_rows` gives its weight sparse gradients. Only those make updates lazy, so while it is
            False nothing here differs from `nn.Embedding`. Copies start with False.
    """

    _sparse_grad: bool = False

    @property
    def sparse_grad(self) -> bool:
        return self._sparse_grad

    @sparse_grad.setter
    def sparse_grad(self, wanted: bool) -> None:
        self._settle()
        self._sparse_grad = wanted

    @property
    def stored(self) -> nn.Parameter:
        """The weight as it lies in memory, rows that are behind included: for those who call `catch_up` themselves."""
        found = self.__dict__["_parameters"].get("weight")
        if found is None:
            raise AttributeError("weight")
        parameter: nn.Parameter = found
        return parameter

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """The weight, with all rows up to date."""
        self._settle()
        return self.stored

    def rows(self, items: Tensor) -> Tensor:
        """`weight[items]`, differentiable, items int64 or int32 `[n]`: brings only these rows up to date."""
        # Compiled code brings no rows up to date.
        parameter = self.weight if torch.compiler.is_compiling() else self.stored
        return embedding_rows(parameter, items, self._sparse_grad)

    def _settle(self) -> None:
        if self._sparse_grad:
            catch_up(self.stored)

    # The ways around `weight` to what a module holds: traversal, checkpoints, copies, conversions.

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        self._settle()
        return super().named_modules(*args, **kwargs)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._settle()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._settle()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Embedding:
        self._settle()
        super()._apply(*args, **kwargs)
        return self

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        state = dict(super().__getstate__())  # type: ignore[arg-type]
        state.pop("_sparse_grad", None)
        return state
