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

# Least eps with which the compiled kernels may take subnormal moments for zero.
LEAST_EPS = 1e-10
# Floats per vector in torch's fused kernel, which has no AVX-512 version.
_TORCH_LANES = 8
# An update that shrinks by this factor from one step to the next shrinks in spite of rounding.
_SHRINKS = 0.999
# Steps in the history. When it is full all rows are brought up to date, which costs little per step.
_MOST_STEPS = 1 << 16


class Constants(NamedTuple):
    """Of Adam, the same in all steps of a history."""

    beta1: float
    beta2: float
    eps: float


class StepNumbers(NamedTuple):
    """Of one step of Adam: lr / (1 - beta1^t) and sqrt(1 - beta2^t)."""

    step_size: float
    root: float


class LazyRows(ABC):
    """The steps that rows of one parameter have not taken yet. Subclasses call the kernels.

    The parameter is given to each call: the registry must not keep it alive.

    Args:
        rows: of the parameter.
        fresh: the moments are zero, so that no row changes before its first gradient.
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
        """Take step `_number + 1` in these rows, after their missed steps, and add it to the history."""

    @abstractmethod
    def _bring(self, parameter: Tensor, items: Tensor | None) -> bool:
        """Take all missed steps of rows; whether any row may have changed."""

    def continues(self, moments: tuple[Tensor, Tensor], constants: Constants) -> bool:
        """Whether a step with these moments and constants can follow those of the history."""
        return moments[0] is self.exp_avg and moments[1] is self.exp_avg_sq and constants == self.constants

    def step(self, parameter: Tensor, rows: Tensor, values: Tensor, numbers: StepNumbers) -> None:
        """A step with a gradient in some rows, `[n]` and `[n, ...]`; the other rows become late.

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
        # Autograd does not see what the kernels write.
        torch.autograd.graph.increment_version((parameter, self.exp_avg, self.exp_avg_sq))


class CompiledLazyRows(LazyRows):
    """With the compiled kernels: float32 on the CPU."""

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

        It is step_size * m / (sqrt(v) / root + eps): m shrinks by beta1, and the denominator by sqrt(beta2) at most, where eps is
        negligible.
        """
        before, (beta1, beta2, _) = self._newest, self.constants
        if before is None or beta2 == 0.0 or before.step_size == 0.0:
            return False
        denominator = max(1.0, numbers.root / before.root / math.sqrt(beta2))
        return numbers.step_size / before.step_size * beta1 * denominator < _SHRINKS


class TritonLazyRows(LazyRows):
    """With the Triton kernels: float32 on a GPU, without waiting for it.

    The host does not know which rows were late, so autograd sees a change whenever one is possible.
    """

    def __init__(self, rows: int, exp_avg: Tensor, exp_avg_sq: Tensor, constants: Constants, fresh: bool) -> None:
        super().__init__(rows, exp_avg, exp_avg_sq, constants, fresh)
        # Of full size, 512 KiB: the kernels write it, and it never moves.
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
    """Elements at the end of a parameter that do not fill a vector of torch's kernel, which rounds them in another order."""
    return parameter.numel() % _TORCH_LANES


@contextmanager
def caught_up(parameter: Tensor) -> Iterator[None]:
    """Within it no row of the parameter counts as late: the caller has brought all rows that are read up to date."""
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
    """`nn.Embedding` whose readers never see a late row.

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
        """The weight as stored, with late rows: for callers of `catch_up`."""
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
        """`weight[items]`, differentiable, items int64 or int32 `[n]`; only these rows are brought up to date."""
        # Compiled code brings no rows up to date.
        parameter = self.weight if torch.compiler.is_compiling() else self.stored
        return embedding_rows(parameter, items, self._sparse_grad)

    def _settle(self) -> None:
        if self._sparse_grad:
            catch_up(self.stored)

    # Other ways to a module's parameters: traversal, checkpoints, copies, conversions.

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
