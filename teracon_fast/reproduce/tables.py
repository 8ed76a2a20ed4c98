"""From finished runs to tables: metrics, BWT, FWT, backward transfer, forgetting and cost."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from teracon_fast.data.order import NOISE, NOISE_NAME
from teracon_fast.errors import ConfigError
from teracon_fast.report.run_report import pretty
from teracon_fast.reproduce.experiments import TITLES, Quantity
from teracon_fast.reproduce.grids import Column, Entry, Grid, Line, csv_of
from teracon_fast.reproduce.plan import Plan, Row, is_finished
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
class RunResult:
    """What tables show of a finished run.

    Attributes:
        metric, R: as `train.results.Results`.
        epochs: number per task. seconds: of training and validation per task.
        parameters, kept_mib: floating-point numbers, and MiB of everything, that inference on all tasks needs.
        peak_mib: highest memory: allocated by torch on a GPU, else resident in the process.
        device: "cpu", or the name of the GPU.
        curves: task, counted from 0 in the order of training -> its test metric after each epoch.
    """

    metric: list[str]
    R: list[list[float]]
    epochs: list[int]
    seconds: list[float]
    parameters: int
    kept_mib: float
    peak_mib: float
    device: str
    curves: dict[int, list[float]]


def read_run(run: Path) -> RunResult | None:
    """The result of a run of a plan; None if it is not finished.

    Raises:
        ConfigError: its files are damaged.
    """
    if not is_finished(run):
        return None
    try:
        results = json.loads((run / "results.json").read_text("utf-8"))
        events = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
        ends = [event for event in events if event["event"] == "task_end"]
        costs = [event["cost"] for event in events if event["event"] == "run_end"]
        curves: dict[int, list[float]] = {}
        for event in events:
            if event["event"] == "valid" and "test" in event:
                task = event["task"] - 1
                curves.setdefault(task, []).append(event["test"][results["metric"][task]])
        cost = {name: costs[-1][name] for name in ("parameters", "kept_mib", "peak_mib", "device")}
        epochs, seconds = ([end[name] for end in ends] for name in ("epochs", "seconds"))
        return RunResult(results["metric"], results["R"], epochs, seconds, **cost, curves=curves)
    except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
        raise ConfigError(f"{run}: the files of this finished run are damaged ({error!r}); delete it to train it again") from None


@dataclass(frozen=True)
class Found:
    """Results of a row, one per seed: None if a run is not finished; tuples are empty if none is needed."""

    row: Row
    runs: tuple[RunResult | None, ...]
    single: tuple[RunResult | None, ...]
    plain: tuple[RunResult | None, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """Numbers of the tasks, NOISE for the noisy one."""
        return self.row.order


def read_plan(plan: Plan) -> list[Found]:
    """All results of a plan that are there."""
    results = {run.run: read_run(run.run) for run in plan.runs}
    kinds = ((row, (row.runs, row.single, row.plain)) for row in plan.rows)
    return [Found(row, *(tuple(results[run.run] for run in runs) for runs in of_row)) for row, of_row in kinds]


def tasks_forward(run: RunResult, single: RunResult | None, order: Sequence[int]) -> Array:
    """FWT of each task in the order, in percent; NaN for task 1, the noisy task, and tasks without a result of SinMo.
    `single` is SinMo on the data set in its original order."""
    alone = [_NAN if single is None or number in (1, NOISE) else single.R[number - 1][number - 1] for number in order]
    return forward_transfer(result_matrix(run.R), alone)


def value(found: Found, seed: int, position: int, quantity: Quantity) -> float:
    """A quantity of a task, by index of the seed and of the task in the order; NaN if it is undefined or unknown."""
    run, number = found.runs[seed], found.order[position]
    if run is None or number == NOISE:
        return _NAN
    now = run.R[-1][position]
    if quantity == "metric":
        return _NAN if found.row.method == "mtl" and number == 1 else now  # as in the paper: the pairs are of other tasks
    if quantity == "bwt":
        return float(backward_transfer(result_matrix(run.R))[position])
    if quantity == "fwt":
        return float(tasks_forward(run, found.single[seed] if found.single else None, found.order)[position])
    if quantity == "change":
        plain = found.plain[seed] if found.plain else None
        before = _NAN if plain is None else plain.R[-1][[n for n in found.order if n != NOISE].index(number)]
        return 100 * (now - before) / before if before else _NAN
    return _NAN if number == 1 else run.seconds[position] / run.epochs[position]


def main_grids(plan: Plan, found: Sequence[Found]) -> list[Grid]:
    """The table in the paper's layout; one table for each order of tasks."""
    grids = []
    for order, rows in groupby(found, key=lambda of_row: of_row.order):
        groups = list(rows)
        name = f" ({groups[0].row.shown})" if plan.experiment.columns else ""
        columns = tuple(column for position in range(len(order)) for column in _columns(plan, order, position))
        lines = tuple(Line(of_row.row.label, _entries(plan, of_row)) for of_row in groups)
        grids.append(Grid(f"{plan.experiment.title}{name}", "method", columns, lines))
    return grids


def task_name(plan: Plan, number: int) -> str:
    """ "T2 clicking": numbers are those of the data set, whatever the order."""
    return f"T' {NOISE_NAME}" if number == NOISE else f"T{number} {plan.dataset.tasks[number - 1].name}"


def metric_name(plan: Plan, number: int) -> str:
    """ "MRR@5" or "accuracy"."""
    return "" if number == NOISE else pretty(headline(plan.dataset.tasks[number - 1].num_labels))


def _columns(plan: Plan, order: Sequence[int], position: int) -> list[Column]:
    number = order[position]
    name, metric = task_name(plan, number), metric_name(plan, number)
    quantities = plan.experiment.quantities
    if number == NOISE or not plan.experiment.columns:
        brackets = "".join(f" ({NAMES[quantity]})" for quantity in quantities[1:])
        heading = f"{name} {metric}{brackets}" if number != NOISE else name
        return [Column(heading, tuple(f"{name} {NAMES.get(q, metric)}{UNITS.get(q, '')}".strip() for q in quantities))]
    headings = [f"{name} {NAMES.get(quantity, metric)}" for quantity in quantities]
    return [Column(heading, (heading + UNITS.get(q, ""),)) for heading, q in zip(headings, quantities, strict=True)]


def _entries(plan: Plan, found: Found) -> tuple[tuple[Entry, ...], ...]:
    groups: list[tuple[Entry, ...]] = []
    for position, number in enumerate(found.order):
        entries = []
        for quantity in plan.experiment.quantities:
            last = plan.experiment.columns and quantity == "bwt" and position == len(found.order) - 1
            values = [_NAN if last else value(found, seed, position, quantity) for seed in range(len(plan.seeds))]
            entries.append(Entry(tuple(values), FORMS[quantity], _printed(plan, found, quantity, number)))
        groups += [(entry,) for entry in entries] if plan.experiment.columns and number != NOISE else [tuple(entries)]
    return tuple(groups)


def _printed(plan: Plan, found: Found, quantity: Quantity, number: int) -> float:
    """The value that the paper prints; NaN if the row is not one of the paper's."""
    row, what = found.row, plan.experiment
    order = tuple(n for n in found.order if n != NOISE)
    noise_at = found.order.index(NOISE) + 1 if NOISE in found.order else None
    if plan.paper is None or noise_at != (plan.paper.noise_at if row.variant.noise else None):
        return _NAN
    if row.method not in what.methods or number == NOISE:
        return _NAN
    return plan.paper.value(what.name, row.method, row.variant.key, order, quantity, number)


def transfer_grid(plan: Plan, found: Sequence[Found]) -> Grid:
    """Means over all tasks but the noisy one: BWT and FWT as in the paper, and their counterparts in other literature."""
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
        for seed, run in enumerate(of_row.runs):
            if run is None:
                table.append([_NAN] * 4)
                continue
            matrix, order = result_matrix(run.R), of_row.order
            single = of_row.single[seed] if of_row.single else None
            table.append([
                mean(backward_transfer(matrix)[:-1], order), mean(tasks_forward(run, single, order), order),
                mean(gem_backward_transfer(matrix), order), mean(forgetting(matrix), order),
            ])  # fmt: skip
        forms = ("+.2f", "+.2f", "+.5f", "+.5f")
        entries = tuple((Entry(values, form),) for values, form in zip(zip(*table, strict=True), forms, strict=True))
        lines.append(Line(of_row.row.label, entries))
    return Grid("Transfer and forgetting", "method", columns, tuple(lines))


def cost_grid(plan: Plan, found: Sequence[Found]) -> Grid:
    """What each method stores for inference, and the cost of its training."""
    heads = (
        ("parameters for inference on all tasks", ",.0f"), ("kept (MiB)", ",.2f"), ("epochs", ",.0f"), ("training (s)", ",.1f"),
        ("seconds per epoch after T1", ",.2f"), ("peak memory (MiB)", ",.0f"),
    )  # fmt: skip

    def costs(run: RunResult | None) -> tuple[float, ...]:
        if run is None:
            return (_NAN,) * len(heads)
        later = sum(run.epochs[1:])
        per_epoch = sum(run.seconds[1:]) / later if later else _NAN
        return run.parameters, run.kept_mib, sum(run.epochs), sum(run.seconds), per_epoch, run.peak_mib

    lines = []
    for of_row in found:
        columns = zip(*map(costs, of_row.runs), strict=True)
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
                tuple(_NAN if run is None or i > j else run.R[j][i] for run in of_row.runs) for i in range(len(of_row.order))
            ]
            lines.append(Line(f"after {task_name(plan, number)}", tuple((Entry(v),) for v in values)))
        grids.append(Grid(f"R: {of_row.row.label}", "test metric", columns, tuple(lines)))
    return grids


def single_grids(plan: Plan, found: Sequence[Found]) -> list[Grid]:
    """SinMo's test metric of each task, the baseline of FWT, unless a row shows it; at most one grid."""
    single = next((of_row.single for of_row in found if of_row.single), ())
    numbers = range(1, len(plan.dataset.tasks) + 1)
    if not single or any(of_row.row.runs == of_row.row.single for of_row in found):
        return []  # SinMo has a row of its own
    columns = tuple(Column(f"{task_name(plan, n)} {metric_name(plan, n)}", (task_name(plan, n),)) for n in numbers)
    entries = tuple((Entry(tuple(_NAN if run is None else run.R[n - 1][n - 1] for run in single)),) for n in numbers)
    return [Grid("SinMo, against which FWT is measured", "method", columns, (Line(TITLES["sinmo"], entries),))]


def matrix_csv(plan: Plan, found: Sequence[Found]) -> str:
    """R of every row and seed, and of SinMo if it is the baseline of FWT: one line per value, unrounded."""
    lines: list[Sequence[object]] = [["method", "seed", "after", "task", "metric", "R"]]
    rows = [(of_row.row.label, of_row.order, of_row.row.runs, of_row.runs) for of_row in found]
    single = next((of_row for of_row in found if of_row.single), None)
    if single is not None and all(of_row.row.runs != single.row.single for of_row in found):
        rows.append((TITLES["sinmo"], tuple(range(1, len(plan.dataset.tasks) + 1)), single.row.single, single.single))
    for label, order, runs, results in rows:
        for run, result in zip(runs, results, strict=True):
            for j, values in enumerate([] if result is None else result.R):
                for number, value_of in zip(order, values, strict=False):
                    after, metric = task_name(plan, order[j]), metric_name(plan, number)
                    lines.append([label, run.seed, after, task_name(plan, number), metric, repr(value_of)])
    return csv_of(lines)
