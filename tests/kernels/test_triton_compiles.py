"""The kernels compiled for GPUs that need not be there: tensor cores, registers, shared memory, 64-bit addresses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from triton_here import require_triton

require_triton()

from teracon_fast.kernels.configs import SHARED

HERE = Path(__file__).resolve().parent
OPERATIONS, CONV = ("forward", "backward", "retention", "topk"), ("conv_forward", "conv_backward")
MANY, FEW = 10_000, 500
# bfloat16 states and float32 weights, 256 channels, by the table's rows for many labels and, where the paper is trained, few.
JOBS = [
    *((name, operation, "bfloat16", MANY, 256) for name in ("sm_80", "sm_90", "gfx942") for operation in OPERATIONS),
    *(("sm_90", operation, "bfloat16", FEW, 256) for operation in ("forward", "backward")),
    *(("sm_90", operation, "float32", MANY, 256) for operation in ("forward", "backward", "retention")),
    *((name, "packing", "float32", 1, 1) for name in ("sm_80", "sm_90", "gfx942")),
    *((name, "masks", "float32", 6, 256) for name in ("sm_80", "sm_90", "gfx942")),  # six tasks
    *(("sm_90", "masks", "float32", *size) for size in ((64, 512), (1, 1))),
    *(("sm_90", operation, "bfloat16", 1, 1) for operation in (*OPERATIONS, *CONV)),  # sizes of one are constants: that too
    *((name, operation, "bfloat16", 1, 256) for name in ("sm_80", "sm_90", "gfx942") for operation in CONV),
    *(("sm_90", operation, "float32", 1, 256) for operation in CONV),
    *(("sm_90", operation, "bfloat16", 1, channels) for operation in CONV for channels in (512, 100)),
    # An embedding of so many rows, and channels of its gradient.
    *((name, "adam", "float32", MANY, 256) for name in ("sm_80", "sm_90", "gfx942")),
    ("sm_80", "adam", "bfloat16", MANY, 256), ("sm_80", "adam", "float32", MANY, 600), ("sm_90", "adam", "float32", 1, 1),
]
# What each operation launches; kernels after the bar multiply nothing.
KERNELS = {
    "forward": "own_logits_kernel scan_kernel | merge_rows_kernel merge_targets_kernel",
    "backward": "backward_kernel backward_kernel | row_sums_kernel",
    "retention": "retention_kernel |",
    "topk": "topk_kernel |",
    "packing": "| tables_kernel bags_kernel cells_kernel",
    "masks": "| " + 3 * "task_masks_kernel task_masks_backward_kernel ",
    "conv_forward": "forward_kernel forward_kernel |",  # without and with an addend
    "conv_backward": "input_kernel weight_kernel | norm_backward_kernel bag_sums_kernel finish_kernel gather_kernel",
    "adam": "| step_kernel catch_up_kernel catch_up_kernel whole_step_kernel",
}
PRODUCTS = {"sm_80": "mma.sync.aligned.m16n8k16", "sm_90": "wgmma.mma_async.sync.aligned.m64", "gfx942": "v_mfma_f32"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of each kernel of each job, what `ahead_of_time` says; compiled by a process of its own, never interpreted."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = {"PYTHONPATH": str(HERE.parent.parent), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    command = [sys.executable, str(HERE / "ahead_of_time.py"), json.dumps(JOBS)]
    done = subprocess.run(command, env={**kept, **paths}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def of_job(compiled: list[dict[str, Any]], job: tuple[str, str, str, int, int]) -> list[dict[str, Any]]:
    names = ("architecture", "operation", "dtype", "labels", "channels")
    kernels = [fact for fact in compiled if tuple(fact[name] for name in names) == job]
    assert sorted(fact["kernel"] for fact in kernels) == sorted(KERNELS[job[1]].replace("|", "").split())
    return kernels


@pytest.mark.parametrize("job", JOBS, ids=lambda job: "-".join(map(str, job)))
def test_machine_code(compiled: list[dict[str, Any]], job: tuple[str, str, str, int, int]) -> None:
    for kernel in of_job(compiled, job):
        assert kernel["spilled"] == 0 or (job[4] == 1 and job[1] != "packing"), kernel
        assert kernel["shared"] <= SHARED[job[0]] << 10, kernel
        assert kernel["narrow"] == [], kernel
        assert kernel["keyed"] == [], "a batch of another size must not compile again"
        multiplies = kernel["kernel"] in KERNELS[job[1]].split("|")[0].split()
        if multiplies and job[2] == "bfloat16":
            assert kernel["products"] and all(PRODUCTS[job[0]] in product for product in kernel["products"]), kernel
        else:
            assert kernel["products"] == [], "exact products of float32 run on the ordinary units"
        if multiplies:
            assert kernel["shared"] > 0, "tiles of operands go through shared memory"


@pytest.mark.parametrize("job", [job for job in JOBS if job[1] == "adam"], ids=lambda job: "-".join(map(str, job)))
def test_adam_rounds_alike_in_every_kernel(compiled: list[dict[str, Any]], job: tuple[str, str, str, int, int]) -> None:
    """No product and sum that the compiler may fuse here and not there: each has its rounding, or is a written `fma`."""
    for kernel in of_job(compiled, job):
        assert kernel["fusible"] == [], kernel


@pytest.mark.parametrize("job", [job for job in JOBS if job[1] == "forward"], ids=lambda job: "-".join(map(str, job)))
def test_a_targets_own_logit_comes_from_the_same_instructions(
    compiled: list[dict[str, Any]], job: tuple[str, str, str, int, int]
) -> None:
    """So that it has the bits that the walk over labels forms for another label of equal weights."""
    products = {kernel["kernel"]: kernel["products"] for kernel in of_job(compiled, job)}
    assert products["own_logits_kernel"] == products["scan_kernel"]
