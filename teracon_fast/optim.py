"""Adam that takes sparse gradients without changing what Adam does: `ops.embedding_rows` makes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from teracon_fast import _native, factored
from teracon_fast.deferred import LEAST_EPS, Constants, Deferred, StepNumbers, catch_up, register, registered
from teracon_fast.errors import ConfigError
from teracon_fast.ops.embedding_rows import sum_rows

# Floats in a vector of torch's fused kernel, which has no AVX-512 form. What is left of a parameter behind whole vectors is
# rounded in another order.
_TORCH_LANES = 8


class Adam(torch.optim.Adam):
    """`torch.optim.Adam` (Kingma and Ba 2015, Algorithm 1; PyTorch 2.13) that also takes sparse gradients, to the same bits.

    A gradient whose layout is `torch.sparse_coo` stands for a dense one with zeros elsewhere, as in no optimiser of PyTorch: at
    every step the moments of all rows decay and all rows move. `torch.optim.SparseAdam` leaves rows without gradient alone.

    The compiled kernels (float32 on the CPU) never form the dense gradient. They round as `torch.optim.Adam(fused=True)` does,
    also where `fused` is left open. With fused=False or foreach=True, another dtype or device, or without the extension, the
    gradient is made dense for PyTorch's own step. Dense gradients always go there. Arguments, state and `state_dict()` are
    those of `torch.optim.Adam`: each loads the other's, and a parameter may have sparse gradients in one step and dense
    ones in the next.

    With `deferred`, a step reads and writes only rows that have a gradient. The others take what they missed when they are
    next read: by `ops.embedding_rows`, by a later gradient, or all at once by `flush`, `state_dict` or a dense gradient. The
    operations and their order are the same, so the bits are. **Whoever reads such a parameter, or its moments, in another
    way must call `flush` first**; in a `FastTCN` all ways but a `Parameter` that was taken out of it earlier do so.

    Gradients that `ops.retention_mse` leaves as factors (`teracon_fast.factored`) are formed some rows at a time, while they are
    in the cache, and never stored. `Adam.zero_grad` forgets them; a module's `zero_grad` does not.

    In the compiled kernels moments below 1.2e-38 count as zero, unless eps is below 1e-10: far below what can move a
    parameter, and on x86 each operation on such a number costs as much as a hundred others.

    Args:
        deferred: leave rows without gradient behind. Used where the compiled kernels are, and eps is at least 1e-10.
        All others: of `torch.optim.Adam`.

    Raises:
        ConfigError: at a step with a sparse gradient, for weight_decay, amsgrad, maximize, capturable, differentiable or a
            GradScaler with fused=True, or for a gradient that is sparse in more than its rows.
    """

    deferred: bool = False

    def __init__(self, params: Any, *args: Any, deferred: bool = False, **kwargs: Any) -> None:
        super().__init__(params, *args, **kwargs)
        self.deferred = deferred

    def flush(self) -> None:
        """Bring all rows of all parameters up to date."""
        for group in self.param_groups:
            for parameter in group["params"]:
                catch_up(parameter)

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Adam.state_dict`, after a flush."""
        self.flush()
        return super().state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As `torch.optim.Adam.load_state_dict`. Rows take the steps that they missed with the state that is replaced."""
        self.flush()
        super().load_state_dict(dict(state_dict))
        for group in self.param_groups:
            for parameter in group["params"]:
                register(parameter, None)

    def __getstate__(self) -> dict[str, Any]:
        self.flush()
        return {**super().__getstate__(), "deferred": self.deferred}

    # Here and not in `step`, which closures, hooks and schedulers wrap. Should a later PyTorch call this no more, it refuses
    # sparse gradients.
    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> Any:
        done, made_dense = set(), list[tuple[Tensor, Tensor]]()
        for parameter in group["params"]:
            if factored.left_for(parameter) and self._step_factored(group, parameter):
                done.add(id(parameter))
                continue
            gradient = parameter.grad
            if gradient is None:
                continue
            if not gradient.is_sparse:
                _settle(parameter)
                continue
            self._check(group, gradient)
            if self._serves(group, parameter):
                self._step_rows(group, parameter)
                done.add(id(parameter))
            else:
                _settle(parameter)
                made_dense.append((parameter, gradient))
                parameter.grad = gradient.to_dense()
        if done:
            group = {**group, "params": [p for p in group["params"] if id(p) not in done]}
        try:
            return super()._init_group(group, *lists)
        finally:
            for parameter, gradient in made_dense:
                parameter.grad = gradient

    @torch.no_grad()
    def _step_factored(self, group: Mapping[str, Any], parameter: Tensor) -> bool:
        """A step whose whole gradient was left as factors, some rows at a time. Else they are added to `.grad`: False."""
        parts, state = factored.left_for(parameter), self.state[parameter]
        plain = not (group["amsgrad"] or group["capturable"] or group["differentiable"] or group["foreach"])
        scaled = getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None
        fits = parameter.device.type == "cpu" and parameter.dtype == torch.float32 and parameter.is_contiguous()
        if parameter.grad is not None or group["fused"] is False or scaled or not (plain and fits):
            gradient = factored.dense(parts)
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            factored.clear(parameter)
            return False
        _settle(parameter)
        if not state:
            _begin(state, parameter, bool(group["fused"]))
        state["step"] += 1
        for rows, gradient in factored.products(parts):
            torch._fused_adam_(
                [parameter[rows]], [gradient], [state["exp_avg"][rows]], [state["exp_avg_sq"][rows]], [], [state["step"]],
                amsgrad=False, lr=float(group["lr"]), beta1=float(group["betas"][0]), beta2=float(group["betas"][1]),
                weight_decay=group["weight_decay"], eps=group["eps"], maximize=group["maximize"],
            )  # fmt: skip
        return True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `torch.optim.Adam.zero_grad`; also forgets what was left as factors."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for parameter in group["params"]:
                factored.clear(parameter)

    def _check(self, group: Mapping[str, Any], gradient: Tensor) -> None:
        options = ("weight_decay", "amsgrad", "maximize", "capturable", "differentiable")
        got = {name: group[name] for name in options if group[name]}
        if got:
            raise ConfigError(f"Adam: got a sparse gradient and {got}, expected none of these with sparse gradients")
        if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
            raise ConfigError("Adam: got a sparse gradient from a GradScaler, expected fused=False with it")
        if gradient.sparse_dim() != 1:
            raise ConfigError(
                f"Adam: got a gradient with {gradient.sparse_dim()} sparse dimensions, expected 1: rows of the parameter"
            )

    def _serves(self, group: Mapping[str, Any], parameter: Tensor) -> bool:
        """Whether the compiled kernels take a step of this parameter, and give the bits that the group asks for."""
        if group["fused"] is False or group["foreach"] or not _native.available():
            return False
        state = self.state[parameter]
        tensors = [parameter, *(state[name] for name in ("exp_avg", "exp_avg_sq") if name in state)]
        return all(t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in tensors)

    @torch.no_grad()
    def _step_rows(self, group: Mapping[str, Any], parameter: Tensor) -> None:
        rows, values = _coalesced(parameter)
        state = self.state[parameter]
        fresh = not state
        if fresh:
            _begin(state, parameter, bool(group["fused"]))
        state["step"] += 1
        step, (beta1, beta2) = state["step"].item(), map(float, group["betas"])
        constants = Constants(beta1, beta2, float(group["eps"]))
        root = math.sqrt(1 - beta2**step)
        numbers = StepNumbers(float(group["lr"]) / (1 - beta1**step), root)
        moments, tail = (state["exp_avg"], state["exp_avg_sq"]), parameter.numel() % _TORCH_LANES
        wanted, deferred = self.deferred and constants.eps >= LEAST_EPS, registered(parameter)
        if deferred is not None and not (wanted and deferred.goes_on(moments, constants)):
            _settle(parameter)
            deferred = None
        if wanted:
            if deferred is None:
                deferred = Deferred(len(parameter), *moments, constants, fresh)
                register(parameter, deferred)
            deferred.step(parameter, rows, values, numbers, tail)
            return
        torch.ops.teracon_fast.adam_rows(
            parameter, *moments, rows.contiguous(), values.contiguous(), *constants, *numbers, tail, torch.get_num_threads()
        )
        # The kernel writes behind autograd's back.
        torch.autograd.graph.increment_version((parameter, *moments))


def _settle(parameter: Tensor) -> None:
    """Bring all rows up to date, and forget that any were behind."""
    if registered(parameter) is not None:
        catch_up(parameter)
        register(parameter, None)


def _coalesced(parameter: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that have a gradient, each once and ascending, and their gradients.

    `Tensor.coalesce` is not asked: it sorts unless a mark is set, and PyTorch drops the mark on the way into `.grad`.
    """
    gradient = parameter.grad
    assert gradient is not None
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
