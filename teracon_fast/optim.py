"""Adam that takes sparse gradients without changing what Adam does: `ops.embedding_rows` makes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from teracon_fast import _native
from teracon_fast.errors import ConfigError
from teracon_fast.ops.embedding_rows import sum_rows


class Adam(torch.optim.Adam):
    """`torch.optim.Adam` (Kingma and Ba 2015, Algorithm 1; PyTorch 2.13) that also takes sparse gradients.

    A gradient whose layout is `torch.sparse_coo` stands for a dense one with zeros elsewhere, as in no optimiser of PyTorch: at
    every step the moments of all rows decay and all rows move. `torch.optim.SparseAdam` leaves rows without gradient alone.
    One pass over parameter and moments, and no dense gradient in between.

    Dense gradients go through PyTorch's own step. Arguments, state and `state_dict()` are those of `torch.optim.Adam`: each
    loads the other's, and a parameter may have sparse gradients in one step and dense ones in the next.

    In the compiled kernel (float32 on the CPU) moments below 1.2e-38 count as zero, unless eps is below 1e-10: far below what
    can move a parameter, and on x86 each operation on such a number costs as much as a hundred others.

    Raises:
        ConfigError: at a step with a sparse gradient, for weight_decay, amsgrad, maximize, capturable, differentiable or a
            GradScaler with fused=True, or for a gradient that is sparse in more than its rows.
    """

    # Here and not in `step`, which closures, hooks and schedulers wrap. Should a later PyTorch call this no more, it refuses
    # sparse gradients.
    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> Any:
        by_rows = [p for p in group["params"] if p.grad is not None and p.grad.is_sparse]
        if by_rows:
            self._check(group)
            for parameter in by_rows:
                self._step_rows(group, parameter)
            kept = set(map(id, by_rows))
            group = {**group, "params": [p for p in group["params"] if id(p) not in kept]}
        return super()._init_group(group, *lists)

    def _check(self, group: Mapping[str, Any]) -> None:
        options = ("weight_decay", "amsgrad", "maximize", "capturable", "differentiable")
        got = {name: group[name] for name in options if group[name]}
        if got:
            raise ConfigError(f"Adam: got a sparse gradient and {got}, expected none of these with sparse gradients")
        if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
            raise ConfigError("Adam: got a sparse gradient from a GradScaler, expected fused=False with it")

    @torch.no_grad()
    def _step_rows(self, group: Mapping[str, Any], parameter: Tensor) -> None:
        rows, values = _coalesced(parameter)
        state = self.state[parameter]
        if not state:
            _begin(state, parameter, bool(group["fused"]))
        state["step"] += 1
        step, (beta1, beta2) = state["step"].item(), map(float, group["betas"])
        step_size, root = float(group["lr"]) / (1 - beta1**step), math.sqrt(1 - beta2**step)
        moments = state["exp_avg"], state["exp_avg_sq"]
        update = _update_native if _serves(parameter, *moments, values) else _update
        update(parameter, *moments, rows, values, beta1, beta2, float(group["eps"]), step_size, root)


def _coalesced(parameter: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that have a gradient, each once and ascending, and their gradients.

    `Tensor.coalesce` is not asked: it sorts unless a mark is set, and PyTorch drops the mark on the way into `.grad`.
    """
    gradient = parameter.grad
    assert gradient is not None
    if gradient.sparse_dim() != 1:
        raise ConfigError(
            f"Adam: got a gradient with {gradient.sparse_dim()} sparse dimensions, expected 1: rows of the parameter"
        )
    rows, values = gradient._indices()[0], gradient._values()
    if bool((rows[1:] > rows[:-1]).all()):
        return rows, values
    rows, sums = sum_rows(rows, values.reshape(len(values), -1))
    return rows, sums.view(-1, *values.shape[1:])


def _begin(state: dict[str, Any], parameter: Tensor, fused: bool) -> None:
    """The state that `torch.optim.Adam` begins with."""
    # The fused kernels read the number of steps where the parameter is.
    double = not fused and torch.get_default_dtype() == torch.float64
    step_dtype, device = torch.float64 if double else torch.float32, parameter.device if fused else "cpu"
    state["step"] = torch.zeros((), dtype=step_dtype, device=device)
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def _serves(parameter: Tensor, *others: Tensor) -> bool:
    """Whether the compiled kernel takes these tensors."""
    tensors = (parameter, *others)
    fits = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    return fits and all(t.is_contiguous() for t in tensors[:3]) and _native.available()


def _update_native(
    parameter: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, rows: Tensor, values: Tensor, beta1: float, beta2: float,
    eps: float, step_size: float, root: float,
) -> None:  # fmt: skip
    torch.ops.teracon_fast.adam_rows(
        parameter, exp_avg, exp_avg_sq, rows.contiguous(), values.contiguous(), beta1, beta2, eps, step_size, root,
        torch.get_num_threads(),
    )  # fmt: skip
    # The kernel writes behind autograd's back.
    torch.autograd.graph.increment_version((parameter, exp_avg, exp_avg_sq))


def _update(
    parameter: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, rows: Tensor, values: Tensor, beta1: float, beta2: float,
    eps: float, step_size: float, root: float,
) -> None:  # fmt: skip
    exp_avg.mul_(beta1).index_add_(0, rows, values, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).index_add_(0, rows, values * values, alpha=1 - beta2)
    parameter.addcdiv_(exp_avg, (exp_avg_sq.sqrt() / root).add_(eps), value=-step_size)
