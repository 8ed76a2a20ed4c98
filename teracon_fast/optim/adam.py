"""Adam for the sparse gradients of `ops.embedding_rows`, with the results of Adam for dense ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from teracon_fast.errors import ConfigError
from teracon_fast.ops import backends, low_rank, native
from teracon_fast.ops.embedding_rows import catch_up, register, registered, sum_rows
from teracon_fast.optim.lazy_rows import (
    LEAST_EPS,
    CompiledLazyRows,
    Constants,
    LazyRows,
    StepNumbers,
    TritonLazyRows,
    tail,
)


class Adam(torch.optim.Adam):
    """`torch.optim.Adam` (Kingma and Ba 2015, Algorithm 1; PyTorch 2.13) that also takes sparse gradients, to the same bits.

    A gradient with layout `torch.sparse_coo` means a dense one with zeros elsewhere, unlike in PyTorch's optimizers: at every
    step the moments of all rows decay and all rows move. `torch.optim.SparseAdam` does not touch rows without gradient.

    The compiled kernels (float32 on the CPU) never form the dense gradient. They round as `torch.optim.Adam(fused=True)` does,
    also with fused=None. With fused=False or foreach=True, another dtype or device, or without the extension, the
    gradient is made dense for PyTorch's own step. Dense gradients always go there. Arguments, state and `state_dict()` are
    those of `torch.optim.Adam`: each loads the other's, and a parameter may have sparse gradients in one step and dense
    ones in the next.

    With `lazy`, a step reads and writes only rows that have a gradient. The others take the steps that they missed when they are
    next read: by `ops.embedding_rows`, by a later gradient, or all at once by `flush`, `state_dict` or a dense gradient. The
    operations and their order are the same, so the bits are. **Whoever reads such a parameter, or its moments, in another
    way must call `flush` first**; a `FastTCN` does so itself, except for a `Parameter` that was taken out of it earlier.

    Low-rank gradients of `ops.retention_mse` (`ops.low_rank`) are formed some rows at a time, while they are in the cache, and
    never stored. `Adam.zero_grad` forgets them; a module's `zero_grad` does not.

    The Triton kernels (float32 on CUDA, on request) never wait for the device, take gradients whose rows repeat, and sum those
    themselves. They round each operation once, in the order of the compiled kernels, and so differ from PyTorch's CUDA kernels in
    the last bits, but lazy steps have the same bits as others. They read the number of steps from the device once after
    `load_state_dict` or a step of PyTorch's, and at every step a learning rate that is a tensor on the device.

    In the compiled kernels moments below 1.2e-38 count as zero, unless eps is below 1e-10: far too small to move a
    parameter, while on x86 an operation on a subnormal number costs as much as a hundred others.

    Args:
        lazy: update rows without gradient when they are next read. Used where the compiled or Triton kernels are, and eps is at
            least 1e-10.
        backend: of steps with sparse gradients: "auto", "cpu" (the compiled kernels), "triton" or "torch" (a dense gradient).
        All others: of `torch.optim.Adam`.

    Raises:
        BackendError: for a backend that is unknown or not installed; at a step with a sparse gradient, for a named backend that
            cannot take it: another device or dtype, a parameter that is not contiguous, fused=False or foreach=True.
        ConfigError: at a step with a sparse gradient, for weight_decay, amsgrad, maximize, capturable, differentiable or a
            GradScaler with fused=True, or for a gradient that is sparse in more than its rows.
    """

    lazy: bool = False
    backend: str = "auto"

    def __init__(self, params: Any, *args: Any, lazy: bool = False, backend: str = "auto", **kwargs: Any) -> None:
        super().__init__(params, *args, **kwargs)
        backends.check_name(backend, "adam")
        self.lazy, self.backend = lazy, backend

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
        """As `torch.optim.Adam.load_state_dict`. Late rows first take their missed steps with the state that is replaced."""
        self.flush()
        super().load_state_dict(dict(state_dict))
        for group in self.param_groups:
            for parameter in group["params"]:
                register(parameter, None)

    def __getstate__(self) -> dict[str, Any]:
        self.flush()
        return {**super().__getstate__(), "lazy": self.lazy, "backend": self.backend}

    # Not in `step`, which closures, hooks and schedulers wrap. Should a later PyTorch not call this, it refuses sparse gradients.
    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> Any:
        done, made_dense = set(), list[tuple[Tensor, Tensor]]()
        for parameter in group["params"]:
            if low_rank.parts_of(parameter) and self._step_low_rank(group, parameter):
                done.add(id(parameter))
                continue
            gradient = parameter.grad
            if gradient is None:
                continue
            if not gradient.is_sparse:
                _settle(parameter)
                continue
            self._check(group, gradient)
            implementation = self._implementation(group, parameter)
            if implementation != "torch":
                self._step_rows(group, parameter, implementation)
                done.add(id(parameter))
            else:
                _settle(parameter)
                made_dense.append((parameter, gradient))
                parameter.grad = gradient.to_dense() if parameter.device.type == "cpu" else _added_up(gradient)
        if done:
            group = {**group, "params": [p for p in group["params"] if id(p) not in done]}
        try:
            return super()._init_group(group, *lists)
        finally:
            for parameter, gradient in made_dense:
                parameter.grad = gradient

    @torch.no_grad()
    def _step_low_rank(self, group: Mapping[str, Any], parameter: Tensor) -> bool:
        """A step whose whole gradient is low-rank, some rows at a time. Else the parts are added to `.grad`: False."""
        parts, state = low_rank.parts_of(parameter), self.state[parameter]
        plain = not (group["amsgrad"] or group["capturable"] or group["differentiable"] or group["foreach"])
        scaled = getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None
        fits = parameter.device.type == "cpu" and parameter.dtype == torch.float32 and parameter.is_contiguous()
        if parameter.grad is not None or group["fused"] is False or scaled or not (plain and fits):
            gradient = low_rank.dense(parts)
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            low_rank.clear(parameter)
            return False
        _settle(parameter)
        if not state:
            _initialize(state, parameter, bool(group["fused"]))
        state["step"] += 1
        for rows, gradient in low_rank.products(parts):
            torch._fused_adam_(
                [parameter[rows]], [gradient], [state["exp_avg"][rows]], [state["exp_avg_sq"][rows]], [], [state["step"]],
                amsgrad=False, lr=float(group["lr"]), beta1=float(group["betas"][0]), beta2=float(group["betas"][1]),
                weight_decay=group["weight_decay"], eps=group["eps"], maximize=group["maximize"],
            )  # fmt: skip
        return True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `torch.optim.Adam.zero_grad`; also forgets low-rank gradients."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for parameter in group["params"]:
                low_rank.clear(parameter)

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

    def _implementation(self, group: Mapping[str, Any], parameter: Tensor) -> str:
        """What takes a step of this parameter with a sparse gradient: "cpu", "triton", or "torch" with a dense one."""
        chosen = backends.resolve(self.backend, "adam", parameter.device, parameter.dtype)
        # Checked again, since `resolve` caches its answers.
        if chosen == "torch" or (self.backend == "auto" and not native.available()):
            return "torch"
        state = self.state[parameter]
        tensors = [parameter, *(state[name] for name in ("exp_avg", "exp_avg_sq") if name in state)]
        fits = all(t.device == parameter.device and t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
        if fits and group["fused"] is not False and not group["foreach"]:
            return chosen
        if self.backend == "auto":
            return "torch"
        raise backends.BackendError(
            f"Adam: backend {self.backend!r} got a parameter {parameter.dtype} of strides {parameter.stride()}, "
            f"fused={group['fused']} and foreach={group['foreach']}, expected a contiguous torch.float32 with moments alike, "
            "and neither fused=False nor foreach=True"
        )

    @torch.no_grad()
    def _step_rows(self, group: Mapping[str, Any], parameter: Tensor, implementation: str) -> None:
        compiled = implementation == "cpu"
        rows, values = _coalesced(parameter) if compiled else _uncoalesced(parameter)
        state = self.state[parameter]
        fresh = not state
        if fresh:
            _initialize(state, parameter, bool(group["fused"]))
        step, (beta1, beta2) = _counted(state["step"]), map(float, group["betas"])
        constants = Constants(beta1, beta2, float(group["eps"]))
        root = math.sqrt(1 - beta2**step)
        numbers = StepNumbers(float(group["lr"]) / (1 - beta1**step), root)
        moments = (state["exp_avg"], state["exp_avg_sq"])
        kind: type[LazyRows] = CompiledLazyRows if compiled else TritonLazyRows
        lazy, late = self.lazy and constants.eps >= LEAST_EPS, registered(parameter)
        if not (lazy and isinstance(late, kind) and late.continues(moments, constants)):
            _settle(parameter)
            late = None
        if lazy:
            if late is None:
                late = kind(len(parameter), *moments, constants, fresh)
                register(parameter, late)
            late.step(parameter, rows, values, numbers)
            return
        if compiled:
            torch.ops.teracon_fast.adam_rows(
                parameter, *moments, rows.contiguous(), values.contiguous(), *constants, *numbers, tail(parameter),
                torch.get_num_threads(),
            )  # fmt: skip
        else:
            from teracon_fast.kernels import adam

            adam.whole_step(parameter, *moments, rows, values, *numbers, *constants)
        # Autograd does not see what the kernel writes.
        torch.autograd.graph.increment_version((parameter, *moments))


# By step count: the tensor's version when it was last incremented here, and its value then.
_counts: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _counted(steps: Tensor) -> float:
    """Increment a step count and return it; the tensor is read only if something else has changed it."""
    version, number = _counts.get(steps, (None, 0.0))
    if version != steps._version:
        number = steps.item()
    steps += 1
    _counts[steps] = (steps._version, number + 1)
    return number + 1


def _settle(parameter: Tensor) -> None:
    """Bring all rows up to date, and forget that any were late."""
    if registered(parameter) is not None:
        catch_up(parameter)
        register(parameter, None)


def _coalesced(parameter: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that have a gradient, each once and ascending, and their gradients.

    Not by `Tensor.coalesce`, which sorts unless a flag is set, and PyTorch drops the flag when it fills `.grad`.
    """
    gradient = parameter.grad
    assert gradient is not None
    rows, values = gradient._indices()[0], gradient._values()
    if bool((rows[1:] > rows[:-1]).all()):
        return rows, values
    rows, sums = sum_rows(rows, values.reshape(len(values), -1))
    return rows, sums.view(-1, *values.shape[1:])


def _uncoalesced(parameter: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that have a gradient, in any order and repeated, and the gradients, without waiting for the device."""
    gradient = parameter.grad
    assert gradient is not None
    return gradient._indices()[0], gradient._values()


def _added_up(gradient: Tensor) -> Tensor:
    """The dense gradient, the same in every run: on a GPU `to_dense` sums repeated rows in any order."""
    zeros = gradient._values().new_zeros(gradient.shape)
    return zeros.index_put_((gradient._indices()[0],), gradient._values(), accumulate=True)


def _initialize(state: dict[str, Any], parameter: Tensor, fused: bool) -> None:
    """The initial state, as `torch.optim.Adam`'s."""
    # The fused kernels read the step count on the parameter's device.
    double = not fused and torch.get_default_dtype() == torch.float64
    step_dtype, device = torch.float64 if double else torch.float32, parameter.device if fused else "cpu"
    steps = state["step"] = torch.zeros((), dtype=step_dtype, device=device)
    _counts[steps] = (steps._version, 0.0)
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
