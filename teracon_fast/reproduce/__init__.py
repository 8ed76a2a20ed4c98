"""The paper's experiments, each as one call: trains what is not trained yet, and writes the table or the figure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from teracon_fast.report.plots import check_format
from teracon_fast.reproduce.experiments import EXPERIMENTS, Experiment, Variant
from teracon_fast.reproduce.jobs import CellResult, Event, Report, read_result, run_cell, run_cells
from teracon_fast.reproduce.pages import write_pages
from teracon_fast.reproduce.plan import Cell, Choices, Plan, Row, Setup, make_plan
from teracon_fast.reproduce.tables import Found, main_grids, read_plan


@dataclass(frozen=True)
class Reproduced:
    """What an experiment came to.

    Attributes:
        plan: what it consists of. found: results of its rows.
        ran: cells trained now. failed: those of them that failed.
        files: the Markdown page, the CSV file, and the picture of a figure.
    """

    plan: Plan
    found: list[Found]
    ran: list[Cell]
    failed: list[Cell]
    files: list[Path]


def reproduce(
    name: str, choices: Choices, jobs: int = 1, report: Report | None = None, file_format: str = "png"
) -> Reproduced:
    """Train the cells of an experiment that are not finished, and write its pages; those of failed cells show dashes.

    Args:
        name: of `EXPERIMENTS`. choices: what to train on and how. jobs: processes, see `run_cells`.
        report: told of what happens. file_format: of pictures.

    Raises:
        ConfigError: bad choices. DataError: the data set is damaged.
    """
    check_format(file_format)
    plan = make_plan(name, choices)
    waiting = [cell for cell in plan.cells if read_result(plan.setup, cell, plan.dataset) is None]
    failed = run_cells(plan.setup, waiting, plan.dataset, jobs, report or (lambda event, cell, text: None))
    found = read_plan(plan)
    return Reproduced(plan, found, waiting, failed, write_pages(plan, found, file_format))


__all__ = [
    "EXPERIMENTS",
    "Cell",
    "CellResult",
    "Choices",
    "Event",
    "Experiment",
    "Found",
    "Plan",
    "Report",
    "Reproduced",
    "Row",
    "Setup",
    "Variant",
    "main_grids",
    "make_plan",
    "read_plan",
    "read_result",
    "reproduce",
    "run_cell",
    "run_cells",
    "write_pages",
]
