"""The paper's experiments, each in one call: train the runs that are missing, then write the table or the figure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from teracon_fast.config import RunConfig
from teracon_fast.report.plots import check_format
from teracon_fast.reproduce.jobs import Event, Report, run_jobs
from teracon_fast.reproduce.pages import write_pages
from teracon_fast.reproduce.plan import Choices, Plan, is_finished, make_plan
from teracon_fast.reproduce.tables import Found, RunResult, main_grids, read_plan, read_run


@dataclass(frozen=True)
class Reproduced:
    """Outcome of an experiment.

    Attributes:
        plan: what it consists of. found: results of its rows. ran: runs trained now. failed: those of them that failed.
        files: the Markdown page, the CSV files, and the plot of a figure.
    """

    plan: Plan
    found: list[Found]
    ran: list[RunConfig]
    failed: list[RunConfig]
    files: list[Path]


def reproduce(
    name: str, choices: Choices, jobs: int = 1, report: Report | None = None, file_format: str = "png"
) -> Reproduced:
    """Train the runs of an experiment that are not finished, and write its pages; failed runs appear as dashes.

    Args:
        name: of `EXPERIMENTS`. choices: what to train on and how. jobs, report: see `run_jobs`.
        file_format: of plots.

    Raises:
        ConfigError: bad choices. DataError: the data set is damaged. RunStopped: Ctrl-C or SIGTERM; all is saved.
    """
    check_format(file_format)
    plan = make_plan(name, choices)
    missing = [run for run in plan.runs if not is_finished(run.run)]
    failed = run_jobs(missing, jobs, report)
    if choices.drop_weights:
        for run in plan.runs:
            for weights in (run.run / "checkpoints").glob("task*.safetensors") if is_finished(run.run) else ():
                weights.unlink()
    found = read_plan(plan)
    return Reproduced(plan, found, missing, failed, write_pages(plan, found, file_format))


__all__ = [
    "Choices",
    "Event",
    "Found",
    "Plan",
    "Reproduced",
    "RunResult",
    "is_finished",
    "main_grids",
    "make_plan",
    "read_plan",
    "read_run",
    "reproduce",
    "run_jobs",
    "write_pages",
]
