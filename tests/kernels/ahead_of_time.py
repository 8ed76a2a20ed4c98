"""Compiles what the launchers would run, for GPUs that need not be there: `python ahead_of_time.py JOBS`.

JOBS is JSON, `[[architecture, operation, dtype, labels, channels], ...]`, operations those of `RUNS`; for "masks" the number of
labels is that of tasks, for "adam" that of the embedding's rows. The launchers run on small tensors in memory, but their
launches are compiled with their configuration instead of run. Prints a JSON list with, of every kernel, the registers, spilled
bytes, shared memory and matrix instructions that its machine code has, the operations that NVIDIA's assembler may fuse
("fusible"), the multiplications of sizes that are too narrow, and the numbers of rows whose value would have it compiled again
("keyed"). Not in Triton's interpreter.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from teracon_fast import kernels
from teracon_fast import packing as packer
from teracon_fast.kernels import adam as adam_kernels
from teracon_fast.kernels import (
    configs,
    linear_cross_entropy,
    linear_rank,
    masked_conv,
    masked_conv_backward,
    retention_mse,
)
from teracon_fast.kernels import masks as task_masks
from teracon_fast.kernels import packing as packing_kernels

TARGETS = {name: GPUTarget("cuda", int(name[3:]), 32) for name in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100")}
TARGETS |= {name: GPUTarget("hip", name, 64) for name in ("gfx90a", "gfx942")}
TYPES = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip
ROWS, TARGETS_COUNT, SITES = 40, 64, 16
# What differs from batch to batch, and from step to step: no value of it may have a kernel compiled again.
OF_ROWS = {
    "count", "length", "named", "padded_count", "parts", "requests", "residual_count", "rows_count", "share", "source_count",
    "taken", "targets_count",
}  # fmt: skip
OF_STEPS = {"scale"}


def forward(dtype: torch.dtype, labels: int, channels: int) -> None:
    linear_cross_entropy.forward(*_head(dtype, labels, channels), *_targets(), True)


def backward(dtype: torch.dtype, labels: int, channels: int) -> None:
    grad, statistics = torch.zeros(TARGETS_COUNT), torch.zeros(2, ROWS)
    linear_cross_entropy.backward(grad, *_head(dtype, labels, channels), *_targets(), statistics, True, True, 1e-4)


def retention(dtype: torch.dtype, labels: int, channels: int) -> None:
    head = _head(dtype, labels, channels)
    retention_mse.forward_backward(*head, *head, torch.tensor(1.0), True)


def topk(dtype: torch.dtype, labels: int, channels: int) -> None:
    excluded, offsets = torch.zeros(8, dtype=torch.int64), torch.arange(ROWS + 1) // ROWS * 8
    linear_rank.topk(*_head(dtype, labels, channels), 20, excluded, offsets)


def adam(dtype: torch.dtype, rows: int, channels: int) -> None:
    """Of a gradient of that dtype."""
    arrays, constants = [torch.zeros(rows, channels) for _ in range(3)], (0.9, 0.999, 1e-8)
    items, values = torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS, channels, dtype=dtype)
    last, history = torch.zeros(rows, dtype=torch.int32), torch.zeros(256, 2)
    adam_kernels.step(*arrays, last, items, values, history, 16, 0.1, 0.1, *constants)
    adam_kernels.catch_up(*arrays, last, items, history, 16, *constants)
    adam_kernels.catch_up(*arrays, last, None, history, 16, *constants)
    adam_kernels.whole_step(*arrays, items, values, 0.1, 0.1, *constants)


def packing(dtype: torch.dtype, labels: int, channels: int) -> None:
    users = np.arange(4)
    geometry = packer.geometry(20, (1, 4))
    plan = packer.plan(users * 5, [packer.Streams(users), packer.Streams(users)], geometry)
    packing_kernels.pack(plan, torch.device("cpu"), padded=True)


def conv_forward(dtype: torch.dtype, labels: int, channels: int) -> None:
    x, weight, vector, taps, row_ends = _conv(dtype, channels)
    arguments = x, weight, *[vector] * 3, vector[None], taps, row_ends, x, taps[:, 0], 1e-8, True
    masked_conv.forward(*arguments)
    masked_conv.forward(*arguments, addend=x)


def conv_backward(dtype: torch.dtype, labels: int, channels: int) -> None:
    x, weight, vector, taps, row_ends = _conv(dtype, channels)
    statistics, bags = torch.zeros(ROWS, 1), torch.zeros(2, dtype=torch.int32)
    masked_conv_backward.backward(
        x, x, weight, vector, vector, vector[None], taps, taps, taps[:, 0], bags, row_ends, taps[:, 0], x, statistics,
        statistics, True,
    )  # fmt: skip


def _conv(dtype: torch.dtype, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows, weights, a small parameter, a table of three taps, ends of one request."""
    taps, row_ends = torch.zeros(ROWS, 3, dtype=torch.int32), torch.full((1,), ROWS, dtype=torch.int32)
    return torch.zeros(ROWS, channels, dtype=dtype), torch.zeros(channels, channels, 3), torch.zeros(channels), taps, row_ends


def _head(dtype: torch.dtype, labels: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(ROWS, channels, dtype=dtype), torch.zeros(labels, channels), torch.zeros(labels)


def _targets() -> tuple[Tensor, Tensor]:
    return torch.zeros(TARGETS_COUNT, dtype=torch.int64), torch.zeros(TARGETS_COUNT, dtype=torch.int64)


def masks(dtype: torch.dtype, tasks: int, channels: int) -> None:
    """With a teacher and a scale that is a number; with a scale in memory and some tasks of all; plain masks."""
    own, teacher = _tasks(dtype, tasks, channels), _tasks(dtype, max(1, tasks - 1), channels)
    every = tuple(range(tasks))
    task_masks.forward(own, 50.0, every, teacher, 6.0, tasks - 1)
    task_masks.backward(torch.zeros(SITES, tasks, channels), own, 1.0, every)
    gaps, scale = (tasks - 1, 0), torch.zeros(())
    some = own._replace(weights=torch.zeros(SITES, 2, 2 * tasks - 1), biases=torch.zeros(SITES, 2))
    task_masks.forward(some, scale, gaps)
    task_masks.backward(torch.zeros(SITES, 2, channels), some, scale, gaps)
    plain = task_masks.Parameters(own.embeddings, None, None, True)
    task_masks.forward(plain, 50.0, every, plain, 6.0, tasks - 1)
    task_masks.backward(torch.zeros(SITES, tasks, channels), plain, 50.0, every)


def _tasks(dtype: torch.dtype, tasks: int, channels: int) -> task_masks.Parameters:
    shapes = (SITES, tasks, channels), (SITES, tasks, 2 * tasks - 1), (SITES, tasks)
    return task_masks.Parameters(*(torch.zeros(shape, dtype=dtype) for shape in shapes), True)


# Each calls an operation's launcher; its results are not looked at.
RUNS: dict[str, Callable[[torch.dtype, int, int], None]] = {
    run.__name__: run for run in (forward, backward, retention, topk, adam, packing, masks, conv_forward, conv_backward)
}


def compiled(kernel: Any, arguments: dict[str, Any], sizes: configs.Config, target: GPUTarget) -> Any:
    """The kernel with the types, alignments and constants of these arguments."""
    signature, constants, aligned = {}, {}, {}
    for number, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(number,)] = "constexpr", value
        elif isinstance(value, int) and value == 1 and not parameter.do_not_specialize:
            signature[parameter.name], constants[(number,)] = "constexpr", 1  # as a launch has it
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            aligned[(number,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
                aligned[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": sizes.warps, "num_stages": sizes.stages}
    options |= {name: arguments[name] for name in ("enable_fp_fusion",) if name in arguments}
    return triton.compile(source, target=target, options=options)


def narrow_addresses(code: str) -> list[str]:
    """32-bit multiplications by a stride or a size: what an address is formed from must be widened first."""
    sizes = r"stride\w*|channels\w*|count|length|labels|targets_count|rows_count|padded_count|source_count"
    narrow = set(re.findall(rf"%({sizes})\b(?=: i32)", code))
    found = []
    for line in code.splitlines():
        made = re.match(r"\s*%(\w+) = (\S+) (.*?) : (.*)", line)
        if made and narrow & set(re.findall(r"%(\w+)", made[3])):
            if made[2] == "arith.muli":
                found.append(line.strip())
            elif made[2] in ("tt.splat", "tt.expand_dims", "tt.broadcast", "arith.addi"):
                narrow.add(made[1])
    return found


def facts(built: Any, target: GPUTarget) -> dict[str, Any]:
    if target.backend == "hip":
        code = built.asm["amdgcn"]
        # Scalar registers spill into lanes of vector registers; only those spill to memory, called private here.
        spilled = max(int(size) for size in re.findall(r"\.private_segment_fixed_size: (\d+)", code))
        registers, products = max(int(n) for n in re.findall(r"\.vgpr_count: +(\d+)", code)), re.findall(r"v_mfma\w+", code)
        fusible: list[str] = []
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(built.asm["cubin"])
            file.flush()
            tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
            usage = subprocess.run(
                [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        registers, spilled = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
        code = built.asm["ptx"]
        products = re.findall(r"(?:wgmma\.mma_async|mma)\.sync\.[\w.]+", code)
        # Products and sums without a rounding mode are those that the assembler may fuse.
        fusible = re.findall(r"\b(?:add|sub|mul)(?:\.ftz)?\.f32", code)
    return {
        "registers": registers, "spilled": spilled, "shared": built.metadata.shared,
        "products": sorted(set(products)), "fusible": sorted(set(fusible)), "narrow": narrow_addresses(built.asm["ttir"]),
    }  # fmt: skip


def recorder(target: GPUTarget, found: list[dict[str, Any]]) -> Callable[..., None]:
    def record(kernel: Any, grid: tuple[int, ...], sizes: configs.Config, device: torch.device, **arguments: Any) -> None:
        numbers = [p for p in kernel.params if not isinstance(arguments[p.name], Tensor)]
        keyed = [p.name for p in numbers if p.name in OF_ROWS and not p.do_not_specialize]
        keyed += [p.name for p in kernel.params if p.name in OF_STEPS and p.is_constexpr]
        built = compiled(kernel, arguments, sizes, target)
        found.append({"kernel": kernel.__name__, "keyed": keyed, **facts(built, target)})

    return record


def main(jobs: list[tuple[str, str, str, int, int]]) -> list[dict[str, Any]]:
    everything: list[dict[str, Any]] = []
    for architecture, operation, dtype, labels, channels in jobs:
        found: list[dict[str, Any]] = []
        configs.architecture = lambda device, name=architecture: name  # type: ignore[assignment]
        for name in (module.name for module in pkgutil.iter_modules(kernels.__path__)):
            module = importlib.import_module(f"{kernels.__name__}.{name}")
            if hasattr(module, "launch"):
                module.launch = recorder(TARGETS[architecture], found)  # type: ignore[attr-defined]
        RUNS[operation](getattr(torch, dtype), labels, channels)
        job = {"architecture": architecture, "operation": operation, "dtype": dtype, "labels": labels, "channels": channels}
        everything += [{**job, **fact} for fact in found]
    return everything


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
