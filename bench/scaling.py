"""How the cost of ours grows with sequence length, batch size and number of past tasks.

    python bench/scaling.py [--rounds 5] [--quick] [--results FOLDER]

Every point is a case of the bench (`bench.cases`) at another size, run by the fastest backend of the machine. The points
of a curve take turns within one process, after a first call each that is not timed; a point's time is the median of its
calls. Times are held against *useful* operations (`bench.operations`): where cost is linear in them, the time of an
operation is the same at every point. Leaves a Markdown table on the terminal, and a JSON file and a picture in a folder.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

# As a script: its own folder would be the only place to look.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import command_line, report
from bench.cases import RHO, TINY, TTL, Case, ContinualStep, Forward, Shape
from bench.measure import fma_peak
from bench.operations import Operations
from teracon_fast.report import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of the shape's own size, which is each curve's base: 30 to 200 items and 64 to 512 users at the TTL shape.
LENGTHS, BATCHES = (0.3, 0.6, 1, 2), (0.25, 0.5, 1, 2)
PAST = range(1, 9)
VARIABLES = {"length": "sequence length L (items)", "batch": "batch size B (users)", "past": "past tasks"}


@dataclass
class Point:
    """A size, its case, and the seconds of each call."""

    at: int
    case: Case
    operations: Operations
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def positions(self) -> int:
        """Real positions of the batch: items that are no pads."""
        return int(self.case.shape.lengths(self.case.users).sum())


@dataclass
class Curve:
    """Points of one variable, and the one that the others are compared with."""

    variable: str  # of VARIABLES
    call: str
    points: list[Point]
    base: int  # index

    @property
    def useful(self) -> list[float]:
        """Useful operations of each point relative to the base's."""
        return [point.operations.useful / self.points[self.base].operations.useful for point in self.points]

    @property
    def time(self) -> list[float]:
        """Time of each point relative to the base's."""
        return [point.median / self.points[self.base].median for point in self.points]

    @property
    def cost(self) -> list[float]:
        """Time of a useful operation relative to the base's: 1 everywhere if time is proportional to operations."""
        return [time / useful for time, useful in zip(self.time, self.useful, strict=True)]

    @property
    def exponent(self) -> float:
        """p of the best fit time = c * useful**p, by least squares of the logarithms."""
        return _slope([math.log(value) for value in self.useful], [math.log(value) for value in self.time])


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of the line through the points, by least squares."""
    return statistics.linear_regression(x, y).slope


def curves(shape: Shape) -> list[Curve]:
    """All curves, not measured yet."""
    lengths = [(replace(shape, length=round(shape.length * part)), part) for part in LENGTHS]
    batches = [(replace(shape, batch=round(shape.batch * part)), part) for part in BATCHES]
    found = []
    for variable, sizes in (("length", lengths), ("batch", batches)):
        for kind, call in ((Forward, "forward, last position"), (ContinualStep, "training step of task 3")):
            points = [_point(getattr(size, variable), kind(size)) for size, _ in sizes]
            found.append(Curve(variable, call, points, [part for _, part in sizes].index(1)))
    steps = [_point(past, ContinualStep(shape, past)) for past in PAST]
    return [*found, Curve("past", "training step of the next task", steps, 0)]


def _point(at: int, case: Case) -> Point:
    return Point(at, case, case.operations())


def measure(curve: Curve, rounds: int) -> None:
    """Call every point of a curve once a round, beginning with another one each time."""
    runs = [point.case.side("ours") for point in curve.points]
    for run in runs:
        run()
    for number in range(rounds):
        for index in range(len(runs)):
            turn = (number + index) % len(runs)
            gc.collect()
            start = time.perf_counter()
            runs[turn]()
            curve.points[turn].seconds.append(time.perf_counter() - start)


def table(curve: Curve) -> list[str]:
    """A Markdown table of a curve and what follows from it, as lines."""
    drawn = curve.variable == "past"
    heads = [VARIABLES[curve.variable], "drawn users" if drawn else "real positions", "useful GFLOP", "median ms"]
    heads += ["us per real position", "useful GFLOP/s", "useful x", "time x", "time per operation x"]
    lines = [f"### {_title(curve)}", "", f"| {' | '.join(heads)} |", "|" + " ---: |" * len(heads)]
    for point, useful, taken, cost in zip(curve.points, curve.useful, curve.time, curve.cost, strict=True):
        size = _drawn(point) if drawn else point.positions
        cells = [f"{point.at}", f"{size:,}", f"{point.operations.useful / 1e9:.4g}", f"{point.median * 1e3:,.4g}"]
        cells += [f"{point.median / point.positions * 1e6:.4g}", f"{point.operations.useful / point.median / 1e9:.4g}"]
        lines.append(f"| {' | '.join([*cells, f'{useful:.3f}', f'{taken:.3f}', f'{cost:.3f}'])} |")
    return [*lines, "", statement(curve)]


def statement(curve: Curve) -> str:
    """How linear a curve is, in a sentence."""
    base = curve.points[curve.base].at
    said = (
        f"The time of a useful operation is {min(curve.cost):.2f} to {max(curve.cost):.2f} of that at {base}; "
        f"time grows as useful operations to the power {curve.exponent:.2f}."
    )
    if curve.variable == "past":
        useful, taken = added(curve)
        said += f" Each further past task adds {useful:.1%} of the base's useful operations and {taken:.1%} of its time."
    return said


def added(curve: Curve) -> tuple[float, float]:
    """Useful operations and time that one more of the variable adds, relative to the base's."""
    at = [point.at for point in curve.points]
    return _slope(at, curve.useful), _slope(at, curve.time)


def _title(curve: Curve) -> str:
    extra = f", {RHO:.0%} of the users drawn for each" if curve.variable == "past" else ""
    return f"{curve.call} over {VARIABLES[curve.variable]}; {_kept(curve)}{extra}"


def _kept(curve: Curve) -> str:
    """The sizes that a curve does not vary."""
    shape = curve.points[curve.base].case.shape
    sizes = {"length": f"L = {shape.length}", "batch": f"B = {shape.batch}"}
    return ", ".join(size for name, size in sizes.items() if name != curve.variable)


def _drawn(point: Point) -> int:
    """Users drawn for all past tasks together; 0 where a case draws none."""
    return point.case.past * point.case.past_users if isinstance(point.case, ContinualStep) else 0


def document(measured: Sequence[Curve], shape: Shape, rounds: int, peak: float | None) -> dict[str, Any]:
    """Everything about a run, with the fields of `report.document` where they are the same things."""
    return {
        **report.provenance(),
        "kind": "scaling",
        "shape": asdict(shape),
        "rounds": rounds,
        "fma_peak_gflops": peak,
        "curves": [_curve(curve) for curve in measured],
    }


def _curve(curve: Curve) -> dict[str, Any]:
    points = []
    for point, useful, taken, cost in zip(curve.points, curve.useful, curve.time, curve.cost, strict=True):
        points.append(
            {
                "at": point.at,
                "title": point.case.title,
                "users": point.case.users,
                "drawn_users": _drawn(point),
                "real_positions": point.positions,
                "useful_gflop": point.operations.useful / 1e9,
                "dense_gflop": point.operations.dense / 1e9,
                "seconds": point.seconds,
                "median_seconds": point.median,
                "useful_gflops": point.operations.useful / point.median / 1e9,
                "useful_times_base": useful,
                "time_times_base": taken,
                "time_per_operation_times_base": cost,
            }
        )
    base = curve.points[curve.base].at
    return {"variable": curve.variable, "call": curve.call, "base": base, "exponent": curve.exponent, "points": points}


def picture(measured: Sequence[Curve], subtitle: str) -> Figure:
    """One panel a variable: median times with the range of the calls, and what proportionality to the base would give."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    calls = list(dict.fromkeys(curve.call for curve in measured))
    with plots.style():
        figure = Figure(figsize=(12, 4.3))
        figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
        handles: dict[str, Any] = {}
        for axes, variable in zip(figure.subplots(1, len(VARIABLES)), VARIABLES, strict=True):
            shown = [curve for curve in measured if curve.variable == variable]
            for curve in shown:
                number = calls.index(curve.call)
                colour, marker = plots.COLOURS[number], plots.MARKERS[number]
                at, times = [p.at for p in curve.points], np.array([p.median for p in curve.points]) * 1e3
                ends = [[1e3 * end(p.seconds) for p in curve.points] for end in (min, max)]
                spread = [times - ends[0], ends[1] - times]
                line = {"color": colour, "marker": marker, "ms": 5, "lw": 1.6, "capsize": 3}
                handles[curve.call] = axes.errorbar(at, times, spread, **line)
                ideal = times[curve.base] * np.array(curve.useful)
                (proportional,) = axes.plot(at, ideal, color="#555555", ls="--", lw=1.1, zorder=3)
                ring = {"marker": "o", "ms": 12, "mfc": "none", "mec": "#555555"}
                axes.plot(at[curve.base], times[curve.base], ls="none", **ring)
            if variable != "past":
                axes.set_xscale("log")
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_minor_locator(NullLocator())
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            else:
                axes.set_ylim(0, None)
            axes.set_xticks(at, [str(size) for size in at])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel(f"{VARIABLES[variable]}; {_kept(shown[0])}")
            axes.set_ylabel("time of a call (ms)")
            axes.set_title("\n".join(_growth(curve) for curve in shown))
        handles["in proportion to useful operations, from the ringed point"] = proportional
        figure.suptitle(f"How cost grows: median of the calls, bars from fastest to slowest\n{subtitle}", fontsize=11.5)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _growth(curve: Curve) -> str:
    if curve.variable == "past":
        useful, taken = added(curve)
        return f"{curve.call},\nper past task: time {taken:+.1%}, operations {useful:+.1%}"
    return f"{curve.call}: time ~ operations$^{{{curve.exponent:.2f}}}$"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    given, rounds, folder = command_line.parse(parser, arguments, 5, "timed calls of each point")
    shape = TINY if given.quick else TTL
    measured, peaks = curves(shape), [fma_peak()]
    for curve in measured:
        measure(curve, rounds)
        peaks.append(fma_peak())
        print("\n".join(table(curve)), end="\n\n", flush=True)
    run = document(measured, shape, rounds, max((peak for peak in peaks if peak is not None), default=None))
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = report.write(run, folder, "scaling")
    machine, versions = run["machine"], run["versions"]
    backend = ", ".join(sorted(set(run["backend"].values())))
    subtitle = f"{machine['cpu']}, threads: {machine['threads']}, backend: {backend}, version {versions['teracon_fast']}"
    drawn = picture(measured, subtitle)
    with plots.style():
        drawn.savefig(path.with_suffix(".png"))
    print(f"kept in {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
