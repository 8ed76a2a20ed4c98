"""What `bench/gpu.py` leaves: Markdown tables, the bars and whether they are met, and a JSON document."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from bench import report
from bench.cases import Shape
from bench.gpu_cases import OURS, REPLAYED
from bench.gpu_measure import Kernels, Rates, Result, first_line
from bench.large_catalogues import duration
from teracon_fast.kernels import configs

NAMES = {
    "eager": "eager, float32", "eager-bf16": "eager, autocast to bf16", "compile-bf16": "torch.compile of eager, bf16",
    "torch": "packed, plain PyTorch, float32", "torch-bf16": "packed, plain PyTorch, bf16", "ours-fp32": "ours, float32",
    "ours": "ours, float32", OURS: "ours, bf16", REPLAYED: "ours, bf16, CUDA graphs",
    "ours-merged": "ours, equal rows merged, float32",
    "ours-merged-bf16": "ours, equal rows merged, bf16",
}  # fmt: skip
# What is asked of a GPU of the class of an H200, in bf16.
ASKED_STEP, ASKED_FLOOR, ASKED_EMBED, ASKED_USERS, ASKED_FIRST, ASKED_CONV = 15.0, 2.5, 25.0, 1e6, 10.0, 0.6
# From this share of a step in kernels on they limit it, not the host.
BUSY = 0.9


@dataclass(frozen=True)
class Equivalence:
    """What pytest said: exit status, and its last line."""

    status: int
    said: str
    seconds: float


@dataclass(frozen=True)
class Bar:
    """What is asked, what was found, and whether that is enough: None where it was not measured."""

    what: str
    asked: str
    found: str
    met: bool | None

    @property
    def verdict(self) -> str:
        return "not measured" if self.met is None else "met" if self.met else "NOT met"


@dataclass
class Run:
    """All that a run measures. `on`: the device and how the kernels ran there, in words."""

    on: str
    shape: Shape
    rounds: int
    backend: str
    rates: Rates | None = None
    tests: Equivalence | None = None
    results: dict[str, Result] = field(default_factory=dict)
    heads: dict[str, Result] = field(default_factory=dict)
    kernels: Kernels | None = None
    failed: list[str] = field(default_factory=list)


def bars(run: Run) -> list[Bar]:
    """Every bar against what was measured."""
    step, first = run.results.get("t3-step"), run.results.get("t1-step")
    small = run.results.get("embed")
    return [
        _tests(run.tests),
        _times("training step of task 3 with retention and Adam", step, ASKED_STEP),
        _floor(run, step),
        _times("embedding of all tasks", small, ASKED_EMBED),
        _users(run),
        _times("training step of task 1", first, ASKED_FIRST),
        _fits(run.results.get("t1-step-large")),
        _share(run),
    ]


def _tests(tests: Equivalence | None) -> Bar:
    met = None if tests is None else tests.status == 0
    return Bar("equivalence", "all of these tests pass", "not run" if tests is None else tests.said, met)


def _ours(result: Result) -> str:
    """The side of ours that is judged: in bf16, the faster of launch by launch and replayed."""
    sides = [side for side in (OURS, REPLAYED) if side in result.sides and result.sides[side].seconds]
    return min(sides, key=lambda side: result.sides[side].median, default=OURS)


def _times(what: str, result: Result | None, asked: float) -> Bar:
    times = None if result is None else result.times_eager(_ours(result))
    size = "" if result is None else f", B={result.users:,}"
    found = "not measured"
    if times is not None and result is not None:
        how = ", as a CUDA graph" if _ours(result) == REPLAYED else ""
        found = f"{times:.1f} times {NAMES[result.best_eager or 'eager']}{how}"
    return Bar(what + size, f"{asked:g} times eager at its best", found, None if times is None else times >= asked)


def _floor(run: Run, result: Result | None) -> Bar:
    what, asked = "the same, against the floor", f"within {ASKED_FLOOR:g} of the floor"
    floor = None if result is None else floor_of(run, result)
    if result is None or floor is None or not result.sides[_ours(result)].seconds:
        return Bar(what, asked, "not measured", None)
    times = result.sides[_ours(result)].median / floor
    return Bar(what, asked, f"{times:.2f} times {duration(floor)}", times <= ASKED_FLOOR)


def floor_of(run: Run, result: Result) -> float | None:
    """Seconds that a case takes at least at the measured rates, None without rates."""
    return None if run.rates is None else run.rates.floor(result.operations.useful, result.traffic.bytes)


def _users(run: Run) -> Bar:
    """Users a second; where they are too few, what the floor allows is the reason or it is not."""
    what, asked = "embedding of all tasks, users a second", f"{ASKED_USERS:,.0f}, or the reason why not"
    measured = [result for name, result in run.results.items() if name.startswith("embed") and result.sides[OURS].seconds]
    if not measured:
        return Bar(what, asked, "not measured", None)
    best = max(measured, key=lambda result: result.users / result.sides[OURS].median)
    rate, floor = best.users / best.sides[OURS].median, floor_of(run, best)
    found = f"{rate:,.0f} with B={best.users:,}"
    if rate < ASKED_USERS and floor is not None:
        most = best.users / floor
        why = "which is the reason" if most < ASKED_USERS else "so the floor is not the reason"
        found += f"; products and bytes alone allow {most:,.0f}, {why}"
    return Bar(what, asked, found, rate >= ASKED_USERS)


def _fits(result: Result | None) -> Bar:
    what, asked = "training step of task 1, large batch", "fits"
    if result is None:
        return Bar(what, asked, "not measured", None)
    side = result.sides[OURS]
    peak = "" if side.peak_mib is None else f", {side.peak_mib / 1024:,.1f} GiB in all"
    found = f"{duration(side.median)}{peak}" if side.seconds else str(side.problem)
    return Bar(f"training step of task 1, B={result.users:,}", asked, found, bool(side.seconds))


def conv_rate(result: Result) -> float | None:
    """Useful operations a second of the kernels alone where those were replayed, else of calls; None without either."""
    if not result.sides[OURS].seconds:
        return None
    seconds = result.replayed if isinstance(result.replayed, float) else result.sides[OURS].median
    return result.operations.useful / seconds


def _share(run: Run) -> Bar:
    what, asked = "masked_conv forward", f"{ASKED_CONV:.0%} of the bf16 GEMM rate"
    result = run.results.get("masked-conv")
    rate = None if result is None else conv_rate(result)
    if run.rates is None or result is None or rate is None:
        return Bar(what, asked, "not measured", None)
    how = "kernels alone" if isinstance(result.replayed, float) else f"with the host's part, {result.replayed}"
    share = rate / run.rates.bf16
    return Bar(what, asked, f"{share:.0%}, {rate / 1e12:,.3g} TFLOP/s useful ({how})", share >= ASKED_CONV)


def markdown(columns: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table, as lines."""
    lines = [f"| {' | '.join(columns)} |", "| --- |" + " ---: |" * (len(columns) - 1)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def rate_lines(rates: Rates) -> list[str]:
    rows = [
        [f"torch.mm {rates.size}^3, bf16", f"{rates.bf16 / 1e12:,.4g} TFLOP/s"],
        [f"torch.mm {rates.size}^3, fp32 with TF32", f"{rates.tf32 / 1e12:,.4g} TFLOP/s"],
        [f"torch.mm {rates.size}^3, fp32", f"{rates.fp32 / 1e12:,.4g} TFLOP/s"],
        [f"clone of {rates.copied / 2**20:,.4g} MiB, read and written", f"{rates.copy / 1e9:,.4g} GB/s"],
    ]
    return ["### what the device does at most", "", *markdown(["", "measured"], rows)]


def result_lines(run: Run, result: Result) -> list[str]:
    """A case's table and what its floor is made of."""
    rows = []
    floor = floor_of(run, result) if result.traffic.parts else None
    for name, side in result.sides.items():
        if not side.seconds:
            rows.append([NAMES[name], f"{side.problem}", *[""] * 6])
            continue
        times, useful = result.times_eager(name), result.operations.useful
        rows.append([
            NAMES[name],
            duration(side.median),
            "" if times is None else f"{times:.2f}",
            f"{result.users / side.median:,.0f}" if result.users else "",
            f"{useful / side.median / 1e12:,.3g}" if useful else "",
            f"{side.median / floor:.2f}" if floor and name.endswith("bf16") else "",
            "" if side.peak_mib is None else f"{side.peak_mib:,.0f} MiB",
            side.note,
        ])  # fmt: skip
    columns = ["side", "median", "times eager", "users/s", "useful TFLOP/s", "times the floor", "peak memory", "remark"]
    lines = [f"### {result.title}", "", *markdown(columns, rows)]
    if isinstance(result.replayed, float):
        lines += ["", f"As a graph of its launches, without the host's part: {duration(result.replayed)}."]
    elif result.replayed is not None:
        lines += ["", f"As a graph of its launches: {result.replayed}."]
    return lines + floor_lines(run, result)


def floor_lines(run: Run, result: Result) -> list[str]:
    """What the floor of a case is made of (`bench.traffic` has the count)."""
    if run.rates is None or not result.traffic.parts:
        return []
    products, moved = result.operations.useful / run.rates.bf16, result.traffic.bytes / run.rates.copy
    parts = ", ".join(f"{name} {size / 1e9:,.3g} GB" for name, size in result.traffic.parts.items())
    return [
        "",
        f"Floor, bf16: {duration(max(products, moved))} = the larger of {result.operations.useful / 1e12:,.3g} TFLOP useful, "
        f"{duration(products)}, and {result.traffic.bytes / 1e9:,.3g} GB, {duration(moved)} ({parts}).",
    ]


def kernel_lines(kernels: Kernels) -> list[str]:
    """Whether launches or kernels limit the step, and which kernels take most."""
    limit = "kernels limit" if kernels.share >= BUSY else "the host limits: launches and packing"
    rows = [[name[:90], duration(seconds), f"{launches:g}"] for name, seconds, launches in kernels.longest]
    return [
        "### training step of task 3, ours, bf16: launches or kernels",
        "",
        f"A step takes {duration(kernels.step)} with the launch queue full, its {kernels.launches:,.0f} kernels "
        f"{duration(kernels.busy)} in sum, {kernels.share:.0%}: {limit}.",
        "",
        *markdown(["kernel", "in a step", "launches"], rows),
    ]


def bar_lines(run: Run) -> list[str]:
    """The judged table."""
    rows = [[bar.what, bar.asked, bar.found, bar.verdict] for bar in bars(run)]
    sizes = " / ".join(f"{labels:,}" for labels in run.shape.labels)
    lines = [f"### what was asked, {run.on}", "", *markdown(["", "asked", "found", ""], rows), ""]
    lines += [*(f"- FAILED: {failure}" for failure in run.failed), ""] if run.failed else []
    shape = f"L={run.shape.length}, f={run.shape.channels}, labels {sizes}, bf16; ours is backend {run.backend!r}"
    reference = "TF32 is allowed in float32. The reference has cudnn.benchmark and fused Adam, and its faster precision counts."
    return [*lines, f"{shape}. {reference}"]


def device_facts(device: torch.device) -> dict[str, Any]:
    """Name, memory, driver and software of a device."""
    facts: dict[str, Any] = {"architecture": configs.architecture(device), "triton": triton_version()}
    facts["configurations_measured"] = configs.read().get(facts["architecture"], {}).get("measured")
    if device.type != "cuda":
        return {"name": "cpu", **facts}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_gib": properties.total_memory / 2**30,
        "processors": properties.multi_processor_count,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        **facts,
    }


def triton_version() -> str | None:
    """None where it is not installed."""
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def driver_version() -> str | None:
    """As the driver's own tool tells it, None where there is none."""
    for command in (
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        ["rocm-smi", "--showdriverversion", "--csv"],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            continue
        lines = done.stdout.strip().splitlines()
        if done.returncode == 0 and lines:
            return lines[-1].strip()
    return None


def slug(name: str) -> str:
    """A device's name for a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def document(run: Run, device: torch.device) -> dict[str, Any]:
    """Everything about a run."""
    return {
        **report.provenance(),
        "kind": "gpu",
        "device": device_facts(device),
        "on": run.on,
        "backend_measured": run.backend,
        "shape": asdict(run.shape),
        "rounds": run.rounds,
        "rates": None if run.rates is None else asdict(run.rates),
        "failed": run.failed,
        "tests": None if run.tests is None else asdict(run.tests),
        "bars": [{**asdict(bar), "verdict": bar.verdict} for bar in bars(run)],
        "cases": {name: _case(run, result) for name, result in run.results.items()},
        "heads": {name: _case(run, result) for name, result in run.heads.items()},
        "kernels": None if run.kernels is None else {**asdict(run.kernels), "share": run.kernels.share},
    }


def _case(run: Run, result: Result) -> dict[str, Any]:
    def of(name: str) -> Mapping[str, Any]:
        side = result.sides[name]
        record = asdict(side)
        if side.seconds:
            record |= {"median_seconds": side.median, "times_eager": result.times_eager(name)}
        return record

    return {
        "title": result.title,
        "users": result.users,
        "useful_gflop": result.operations.useful / 1e9,
        "dense_gflop": result.operations.dense / 1e9,
        "bytes": result.traffic.parts,
        "floor_seconds": floor_of(run, result) if result.traffic.parts else None,
        "replayed": result.replayed,
        "sides": {name: of(name) for name in result.sides},
    }


def refusal() -> str | None:
    """Why nothing can be measured here; None on a machine with a GPU that PyTorch sees."""
    if torch.cuda.is_available():
        return None
    built = torch.version.cuda or torch.version.hip
    if built is None:
        how = "in an environment without it, `make bench-gpu TORCH=torch` installs one with CUDA"
        return f"no GPU: torch {torch.__version__} is built without CUDA and ROCm; {how}"
    try:
        torch.cuda.init()
    except Exception as error:  # what the driver has to say
        return f"no GPU: {first_line(error)}"
    return "no GPU: PyTorch sees none"
