"""How the cost of ours grows with sequence length, batch size and number of past tasks.

    python -m bench.scaling [--rounds 3] [--quick] [--results FOLDER]

The sides of a curve are sizes, run by the fastest backend of the machine. Times are held against *useful* operations: where
cost is linear in them, the time of an operation is the same at every size.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from math import log
from typing import Any

from bench import record
from bench.harness import Answer, Call, Case, Measured, Operations, measure
from bench.network import RHO, Forward, LaterStep, NetworkCase
from bench.shapes import TINY, TTL, Shape

# Of the shape's own size: 30 to 200 items and 64 to 512 users at the TTL shape.
SHARES = {"length": (0.3, 0.6, 1.0, 2.0), "batch": (0.25, 0.5, 1.0, 2.0)}
PAST = range(1, 9)


class Curve(Case):
    """A case at several sizes. `base`: the one that the others are compared with."""

    def __init__(self, call: str, variable: str, cases: dict[int, NetworkCase], base: int) -> None:
        self.name, self.call, self.cases, self.base = variable, call, cases, str(base)
        self.sides = tuple(map(str, cases))

    @property
    def title(self) -> str:
        shape = self.cases[int(self.base)].shape
        others = {"length": f"B = {shape.batch}", "batch": f"L = {shape.length}", "past tasks": f"{RHO:.0%} of users for each"}
        return f"{self.call} over {self.name}, {others[self.name]}"

    def operations(self, side: str) -> Operations:
        return self.cases[int(side)].operations("ours")

    def side(self, name: str) -> Call:
        call = self.cases[int(name)].side("ours")

        def run() -> Answer:
            call.run()
            return {}  # each size computes something else: there is nothing to compare

        return Call(run)


def curves(shape: Shape) -> list[Curve]:
    """All curves."""
    found = []
    for variable, shares in SHARES.items():
        base = getattr(shape, variable)
        sizes = {round(base * share): replace(shape, **{variable: round(base * share)}) for share in shares}
        found.append(Curve("forward", variable, {at: Forward(size) for at, size in sizes.items()}, base))
        found.append(Curve("training step of task 3", variable, {at: LaterStep(size) for at, size in sizes.items()}, base))
    past: dict[int, NetworkCase] = {number: LaterStep(shape, past=number) for number in PAST}
    return [*found, Curve("training step of the next task", "past tasks", past, 1)]


def relative(measured: Measured, base: str) -> dict[str, dict[str, float]]:
    """For each size operations, time and time of an operation, relative to the base's."""
    found, useful_base = {}, measured.sides[base].operations.useful
    for name, side in measured.sides.items():
        useful, time = side.operations.useful / useful_base, 1 / (measured.times(name, base) or float("nan"))
        found[name] = {"useful_times_base": useful, "time_times_base": time, "cost_times_base": time / useful}
    return found


def statement(rows: dict[str, dict[str, float]], curve: Curve) -> str:
    """How linear a curve is, in a sentence."""
    useful, time, cost = ([row[f"{key}_times_base"] for row in rows.values()] for key in ("useful", "time", "cost"))
    power = statistics.linear_regression([log(x) for x in useful], [log(y) for y in time]).slope
    said = f"A useful operation takes {min(cost):.2f} to {max(cost):.2f} of its time at {curve.base}; "
    said += f"time grows as useful operations to the power {power:.2f}."
    if curve.name == "past tasks":
        more, longer = (statistics.linear_regression([*map(float, rows)], values).slope for values in (useful, time))
        said += f" A further past task adds {more:.1%} of the base's operations and {longer:.1%} of its time."
    return said


def panel(variable: str, shown: Sequence[Curve], rows: Sequence[dict[str, Any]]) -> record.Panel:
    """Times over a variable, and what proportionality to the base would give."""
    lines = []
    for curve in shown:
        own = [row for row in rows if row["title"] == curve.title]
        at, base = [float(row["side"]) for row in own], next(row["median_seconds"] for row in own if row["side"] == curve.base)
        lines.append(record.Line(curve.call, at, [1e3 * row["median_seconds"] for row in own]))
        ideal = [1e3 * base * row["useful_times_base"] for row in own]
        lines.append(record.Line("in proportion to useful operations", at, ideal, expected=True))
    return record.Panel(variable, "time of a call (ms)", lines, logarithmic=variable != "past tasks")


def main(arguments: Sequence[str] | None = None) -> int:
    given = record.parse(__doc__, arguments)
    shape, report = TINY if given.quick else TTL, record.Report("scaling", given)
    shown = curves(shape)
    for curve in shown:
        measured = measure(curve, given.rounds, given.budget)
        rows = relative(measured, curve.base)
        report.add(measured, rows)
        print(statement(rows, curve), end="\n\n")
    status = report.close(shape=shape)
    if report.path is not None and status == 0:
        variables = dict.fromkeys(curve.name for curve in shown)
        panels = [panel(name, [curve for curve in shown if curve.name == name], report.rows) for name in variables]
        record.plot(report.path.with_suffix(".png"), "How the cost of a call grows", panels)
    return status


if __name__ == "__main__":
    sys.exit(main())
