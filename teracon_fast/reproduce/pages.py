"""The files of an experiment: NAME.md, NAME.csv, CSV files of frequency, transfer, cost and R, and a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from teracon_fast.config import RunConfig
from teracon_fast.data.order import NOISE
from teracon_fast.files import atomic_write
from teracon_fast.report.plots import save
from teracon_fast.reproduce import plots
from teracon_fast.reproduce.frequency import frequency_grid
from teracon_fast.reproduce.grids import Column, Entry, Grid, Line, csv_of, csv_text
from teracon_fast.reproduce.plan import Plan
from teracon_fast.reproduce.tables import (
    Found,
    cost_grid,
    main_grids,
    matrix_csv,
    matrix_grids,
    metric_name,
    single_grids,
    task_name,
    transfer_grid,
)

DEFINITIONS = """R[j, i] is the test metric of task i after training task j; M is the last task.
BWT_i = 100 (R[M, i] - R[i, i]) / R[i, i] and FWT_i = 100 (R[i, i] - SinMo_i) / SinMo_i, in percent, as the paper defines them.
Backward transfer of GEM is the mean of R[M, i] - R[i, i]; forgetting is the mean of max over j < M of R[j, i] minus R[M, i]; both
are in units of the metric. Seconds per epoch cover training and validation, measured when the run was trained; runs trained
side by side (--jobs) share the machine. Peak memory is the resident memory of the process, or what torch allocated on the GPU.
± is the standard deviation over the seeds (n - 1)."""

CURVES = """Test metric after each epoch, with the weights of that epoch. The epochs of a second phase, such as CONURE's
retraining, follow those of the first on the same axis. A seed that stopped early keeps its last value."""


def write_pages(plan: Plan, found: Sequence[Found], file_format: str = "png") -> list[Path]:
    """Write the table, or the figure, of a plan; missing results are left out or shown as a dash.

    Returns the files written, the Markdown page first. `file_format` of plots is "png", "pdf" or "svg".
    """
    name, folder = plan.file_name, plan.output
    written: list[Path] = []
    parts = [f"# {plan.experiment.title}", about(plan, found)]
    if plan.experiment.is_figure:
        seeds = f"{len(plan.seeds)} seeds, ± standard deviation" if len(plan.seeds) > 1 else f"seed {plan.seeds[0]}"
        figure = plots.curves(_curves(plan, found), f"{plan.experiment.title}\n{plan.dataset.name}, {seeds}")
        if figure is not None:
            written.append(folder / f"{name}.{file_format}")
            save(figure, written[0])
            parts += [f"![{name}]({written[0].name})", CURVES.replace("\n", " ")]
        grids = [curve_grid(plan, found)]
        tables = {"": curve_csv(plan, found)}
    else:
        grids = main_grids(plan, found)
        shown = dict.fromkeys(row.row.shown for row in found)
        keys = [f"_{text.replace(',', '-')}" for text in shown] if len(grids) > 1 else [""]
        tables = dict(zip(keys, map(csv_text, grids), strict=True))
    more = {"_frequency": frequency_grid(plan), "_transfer": transfer_grid(plan, found), "_cost": cost_grid(plan, found)}
    parts += [grid.markdown() for grid in (*grids, *more.values())]
    alone = [] if plan.experiment.is_figure else single_grids(plan, found)
    parts += ["# R", *(grid.markdown() for grid in (*alone, *matrix_grids(plan, found))), settings(plan)]
    parts.append(DEFINITIONS.replace("\n", " "))
    texts = {f"{name}.md": "\n\n".join(parts) + "\n"}
    tables |= {key: csv_text(grid, paper=False) for key, grid in more.items()} | {"_R": matrix_csv(plan, found)}
    texts |= {f"{name}{key}.csv": text for key, text in tables.items()}
    for index, (file_name, text) in enumerate(texts.items()):
        written.insert(index, folder / file_name)
        with atomic_write(written[index], "w") as file:
            file.write(text)
    return written


def about(plan: Plan, found: Sequence[Found]) -> str:
    """The data set, the network, the devices, and whether the paper's results appear beside ours."""
    data, config = plan.dataset, plan.config
    results = [run for row in found for run in row.runs]
    devices = sorted({run.device for run in results if run is not None})
    users = len(np.unique(data.tasks[0].groups))
    counts = f"Data set: {data.name}, {len(data.tasks)} tasks, {users:,} users, {data.num_items:,} items"
    if plan.paper is not None:
        paper = f'{counts}: the paper\'s {plan.paper.title}; rows marked "paper" are the published results.'
    else:
        paper = f"{counts}: not one of the paper's data sets, so its published results are not comparable and not shown."
    lines = [
        paper,
        f"{config.model.channels} channels, dilations {', '.join(map(str, config.model.dilations))}; seeds "
        f"{', '.join(map(str, plan.seeds))}; split 80 / 5 / 15 by {config.split_by}; measured on: {', '.join(devices) or '-'}.",
    ]
    if None in results:
        lines.append(f"{results.count(None)} of {len(results)} runs are not finished.")
    return "\n\n".join(lines)


def settings(plan: Plan) -> str:
    """Training settings of the tasks, and the options of each row's method."""
    numbers = sorted({number for row in plan.rows for number in row.order}, key=lambda number: (number == NOISE, number))
    lines = ["# Settings", ""]
    for values, alike in groupby(numbers, key=lambda number: plan.config.for_task(number).model_dump(exclude={"options"})):
        tasks = ", ".join("T'" if number == NOISE else f"T{number}" for number in alike)
        lines.append(
            f"- {tasks}: learning rate {values['lr']:g}, {values['batch_size']} samples a step, at most {values['epochs']} "
            f"epochs, patience {values['patience']}, best weights by {values['select']}"
        )
    for row in plan.rows:
        own = _options(plan, row.runs[0], row.order)
        if own:
            lines.append(f"- {row.label}: {', '.join(f'{key} = {value}' for key, value in own.items())}")
    return "\n".join(lines)


def _options(plan: Plan, run: RunConfig, order: Sequence[int]) -> dict[str, Any]:
    """Options of a run's method; of those with different values per task, the values in the order of training."""
    method = run.new_method(plan.dataset.num_items)
    found = {key: value for key, value in method.settings().items() if key != "name" and key not in asdict(method.sizes)}
    by_task = [run.task_options(number) for number in order]
    for key in by_task[0]:
        values = tuple(options[key] for options in by_task)
        found[key] = values[0] if len(set(values)) == 1 else values
    return found


def _curves(plan: Plan, found: Sequence[Found]) -> list[tuple[str, str, dict[str, list[list[float]]]]]:
    """Name, metric, and curves by method, of every task tested after each epoch except task 1 and the noisy one."""
    order = found[0].order
    wanted = [position - 1 for position in found[0].row.runs[0].test_every_epoch if order[position - 1] != NOISE and position > 1]
    curves = ({row.row.label: [run.curves[task] for run in row.runs if run is not None] for row in found} for task in wanted)
    numbers = (order[task] for task in wanted)
    return [(task_name(plan, number), metric_name(plan, number), of) for number, of in zip(numbers, curves, strict=True)]


def curve_grid(plan: Plan, found: Sequence[Found]) -> Grid:
    """First and best value of each curve, and the epoch of the best."""
    tasks = _curves(plan, found)
    headings = [f"{name}: {what}" for name, _, _ in tasks for what in ("after one epoch", "best", "best at epoch")]
    columns = tuple(Column(heading, (heading,)) for heading in headings)
    lines = []
    for row in found:
        entries: list[tuple[Entry, ...]] = []
        for _, _, by_method in tasks:
            curves = by_method[row.row.label]
            best = [int(np.argmax(curve)) for curve in curves]
            entries += [
                (Entry(tuple(curve[0] for curve in curves)),),
                (Entry(tuple(curve[at] for curve, at in zip(curves, best, strict=True))),),
                (Entry(tuple(at + 1.0 for at in best), ".1f"),),
            ]
        lines.append(Line(row.row.label, tuple(entries)))
    return Grid("Test metric during training", "method", columns, tuple(lines))


def curve_csv(plan: Plan, found: Sequence[Found]) -> str:
    """The points of the plot: one line per task, method and epoch."""
    lines: list[Sequence[object]] = [["task", "metric", "method", "epoch", "mean", "spread", "seeds"]]
    for name, metric, by_method in _curves(plan, found):
        for label, curves in by_method.items():
            if not curves:
                continue
            mean, spread = plots.mean_curve(curves)
            for epoch, (middle, width) in enumerate(zip(mean.tolist(), spread.tolist(), strict=True), 1):
                shown = repr(width) if len(curves) > 1 and math.isfinite(width) else ""
                lines.append([name, metric, label, epoch, repr(middle), shown, len(curves)])
    return csv_of(lines)
