"""Ours on a GPU: equivalence tests first, then every case beside the eager reference, against the device's own measured rates.

    python bench/gpu.py [--only PART] [--tests gpu|all|none] [--compile] [--quick] [--results FOLDER]

Parts: `tests`, the tests whose kernels run on the GPU; `cases` (`bench.gpu_cases`); `heads` (`bench.heads`) over the first task's
labels; `kernels`, a profile that tells whether launches or kernels limit. The rates of a product and of a copy are always
measured. Meant to take less than ten minutes in all. Leaves Markdown tables on the terminal, the last of which says of
everything asked whether it is met, and a JSON file named after the device.

`--device cpu --quick` is a self-test of this script without a GPU, at tiny shapes: its times mean nothing. With
TRITON_INTERPRET=1 and `--backend triton` the kernels then run in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

# As a script: its own folder would be the only place to look.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import gpu_cases, gpu_measure, gpu_report, heads, report
from bench.gpu_cases import FULL, OURS, QUICK
from bench.gpu_measure import BLOCK_SECONDS, Meter, Result
from bench.gpu_report import Equivalence, Run
from bench.heads import CrossEntropy, Rank, Retention, Spec
from bench.measure import ROOT

PARTS = ("tests", "cases", "heads", "kernels")
TESTS = ("gpu", "all", "none")
# Seconds of each case's blocks, beside what building and compiling take.
BUDGET = 15.0
MANY = 8192  # users embedded at once for the rate of a service
# Memory from which on all sides of a case are held at once, and take turns.
TOGETHER_BYTES = 60e9


@dataclass(frozen=True)
class Options:
    """`quick`: tiny sizes. `compiled`: torch.compile of the reference too. `together`: the device holds all sides of a case."""

    quick: bool
    compiled: bool
    together: bool


def tests_of_gpus() -> list[str]:
    """Test files that have a kernel to run on a GPU: those that speak of Triton or CUDA. Not the ones that compile for GPUs which
    need not be there, or that run these scripts."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    chosen = [path for path in files if re.search("triton|cuda", path.read_text())]
    left_out = re.compile("test_(bench|tune|packaging|import|triton_compiles)")
    return [str(path.relative_to(ROOT)) for path in chosen if not left_out.match(path.name)]


def run_tests(arguments: Sequence[str]) -> Equivalence:
    """Run pytest in a process of its own, its output on the terminal, and keep its last line."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return Equivalence(process.returncode, last.strip("= "), time.perf_counter() - start)


def head_specs(sizes: heads.Sizes) -> dict[str, Spec]:
    """Heads over the first task's labels: what each step and the evaluation do with them."""
    labels, (few, many) = sizes.catalogue, sizes.retained
    three = ("eager", "ours", "ours-bf16")
    return {
        "cross-entropy": Spec(
            CrossEntropy, labels, ("eager", "eager-bf16", "ours-merged", "ours-merged-bf16"), sizes.sequences
        ),
        "retention-few": Spec(Retention, labels, three, few),
        "retention-many": Spec(Retention, labels, three, many),
        "rank": Spec(Rank, labels, three, sizes.ranked),
    }


@contextlib.contextmanager
def noted(run: Run, what: str) -> Iterator[None]:
    """A failure of one part is told and kept, and the others are measured."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        run.failed.append(f"{what}: {gpu_measure.first_line(error)}")


def run_parts(run: Run, meter: Meter, wanted: Sequence[str], tests: Sequence[str], given: Options) -> Iterator[list[str]]:
    """Measure the wanted parts, telling the tables of each as it is done."""
    if "tests" in wanted:
        run.tests = run_tests(tests)
        yield [f"tests: {run.tests.said}"]
    quick = given.quick
    run.rates = gpu_measure.rates(meter, 64, 2**20, 2) if quick else gpu_measure.rates(meter)
    yield gpu_report.rate_lines(run.rates)
    everything = gpu_cases.cases(run.shape, meter.device, run.backend, 2 * run.shape.batch if quick else MANY)
    if "cases" in wanted:
        for case in everything:
            with noted(run, case.title):
                replay = case.name == "masked-conv"
                result = gpu_measure.measure(case, meter, run.rounds, BUDGET, given.together, given.compiled, replay)
                run.results[case.name] = result
                run.failed += failures(result)
                yield gpu_report.result_lines(run, result)
    if "heads" in wanted:
        sizes = heads.QUICK if quick else heads.FULL
        for name, spec in head_specs(sizes).items():
            with noted(run, name):
                run.heads[name] = gpu_measure.measure_head(spec.make(sizes), meter, run.backend, run.rounds)
                yield gpu_report.result_lines(run, run.heads[name])
    if "kernels" in wanted:
        with noted(run, "profile"):
            run.kernels = gpu_measure.kernels(everything[0], OURS, meter, 1 if quick else 5)
            yield gpu_report.kernel_lines(run.kernels)


def failures(result: Result) -> list[str]:
    """Sides that should have run."""
    return [f"{result.title}, {name}: {side.problem}" for name, side in result.sides.items() if side.failed]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line says; returns 1 where tests or a measurement failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; may be given again (all)")
    parser.add_argument("--tests", choices=TESTS, default="gpu", help="those with something to run on a GPU, all, or none (gpu)")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the reference too; takes minutes more")
    parser.add_argument("--rounds", type=int, help="blocks of calls of each side (7)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does the script work? Times mean nothing")
    parser.add_argument("--results", metavar="FOLDER", type=Path, help="where the JSON goes (bench/results)")
    parser.add_argument("--device", default="cuda", help="cpu: a self-test, with --quick; cuda:1: another GPU (cuda)")
    parser.add_argument("--backend", help="of ours (triton; on the CPU torch)")
    given = parser.parse_args(arguments)
    if given.rounds is not None and given.rounds < 1:
        parser.error(f"--rounds: got {given.rounds}, expected at least 1")
    device = torch.device(given.device)
    if device.type == "cpu" and not given.quick:
        parser.error("--device cpu is a self-test of this script: it needs --quick")
    if device.type != "cpu":
        refused = gpu_report.refusal()
        if refused is not None:
            print(refused, file=sys.stderr)
            return 2
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    backend = given.backend or ("torch" if device.type == "cpu" else "triton")
    # A self-test is a part of the tests, and does not run them.
    without_tests = given.tests == "none" or device.type == "cpu"
    wanted = [part for part in given.only or PARTS if not (part == "tests" and without_tests)]
    facts = gpu_report.device_facts(device)
    on = f"on {facts['name']}"
    if device.type == "cpu":
        how = "Triton's interpreter" if backend == "triton" else f"backend {backend!r}"
        on = f"self-test on the CPU with {how}: no GPU was measured"
    together = device.type == "cpu" or torch.cuda.get_device_properties(device).total_memory >= TOGETHER_BYTES
    print(f"{on}; torch {torch.__version__}, triton {facts['triton']}, configurations of {facts['architecture']}", flush=True)
    if given.quick:
        print("quick run on tiny shapes: these times mean nothing")
    if not together:
        print("sides are measured one after the other: the device does not hold all of them")
    print()
    run = Run(on, QUICK if given.quick else FULL, given.rounds or (2 if given.quick else 7), backend)
    start = time.perf_counter()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells of itself on the terminal
    tests = tests_of_gpus() if given.tests == "gpu" else ["tests"]
    meter = Meter(device, block=0.001 if given.quick else BLOCK_SECONDS)
    for lines in run_parts(run, meter, wanted, tests, Options(given.quick, given.compile, together)):
        print("\n".join(lines), end="\n\n", flush=True)
    print("\n".join(gpu_report.bar_lines(run)), end="\n\n")
    folder = given.results or (None if given.quick else ROOT / "bench" / "results")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        path = report.write(gpu_report.document(run, device), folder, f"gpu-{gpu_report.slug(facts['name'])}")
        print(f"kept in {path}")
    print(f"{time.perf_counter() - start:,.0f} s in all")
    return 1 if run.failed or (run.tests is not None and run.tests.status) else 0


if __name__ == "__main__":
    sys.exit(main())
