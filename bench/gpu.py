"""Ours on a GPU: equivalence tests first, then every case beside PyTorch and the device's own measured rates.

    python -m bench.gpu [--only PART] [--tests gpu|all|none] [--compile] [--rounds 3] [--quick] [--results FOLDER]

Parts: `tests`, the tests whose kernels run on the GPU; `cases` (`bench.network`), `heads` (`bench.heads`) and `adam` over the
first task's labels. A time is the mean of a block of queued calls, as a training loop queues its steps, by the wall clock; where
kernels are timed alone, it lies between two CUDA events, with a cold L2 cache. "of peak" compares useful operations with
`torch.mm` of the same precision (fp32 with TF32), "x floor" the time with the larger of those operations at that rate and the
bytes that must be moved at the rate of a copy.

`--device cpu --quick` is a self-test without a GPU, at tiny sizes; with TRITON_INTERPRET=1 and `--backend triton` the kernels
then run in Triton's interpreter.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from bench import adam, device, heads, network, record
from bench.device import first_line
from bench.harness import Case, measure
from bench.record import ROOT
from bench.shapes import TINY, TTL
from teracon_fast.kernels import configs

FULL, QUICK = replace(TTL, labels=(646_000, 17_880, 8), batch=1024), replace(TINY, labels=(90, 30, 8))
PARTS = ("tests", "cases", "heads", "adam")
MANY = 8192  # users embedded at once for the rate of a service
TOGETHER_BYTES = 60e9  # memory from which on all sides of a case are held at once


def refusal() -> str | None:
    """Why nothing can be measured here; None on a machine with a GPU that PyTorch sees."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        how = "in an environment without it, `make bench-gpu TORCH=torch` installs one with CUDA"
        return f"no GPU: torch {torch.__version__} is built without CUDA and ROCm; {how}"
    try:
        torch.cuda.init()
    except Exception as error:  # the driver's message
        return f"no GPU: {first_line(error)}"
    return "no GPU: PyTorch sees none"


def tests_of_gpus() -> list[str]:
    """Test files that have a kernel to run on a GPU: those that mention Triton or CUDA. Not the ones that compile for GPUs which
    need not be there, or that run these scripts."""
    chosen = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if re.search("triton|cuda", path.read_text())]
    left_out = re.compile("test_(bench|tune|packaging|import|triton_compiles)")
    return [str(path.relative_to(ROOT)) for path in chosen if not left_out.match(path.name)]


def run_tests(arguments: Sequence[str]) -> dict[str, Any]:
    """Run pytest in a process of its own, its output on the terminal; returns its exit status and last line."""
    command, last = [sys.executable, "-m", "pytest", "-q", *arguments], ""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return {"status": process.returncode, "last_line": last.strip("= ")}


def cases(part: str, given: Any, here: torch.device) -> Sequence[Case]:
    """The cases of a part."""
    shape = QUICK if given.quick else FULL
    if part == "cases":
        return network.on_gpu(shape, here, given.backend, 2 * shape.batch if given.quick else MANY, given.compile)
    if part == "heads":
        return heads.on_gpu(heads.QUICK if given.quick else heads.FULL, here, given.backend)
    # In a self-test the steps with sparse gradients are those of the compiled kernels.
    backend = "auto" if here.type == "cpu" else given.backend
    step = adam.AdamStep(shape.labels[0], shape.channels, shape.batch, head=sum(shape.labels), device=here, backend=backend)
    return [step.tiny() if given.quick else step]


def facts(here: torch.device) -> dict[str, Any]:
    """What a record says of a device."""
    architecture = configs.architecture(here)
    found = {"name": "cpu", "architecture": architecture, "cuda": torch.version.cuda, "hip": torch.version.hip}
    if here.type == "cuda":
        properties = torch.cuda.get_device_properties(here)
        found |= {"name": properties.name, "memory_gib": properties.total_memory / 2**30}
    return found | {"configurations": configs.read().get(architecture, {}).get("measured")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line says; returns 1 where tests or a measurement failed, 2 without a GPU."""
    given = record.parse(
        __doc__, arguments, only=PARTS,
        tests={"choices": ("gpu", "all", "none"), "default": "gpu", "help": "those with a kernel to run, all, none (gpu)"},
        compile={"action": "store_true", "help": "the sides of torch.compile too (slow)"},
        device={"default": "cuda", "help": "cpu: a self-test, with --quick; cuda:1: another GPU (cuda)"},
        backend={"help": "of ours (triton; on the CPU torch)"},
    )  # fmt: skip
    here = torch.device(given.device)
    on_cpu, tests, one_by_one = here.type == "cpu", None, False
    reason = (None if given.quick else "--device cpu is a self-test of this script: it needs --quick") if on_cpu else refusal()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    if not on_cpu:
        torch.cuda.set_device(here)
        torch.backends.cudnn.benchmark = True
        one_by_one = torch.cuda.get_device_properties(here).total_memory < TOGETHER_BYTES
    given.backend = given.backend or ("torch" if on_cpu else "triton")
    found = facts(here)
    print("self-test on the CPU: no GPU is measured" if on_cpu else f"on {found['name']}", end="\n\n")
    if "tests" in given.only and given.tests != "none" and not on_cpu:
        tests = run_tests(tests_of_gpus() if given.tests == "gpu" else ["tests"])
    peaks = device.rates(here, 64, 2**20) if given.quick else device.rates(here)
    report = record.Report("gpu-" + re.sub(r"[^a-z0-9]+", "-", found["name"].lower()).strip("-"), given)
    for part in given.only:
        for case in cases(part, given, here) if part != "tests" else ():
            report.add(measure(case, given.rounds, given.budget, one_by_one=one_by_one, peaks=peaks))
    failed = report.close(device=found, tests=tests, shape=QUICK if given.quick else FULL)
    return failed or int(bool(tests and tests["status"]))


if __name__ == "__main__":
    sys.exit(main())
