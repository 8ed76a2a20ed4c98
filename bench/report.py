"""What a bench run leaves: a closing table on the terminal and a JSON file with everything it was made from."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import teracon_fast
from bench.cases import Shape
from bench.measure import ROOT, Measured, Side
from teracon_fast.files import atomic_write
from teracon_fast.ops import native

FORMAT_VERSION = 1
COLUMNS = ("side", "median", "x eager", "users/s", "useful GFLOP/s", "of peak", "dense GFLOP/s", "memory")
WIDTHS = (12, 12, 9, 10, 16, 9, 15, 12)


def table(cases: Sequence[Measured]) -> list[str]:
    """The closing table, as lines."""
    lines = ["".join(name.rjust(width) for name, width in zip(COLUMNS, WIDTHS, strict=True))]
    for case in cases:
        lines.append(f"{case.title}: {case.operations.useful / 1e9:.4g} GFLOP useful, {case.operations.dense / 1e9:.4g} dense")
        for name, side in case.sides.items():
            lines.append(_row(case, name, side))
    peak = next((case.peak_gflops for case in cases if case.peak_gflops is not None), None)
    if peak is None:
        lines.append(f"fp32 FMA peak: not measured, {native.missing_reason()}")
    else:
        rates = [case.peak_gflops for case in cases if case.peak_gflops is not None]
        threads, kind = torch.get_num_threads(), native.fma_instructions()
        lines.append(f"fp32 FMA peak, {threads} threads, {kind}: {min(rates):.4g} to {max(rates):.4g} GFLOP/s between the cases")
    lines += [
        "of peak: of the fp32 FMA peak, for every side; useful operations are counted as direct ones.",
        "useful: operations that the results need (cone, pads once); dense: those of a dense network, at this speed.",
        "memory: highest resident memory above a process that has only imported everything, in a process of its own.",
    ]
    return lines


def _row(case: Measured, name: str, side: Side) -> str:
    if not side.seconds:
        return name.rjust(WIDTHS[0]) + f"   {side.problem}"
    ratio, useful = case.ratio(name), case.operations.useful / side.median / 1e9
    cells = (
        name,
        f"{side.median * 1e3:,.1f} ms" if side.median < 10 else f"{side.median:,.1f} s",
        "" if ratio is None else f"{ratio:.2f}",
        f"{case.users / side.median:,.0f}",
        f"{useful:.4g}",
        "" if case.peak_gflops is None else f"{useful / case.peak_gflops:.1%}",
        f"{case.operations.dense / side.median / 1e9:.4g}",
        "" if side.peak_mib is None else f"{side.peak_mib:,.0f} MiB",
    )
    return "".join(cell.rjust(width) for cell, width in zip(cells, WIDTHS, strict=True))


def provenance() -> dict[str, Any]:
    """Where and when and of what a measurement was taken: format, date, machine, versions, backend."""
    return {
        "format_version": FORMAT_VERSION,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "system": platform.platform(),
        },
        "versions": {
            "teracon_fast": teracon_fast.__version__,
            "commit": _commit(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "backend": teracon_fast.env_report()["auto"],
    }


def document(cases: Sequence[Measured], shape: Shape, rounds: int) -> dict[str, Any]:
    """Everything about a run: provenance, sizes, each call's seconds and what follows from them."""
    measured = {case.name: _case(case) for case in cases}
    return {**provenance(), "shape": asdict(shape), "rounds": rounds, "cases": measured}


def _case(case: Measured) -> dict[str, Any]:
    sides = {}
    for name, side in case.sides.items():
        record: dict[str, Any] = {"seconds": side.seconds, "peak_memory_mib": side.peak_mib}
        if side.problem is not None:
            record["problem"] = side.problem
        if side.seconds:
            useful = case.operations.useful / side.median / 1e9
            record |= {
                "median_seconds": side.median,
                "times_eager": case.ratio(name),
                "users_per_second": case.users / side.median,
                "useful_gflops": useful,
                "dense_gflops": case.operations.dense / side.median / 1e9,
                "share_of_peak": None if case.peak_gflops is None else useful / case.peak_gflops,
            }
        sides[name] = record
    return {
        "title": case.title,
        "users": case.users,
        "useful_gflop": case.operations.useful / 1e9,
        "dense_gflop": case.operations.dense / 1e9,
        "fma_peak_gflops": case.peak_gflops,
        "sides": sides,
    }


def write(run: dict[str, Any], folder: Path, kind: str = "") -> Path:
    """Write a run's document under a name with its date, its version and, but for the suite, its kind; returns the path."""
    moment = run["date"][:16].replace(":", "")
    name = f"{moment}-{run['versions']['teracon_fast']}-{run['versions']['commit'] or 'unknown'}"
    path = folder / f"{name}{kind and '-'}{kind}.json"
    with atomic_write(path, "w") as file:
        json.dump(run, file, indent=1)
        file.write("\n")
    return path


def _commit() -> str | None:
    """Short hash of the checkout's commit, with -dirty when files differ from it; None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def _cpu_name() -> str:
    """The processor's name; the kernel knows it better than Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
