"""What an experiment leaves in its folder: NAME.md, NAME.csv and others for frequency, transfer, cost and R, and a picture."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import numpy as np

from teracon_fast.data.order import NOISE
from teracon_fast.files import atomic_write
from teracon_fast.report.plots import save
from teracon_fast.reproduce import pictures
from teracon_fast.reproduce.frequency import frequency_grid
from teracon_fast.reproduce.grids import Column, Entry, Grid, Line, csv_text
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

DEFINITIONS = """R[j, i] is the test metric of task i after training task j, M the last task.
BWT_i = 100 (R[M, i] - R[i, i]) / R[i, i] and FWT_i = 100 (R[i, i] - SinMo_i) / SinMo_i, in percent, as the paper defines them.
Backward transfer of GEM is the mean of R[M, i] - R[i, i], forgetting the mean of max over j < M of R[j, i] less R[M, i], both in
units of the metric. Seconds per epoch count training and validation, as they were when a run was trained, perhaps for another
table; runs beside others (--jobs) share the machine with them. Peak memory is that of the whole process, on a GPU what torch
held there; runs after others in one process (--jobs 1) also count what those left. ± is the standard deviation over the seeds
(n - 1)."""

CURVES = """The test metric after each epoch, with the weights of that epoch. A method's second phase, such as CONURE's
retraining, follows its first on the same axis. A seed that has stopped early keeps its last value."""


def write_pages(plan: Plan, found: Sequence[Found], file_format: str = "png") -> list[Path]:
    """Write the table, or the figure, of a plan; what is not finished is left out or shown as a dash.

    Args:
        found: results of its rows. file_format: of pictures, "png", "pdf" or "svg".

    Returns:
        The files written, the Markdown page first.
    """
    name, folder = plan.file_name, plan.setup.output
    written: list[Path] = []
    parts = [f"# {plan.experiment.title}", about(plan, found)]
    if plan.experiment.is_figure:
        seeds = f"{len(plan.seeds)} seeds, ± standard deviation" if len(plan.seeds) > 1 else f"seed {plan.seeds[0]}"
        figure = pictures.curves(_curves(plan, found), f"{plan.experiment.title}\n{plan.dataset.name}, {seeds}")
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
    more = {
        "_frequency": frequency_grid(plan), "_transfer": transfer_grid(plan, found), "_cost": cost_grid(plan, found),
    }  # fmt: skip
    parts += [grid.markdown() for grid in (*grids, *more.values())]
    alone = [] if plan.experiment.is_figure else single_grids(plan, found)
    parts += ["# R", *(grid.markdown() for grid in (*alone, *matrix_grids(plan, found))), settings(plan)]
    parts.append(DEFINITIONS.replace("\n", " "))
    texts = {f"{name}.md": "\n\n".join(parts) + "\n"}
    tables |= {key: csv_text(grid, paper=False) for key, grid in more.items()} | {"_R": matrix_csv(plan, found)}
    texts |= {f"{name}{key}.csv": text for key, text in tables.items()}
    for place, (file_name, text) in enumerate(texts.items()):
        written.insert(place, folder / file_name)
        with atomic_write(written[place], "w") as file:
            file.write(text)
    return written


def about(plan: Plan, found: Sequence[Found]) -> str:
    """What the table was measured on, and whether the paper's figures stand beside it."""
    data, config = plan.dataset, plan.setup.config
    missing = sum(cell is None for row in found for cell in row.cells)
    devices = sorted({cell.device for row in found for cell in row.cells if cell is not None})
    users = len(np.unique(data.tasks[0].groups))
    counts = f"Data set: {data.name}, {len(data.tasks)} tasks, {users:,} users, {data.num_items:,} items"
    if plan.paper is not None:
        paper = f"{counts}: the paper's {plan.paper.title}; rows marked \"paper\" are what it prints."
    else:
        paper = f"{counts}: another one than the paper's, whose figures can not be compared with these and are not shown."
    lines = [
        paper,
        f"{config.model.channels} channels, dilations {', '.join(map(str, config.model.dilations))}; seeds "
        f"{', '.join(map(str, plan.seeds))}; split 80 / 5 / 15 by {config.split_by}; measured on: {', '.join(devices) or '-'}.",
    ]
    if missing:
        lines.append(f"{missing} of {sum(len(row.cells) for row in found)} runs are not finished.")
    return "\n\n".join(lines)


def settings(plan: Plan) -> str:
    """How the tasks were trained, and the settings of each method."""
    numbers = sorted({number for cell in plan.cells for number in cell.order}, key=lambda number: (number == NOISE, number))
    lines = ["# Settings", ""]
    for values, alike in groupby(numbers, key=plan.setup.task_settings):
        tasks = ", ".join("T'" if number == NOISE else f"T{number}" for number in alike)
        lines.append(
            f"- {tasks}: learning rate {values.lr:g}, {values.batch_size} samples a step, at most {values.epochs} epochs, "
            f"patience {values.patience}, best weights by {values.select}"
        )
    for row in plan.rows:
        method = plan.setup.new_method(row.cells[0], plan.dataset.num_items)
        own = {key: value for key, value in method.settings().items() if key != "name" and key not in asdict(method.sizes)}
        if own:
            lines.append(f"- {row.label}: {', '.join(f'{key} = {value}' for key, value in own.items())}")
    return "\n".join(lines)


def _curves(plan: Plan, found: Sequence[Found]) -> list[tuple[str, str, dict[str, list[list[float]]]]]:
    """Name, metric and curves by method of every watched task but task 1 and the noisy one."""
    order = found[0].order
    wanted = [place for place in found[0].row.cells[0].watch if order[place] != NOISE and place > 0]
    return [
        (
            task_name(plan, order[place]),
            metric_name(plan, order[place]),
            {row.row.label: [cell.curves[place] for cell in row.cells if cell is not None] for row in found},
        )
        for place in wanted
    ]


def curve_grid(plan: Plan, found: Sequence[Found]) -> Grid:
    """Where each curve begins, its best point, and when it is reached."""
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
                (Entry(tuple(curve[place] for curve, place in zip(curves, best, strict=True))),),
                (Entry(tuple(place + 1.0 for place in best), ".1f"),),
            ]
        lines.append(Line(row.row.label, tuple(entries)))
    return Grid("Test metric during training", "method", columns, tuple(lines))


def curve_csv(plan: Plan, found: Sequence[Found]) -> str:
    """The points of the picture: one row a task, method and epoch."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["task", "metric", "method", "epoch", "mean", "spread", "seeds"])
    for name, metric, by_method in _curves(plan, found):
        for label, curves in by_method.items():
            if not curves:
                continue
            mean, spread = pictures.mean_curve(curves)
            for epoch, (middle, width) in enumerate(zip(mean.tolist(), spread.tolist(), strict=True), 1):
                shown = repr(width) if len(curves) > 1 and math.isfinite(width) else ""
                writer.writerow([name, metric, label, epoch, repr(middle), shown, len(curves)])
    return out.getvalue()
