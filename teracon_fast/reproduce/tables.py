"""From the results of cells to the tables: metrics, BWT, FWT, backward transfer and forgetting, and what they cost."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from teracon_fast.data.order import NOISE, NOISE_NAME
from teracon_fast.report.run_report import pretty
from teracon_fast.reproduce.experiments import TITLES, Quantity
from teracon_fast.reproduce.grids import Column, Entry, Grid, Line
from teracon_fast.reproduce.jobs import CellResult, read_result
from teracon_fast.reproduce.plan import Cell, Plan, Row
from teracon_fast.train.metrics import (
    backward_transfer,
    forgetting,
    forward_transfer,
    gem_backward_transfer,
    headline,
    result_matrix,
)

Array = NDArray[np.float64]
FORMS: dict[str, str] = {"metric": ".4f", "bwt": "+.2f %", "fwt": "+.2f %", "change": "+.2f %", "seconds": ".2f"}
NAMES: dict[str, str] = {"bwt": "BWT", "fwt": "FWT", "change": "change", "seconds": "s/epoch"}
UNITS: dict[str, str] = {"bwt": " (%)", "fwt": " (%)", "change": " (%)"}  # in CSV files, whose numbers have none
_NAN = math.nan


@dataclass(frozen=True)
class Found:
    """What the cells of a row came to, one a seed: None where a cell is not finished; tuples are empty where none is needed."""

    row: Row
    cells: tuple[CellResult | None, ...]
    single: tuple[CellResult | None, ...]
    plain: tuple[CellResult | None, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """Task numbers, the noisy one 0."""
        return self.row.cells[0].order


def read_plan(plan: Plan) -> list[Found]:
    """All results of a plan that there are."""

    def read(cells: Sequence[Cell]) -> tuple[CellResult | None, ...]:
        return tuple(read_result(plan.setup, cell, plan.dataset) for cell in cells)

    return [Found(row, read(row.cells), read(row.single), read(row.plain)) for row in plan.rows]


def tasks_forward(cell: CellResult, single: CellResult | None, order: Sequence[int]) -> Array:
    """FWT of each task in the order, in percent; NaN for task 1, the noisy one, and where SinMo is not known.

    Args:
        single: SinMo over the data set in its own order.
    """
    alone = [_NAN if single is None or number in (1, NOISE) else single.R[number - 1][number - 1] for number in order]
    return forward_transfer(result_matrix(cell.R), alone)


def value(found: Found, seed: int, place: int, quantity: Quantity) -> float:
    """A quantity of a task.

    Args:
        seed: place among the seeds. place: of the task in the order, from 0.

    Returns:
        NaN where it is not defined or not known.
    """
    cell, number = found.cells[seed], found.order[place]
    if cell is None or number == NOISE:
        return _NAN
    now = cell.R[-1][place]
    if quantity == "metric":
        return _NAN if found.row.method == "mtl" and number == 1 else now  # as in the paper: the pairs are of other tasks
    if quantity == "bwt":
        return float(backward_transfer(result_matrix(cell.R))[place])
    if quantity == "fwt":
        return float(tasks_forward(cell, found.single[seed] if found.single else None, found.order)[place])
    if quantity == "change":
        plain = found.plain[seed] if found.plain else None
        before = _NAN if plain is None else plain.R[-1][[n for n in found.order if n != NOISE].index(number)]
        return 100 * (now - before) / before if before else _NAN
    return _NAN if number == 1 else cell.seconds[place] / cell.epochs[place]


def main_grids(plan: Plan, found: Sequence[Found]) -> list[Grid]:
    """The table in the paper's layout; rows whose tasks are in another order are in a table of their own."""
    grids = []
    for order, rows in groupby(found, key=lambda of_row: of_row.order):
        groups = list(rows)
        name = f" ({groups[0].row.shown})" if plan.experiment.columns else ""
        columns = tuple(column for place in range(len(order)) for column in _columns(plan, order, place))
        lines = tuple(Line(of_row.row.label, _entries(plan, of_row)) for of_row in groups)
        grids.append(Grid(f"{plan.experiment.title}{name}", "method", columns, lines))
    return grids


def task_name(plan: Plan, number: int) -> str:
    """ "T2 clicking": numbers are those of the data set, whatever the order."""
    return f"T' {NOISE_NAME}" if number == NOISE else f"T{number} {plan.dataset.tasks[number - 1].name}"


def metric_name(plan: Plan, number: int) -> str:
    """ "MRR@5" or "accuracy"."""
    return "" if number == NOISE else pretty(headline(plan.dataset.tasks[number - 1].num_labels))


def _columns(plan: Plan, order: Sequence[int], place: int) -> list[Column]:
    number = order[place]
    name, metric = task_name(plan, number), metric_name(plan, number)
    quantities = plan.experiment.quantities
    if number == NOISE or not plan.experiment.columns:
        brackets = "".join(f" ({NAMES[quantity]})" for quantity in quantities[1:])
        heading = f"{name} {metric}{brackets}" if number != NOISE else name
        return [Column(heading, tuple(f"{name} {NAMES.get(q, metric)}{UNITS.get(q, '')}".strip() for q in quantities))]
    headings = [f"{name} {NAMES.get(quantity, metric)}" for quantity in quantities]
    return [Column(heading, (heading + UNITS.get(q, ""),)) for heading, q in zip(headings, quantities, strict=True)]


def _entries(plan: Plan, found: Found) -> tuple[tuple[Entry, ...], ...]:
    cells: list[tuple[Entry, ...]] = []
    for place, number in enumerate(found.order):
        entries = []
        for quantity in plan.experiment.quantities:
            last = plan.experiment.columns and quantity == "bwt" and place == len(found.order) - 1
            values = [_NAN if last else value(found, seed, place, quantity) for seed in range(len(plan.seeds))]
            entries.append(Entry(tuple(values), FORMS[quantity], _printed(plan, found, quantity, number)))
        cells += [(entry,) for entry in entries] if plan.experiment.columns and number != NOISE else [tuple(entries)]
    return tuple(cells)


def _printed(plan: Plan, found: Found, quantity: Quantity, number: int) -> float:
    """The paper's figure, where the row is one of the paper's."""
    row, what = found.row, plan.experiment
    order = tuple(n for n in found.order if n != NOISE)
    noise_at = found.order.index(NOISE) + 1 if NOISE in found.order else None
    if plan.paper is None or noise_at != (plan.paper.noise_at if row.variant.noise else None):
        return _NAN
    if row.method not in what.methods or number == NOISE:
        return _NAN
    return plan.paper.value(what.name, row.method, row.variant.key, order, quantity, number)


def transfer_grid(plan: Plan, found: Sequence[Found]) -> Grid:
    """Means over tasks, the noisy one left out: BWT and FWT as the paper defines them, and what other literature calls so."""
    columns = (
        Column("BWT, mean over all tasks but the last (%)", ("BWT (%)",)),
        Column("FWT, mean over all tasks but T1 (%)", ("FWT (%)",)),
        Column("backward transfer (GEM, Avalanche)", ("backward transfer",)),
        Column("forgetting (Chaudhry et al.)", ("forgetting",)),
    )

    def mean(values: Array, order: Sequence[int]) -> float:
        wanted = [x for x, number in zip(values, order, strict=False) if number != NOISE and math.isfinite(x)]
        return float(np.mean(wanted)) if wanted else _NAN

    lines = []
    for of_row in found:
        table: list[list[float]] = []
        for seed, cell in enumerate(of_row.cells):
            if cell is None:
                table.append([_NAN] * 4)
                continue
            matrix, order = result_matrix(cell.R), of_row.order
            single = of_row.single[seed] if of_row.single else None
            table.append([
                mean(backward_transfer(matrix)[:-1], order), mean(tasks_forward(cell, single, order), order),
                mean(gem_backward_transfer(matrix), order), mean(forgetting(matrix), order),
            ])  # fmt: skip
        forms = ("+.2f", "+.2f", "+.5f", "+.5f")
        entries = tuple((Entry(values, form),) for values, form in zip(zip(*table, strict=True), forms, strict=True))
        lines.append(Line(of_row.row.label, entries))
    return Grid("Transfer and forgetting", "method", columns, tuple(lines))


def cost_grid(plan: Plan, found: Sequence[Found]) -> Grid:
    """What each method keeps and what its training took."""
    heads = (
        ("parameters for inference on all tasks", ",.0f"), ("kept (MiB)", ",.2f"), ("epochs", ",.0f"), ("training (s)", ",.1f"),
        ("seconds per epoch after T1", ",.2f"), ("peak memory (MiB)", ",.0f"),
    )  # fmt: skip

    def costs(cell: CellResult | None) -> tuple[float, ...]:
        if cell is None:
            return (_NAN,) * len(heads)
        later = sum(cell.epochs[1:])
        per_epoch = sum(cell.seconds[1:]) / later if later else _NAN
        return cell.parameters, cell.kept_mib, sum(cell.epochs), sum(cell.seconds), per_epoch, cell.peak_mib

    lines = []
    for of_row in found:
        columns = zip(*map(costs, of_row.cells), strict=True)
        entries = tuple((Entry(tuple(values), form),) for values, (_, form) in zip(columns, heads, strict=True))
        lines.append(Line(of_row.row.label, entries))
    return Grid("Cost", "method", tuple(Column(name, (name,)) for name, _ in heads), tuple(lines))


def matrix_grids(plan: Plan, found: Sequence[Found]) -> list[Grid]:
    """R of every row, mean over the seeds."""
    grids = []
    for of_row in found:
        columns = tuple(Column(f"{task_name(plan, n)} {metric_name(plan, n)}".strip(), ("R",)) for n in of_row.order)
        lines = []
        for j, number in enumerate(of_row.order):
            values = [
                tuple(_NAN if cell is None or i > j else cell.R[j][i] for cell in of_row.cells) for i in range(len(of_row.order))
            ]
            lines.append(Line(f"after {task_name(plan, number)}", tuple((Entry(v),) for v in values)))
        grids.append(Grid(f"R: {of_row.row.label}", "test metric", columns, tuple(lines)))
    return grids


def single_grids(plan: Plan, found: Sequence[Found]) -> list[Grid]:
    """What FWT is measured against, SinMo's test metric of each task, unless a row shows it; one grid at most."""
    single = next((of_row.single for of_row in found if of_row.single), ())
    numbers = range(1, len(plan.dataset.tasks) + 1)
    if not single or any(of_row.row.cells == of_row.row.single for of_row in found):
        return []  # SinMo has a row of its own
    columns = tuple(Column(f"{task_name(plan, n)} {metric_name(plan, n)}", (task_name(plan, n),)) for n in numbers)
    entries = tuple((Entry(tuple(_NAN if cell is None else cell.R[n - 1][n - 1] for cell in single)),) for n in numbers)
    return [Grid("SinMo, against which FWT is measured", "method", columns, (Line(TITLES["sinmo"], entries),))]


def matrix_csv(plan: Plan, found: Sequence[Found]) -> str:
    """R of every row and seed, and of SinMo where FWT is measured against it: one line a value, as it was measured."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["method", "seed", "after", "task", "metric", "R"])
    rows = [(of_row.row.label, of_row.row.cells, of_row.cells) for of_row in found]
    single = next((of_row for of_row in found if of_row.single), None)
    if single is not None and all(cells != single.row.single for _, cells, _ in rows):
        rows.append((TITLES["sinmo"], single.row.single, single.single))
    for label, cells, results in rows:
        for cell, result in zip(cells, results, strict=True):
            for j, values in enumerate([] if result is None else result.R):
                for number, value_of in zip(cell.order, values, strict=False):
                    after, metric = task_name(plan, cell.order[j]), metric_name(plan, number)
                    writer.writerow([label, cell.seed, after, task_name(plan, number), metric, repr(value_of)])
    return out.getvalue()
