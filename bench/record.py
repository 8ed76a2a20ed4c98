"""What a measurement leaves: Markdown tables on the terminal, a JSON record, a plot. And the options that scripts share.

A record holds where and of what it was taken, and `rows`: flat, one for each side of each case, with the names of `COLUMNS` and
the seconds of every turn. Times are seconds, memory is MiB, errors are relative.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import teracon_fast
from bench.harness import BUDGET, ROUNDS, Measured
from teracon_fast.files import atomic_write

FORMAT_VERSION = 2
ROOT = Path(__file__).resolve().parent.parent
ALLOCATOR = ("MALLOC_", "LD_PRELOAD", "THP_MEM")  # what the variables begin with that memory depends on


def duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:,.1f} µs"
    return f"{seconds * 1e3:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def _number(unit: str = "", digits: int = 0) -> Callable[[float], str]:
    return lambda value: f"{value:,.{digits}f}{unit}"


# Keys of a row that tables show, in this order: heading, and how a value is written. Columns without values are left out.
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "side": ("side", str),
    "median_seconds": ("median", duration),
    "times_eager": ("x eager", _number(digits=2)),
    "times_best": ("x best of PyTorch", _number(digits=2)),
    "best": ("which is", str),
    "users_per_second": ("users/s", _number()),
    "useful_gflop": ("useful GFLOP", "{:,.4g}".format),
    "useful_gflops": ("useful GFLOP/s", "{:,.4g}".format),
    "share_of_peak": ("of peak", "{:.0%}".format),
    "gigabytes_per_second": ("GB/s", "{:,.4g}".format),
    "times_floor": ("x floor", _number(digits=2)),
    "useful_times_base": ("operations x base", _number(digits=3)),
    "time_times_base": ("time x base", _number(digits=3)),
    "cost_times_base": ("time per operation x base", _number(digits=3)),
    "peak_mib": ("peak memory", _number(" MiB")),
    "largest_error": ("error", "{:.1e}".format),
    "problem": ("not measured", str),
}


def table(title: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A Markdown table of rows, as lines."""
    shown = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    cells = [["" if row.get(key) is None else COLUMNS[key][1](row[key]) for key in shown] for row in rows]
    lines = [[COLUMNS[key][0] for key in shown], ["---"] + ["---:"] * (len(shown) - 1), *cells]
    return [f"### {title}", "", *(f"| {' | '.join(line)} |" for line in lines)]


def provenance() -> dict[str, Any]:
    """Where and when and of what a measurement is taken: format, date, machine, versions, backends."""
    here = teracon_fast.env_report()
    allocator = {name: value for name, value in os.environ.items() if name.startswith(ALLOCATOR)}
    machine = {key: here[key] for key in ("cores", "threads", "cpu_capability", "cpu_isa", "platform", "devices")}
    versions = {key: here[key] for key in ("teracon_fast", "python", "torch")}
    return {
        "format_version": FORMAT_VERSION,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": _cpu_name(), **machine, "allocator": allocator or "default"},
        "versions": {**versions, "numpy": np.__version__, "triton": _triton_version(), "commit": _commit()},
        "backend": here["auto"],
    }


def _commit() -> str | None:
    """Short hash of the checkout's commit, with -dirty when files differ from it; None outside a git checkout."""
    with suppress(OSError):
        command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None
    return None


def _cpu_name() -> str:
    """The processor's name; the kernel knows it better than Python does."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor()


def _triton_version() -> str | None:
    with suppress(ImportError):
        return str(importlib.import_module("triton").__version__)
    return None


class Report:
    """Prints the table of each case as it is measured, and writes the record at the end: to `path`, where there is one.

    Args:
        kind: of the record, and part of its file's name. given: options, from `parse`.
    """

    def __init__(self, kind: str, given: Any) -> None:
        self.kind, self.given = kind, given
        self.rows: list[dict[str, Any]] = []
        self.peaks: dict[str, float] = {}
        self.failed: list[str] = []
        self.path: Path | None = None

    def add(self, measured: Measured, more: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Take a case's rows. `more`: further values for the rows of some sides."""
        rows = [row | dict((more or {}).get(row["side"], {})) for row in measured.rows()]
        self.rows += rows
        self.failed += [f"{measured.title}, {name}: {side.problem}" for name, side in measured.sides.items() if side.failed]
        self.peaks |= {name: max(rate, self.peaks.get(name, 0.0)) for name, rate in measured.peaks.items()}
        print("\n".join(table(measured.title, rows)), end="\n\n", flush=True)

    def close(self, **more: Any) -> int:
        """Print peaks and failures, and write the record where there is a folder for it; returns the exit status."""
        for name, rate in self.peaks.items():
            print(f"peak, {name}: {rate / 1e9:,.4g} {'GB/s' if name == 'copy' else 'GFLOP/s'}")
        print("".join(f"FAILED: {failure}\n" for failure in self.failed), end="")
        folder: Path | None = self.given.results
        if folder is not None:
            settings = {"rounds": self.given.rounds, "peaks": self.peaks, "failed": self.failed}
            record = {**provenance(), "kind": self.kind, **settings, **more, "rows": self.rows}
            moment, versions = record["date"][:16].replace(":", ""), record["versions"]
            self.path = folder / f"{moment}-{versions['teracon_fast']}-{versions['commit'] or 'unknown'}-{self.kind}.json"
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.path, "w") as file:
                json.dump(record, file, indent=1, default=vars)
                file.write("\n")
            print(f"record: {self.path}")
        return int(bool(self.failed))


def add_options(add: Callable[..., Any]) -> None:
    """The options of all scripts; `add`: the `add_argument` of a parser, or pytest's `addoption`."""
    add("--quick", action="store_true", help="tiny sizes: does the script work? Its times mean nothing")
    add("--rounds", type=int, help=f"turns of each side ({ROUNDS}, of a quick run 1; fewer of long calls)")
    add("--results", metavar="FOLDER", type=Path, help="where the record goes (bench/results; of a quick run, nowhere)")


def parse(description: str | None, arguments: Sequence[str] | None, only: Sequence[str] = (), **more: dict[str, Any]) -> Any:
    """Parse a script's options: those of `add_options`, `--only` with its choices, and its own, as for `add_argument`."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    add_options(parser.add_argument)
    if only:
        parser.add_argument("--only", choices=only, action="append", help="what to measure; may be given again (all)")
    for name, options in more.items():
        parser.add_argument(f"--{name}", **options)
    given = parser.parse_args(arguments)
    if given.rounds is not None and given.rounds < 1:
        parser.error(f"--rounds: got {given.rounds}, expected at least 1")
    if only:
        given.only = given.only or only
    return completed(given)


def completed(given: Any) -> Any:
    """The options with what follows from others: rounds, the folder of the record, and `budget`, the time for each case."""
    given.rounds = given.rounds or (1 if given.quick else ROUNDS)
    given.results = given.results or (None if given.quick else ROOT / "bench" / "results")
    given.budget = 1.0 if given.quick else BUDGET
    if given.quick:
        print("quick run on tiny sizes: these times mean nothing\n")
    return given


class Line(NamedTuple):
    """Points of a line in a plot. `expected`: dashed and grey, drawn for comparison."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    expected: bool = False


class Panel(NamedTuple):
    """Lines over one variable, with the names of both axes."""

    x: str
    y: str
    lines: Sequence[Line]
    logarithmic: bool = True


def plot(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Draw panels side by side, one color and marker for each label."""
    from teracon_fast.report import plots

    labels = list(dict.fromkeys(line.label for panel in panels for line in panel.lines if not line.expected))
    handles: dict[str, Any] = {}
    with plots.style():
        figure = plots.new_figure(4.2 * len(panels), 4.5)
        for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
            for line in panel.lines:
                look: dict[str, Any] = {"color": "#555555", "ls": "--", "lw": 1}
                if not line.expected:
                    number = labels.index(line.label) % len(plots.COLORS)
                    look = {"color": plots.COLORS[number], "marker": plots.MARKERS[number], "ls": plots.LINES[number]}
                (handles[line.label],) = axes.plot(line.x, line.y, **look)
            if panel.logarithmic:
                axes.loglog()
            ticks = sorted({x for line in panel.lines for x in line.x})
            axes.set_xticks(ticks, [f"{x:,g}" for x in ticks])
            axes.minorticks_off()
            axes.set(xlabel=panel.x, ylabel=panel.y)
        figure.suptitle(title)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
        plots.save(figure, path)
    print(f"plot: {path}")
