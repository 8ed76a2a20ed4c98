"""The report of a run of any method: tables, plots and RUN/report/report.md, made from the log of the run.

A run that is still training, or was interrupted, is shown as far as it has been logged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from teracon_fast.config import load_config, read_toml
from teracon_fast.data.layout import read_about
from teracon_fast.errors import TeraconError
from teracon_fast.files import atomic_write
from teracon_fast.report import plots
from teracon_fast.train.log import TaskLog, read_log
from teracon_fast.train.metrics import backward_transfer, headline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]


@dataclass
class RunRecord:
    """A run as read back from its folder. Tasks count from 1 in `logs`, `pairs` and `c`.

    Attributes:
        path: the run folder.
        method: its name, as in `methods.METHODS`.
        names, metrics: of the M tasks begun so far.
        matrix: R, `[M, M]`, NaN where nothing was measured.
        bwt: backward transfer of the M tasks in percent.
        logs: log of each task.
        pairs: (i, j) with i > j -> cosine similarity of the tasks' masks at each site, `[S]`.
        c: scale of the cosine in rho (Eq. 15), of the tasks whose log has rho.
    """

    path: Path
    method: str
    names: list[str]
    metrics: list[str]
    matrix: Array
    bwt: list[float]
    logs: dict[int, TaskLog]
    pairs: dict[tuple[int, int], Array]
    c: dict[int, float]


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _column(events: list[dict[str, Any]], name: str) -> Array:
    return np.asarray([_number(event.get(name)) for event in events], dtype=float)


def _pairs(ends: dict[int, dict[str, Any]]) -> dict[tuple[int, int], Array]:
    """Mask similarities ([S][T][T]) at the end of the last finished task, by pair of tasks."""
    last = max((task for task, end in ends.items() if end.get("similarity")), default=0)
    if not last:
        return {}
    table = np.asarray(ends[last]["similarity"], dtype=float)
    if table.ndim != 3 or table.shape[1:] != (last, last):
        raise TeraconError(f"similarity of task {last} has shape {list(table.shape)}, expected [sites, {last}, {last}]")
    return {(i, j): table[:, i - 1, j - 1] for i in range(2, last + 1) for j in range(1, i)}


def load_run(run: str | Path) -> RunRecord:
    """Read a run folder back: settings from config.toml, names and sizes from dataset.json, all else from metrics.jsonl.

    Raises:
        TeraconError: the folder or one of the three files is missing. DataError: a file is malformed.
    """
    run = Path(run)
    if not run.is_dir():
        raise TeraconError(f"{run}: no such run folder")
    for name in ("config.toml", "dataset.json", "metrics.jsonl"):
        if not (run / name).is_file():
            raise TeraconError(f"{run}: no {name}; not a run folder, or nothing has been trained in it yet")
    logs = read_log(run)
    planned = read_about(run).tasks
    tasks = planned[: max(logs, default=0)]
    metrics = [headline(task.num_labels) for task in tasks]
    matrix = np.full((len(tasks), len(tasks)), np.nan)
    ends = {task: log.end for task, log in logs.items() if log.end is not None}
    for j, end in ends.items():
        matrix[j - 1, :j] = [_number(end["test"].get(str(i), {}).get(metrics[i - 1])) for i in range(1, j + 1)]
    bwt = np.full(len(tasks), np.nan)
    if ends:
        # The newest task has nothing after it to forget it: its backward transfer is left undefined.
        last = max(ends)
        bwt[: last - 1] = backward_transfer(matrix[:last, :last])[:-1]
    method = str(read_toml(run / "config.toml").get("method", "teracon"))
    adaptive = [task for task, log in logs.items() if any(step.get("rho") for step in log.steps)]
    c = {}
    if adaptive:
        config = load_config(path=run / "config.toml")
        order = config.task_order(len(planned) - (config.noise_at is not None))
        c = {task: float(config.task_options(order[task - 1])["c"]) for task in adaptive}
    names = [task.name for task in tasks]
    return RunRecord(run, method, names, metrics, matrix, bwt.tolist(), logs, _pairs(ends), c)


def _loss_curves(log: TaskLog) -> plots.LossCurves:
    logged = dict.fromkeys(name for event in log.steps for name, value in event.items() if value is not None)
    # `loss` is the sum of the named losses: shown where there is nothing else.
    names = [name for name in logged if name.endswith("_loss")] or ["loss"]
    means = [name for name in names if any(check.get(name) is not None for check in log.checks)]
    return plots.LossCurves(
        _column(log.steps, "step"), {name: _column(log.steps, name) for name in names},
        _column(log.checks, "step"), {name: _column(log.checks, name) for name in means},
    )  # fmt: skip


def draw(record: RunRecord) -> dict[str, Figure]:
    """The plots of a run that have something to show, by file stem."""
    losses, rho, valid = {}, {}, {}
    for task, log in record.logs.items():
        losses[task] = _loss_curves(log)
        drawn = [step for step in log.steps if step.get("rho")]
        if drawn:
            rho[task] = (_column(drawn, "step"), np.asarray([step["rho"] for step in drawn], dtype=float))
        scores = _column([check["metrics"] for check in log.checks], record.metrics[task - 1])
        phases = [str(check.get("phase", "train")) for check in log.checks]
        valid[task] = plots.LearningCurve(scores, _column(log.checks, "best") > 0, phases)
    labels = [pretty(name) for name in record.metrics]
    figures = {
        "r_matrix": plots.r_matrix(record.matrix, record.names, labels, record.bwt),
        "similarity": plots.similarity(record.pairs, record.names),
        "similarity_by_layer": plots.similarity_by_layer(record.pairs, record.names),
        "rho": plots.rho_over_training(rho, record.names, record.c),
        "learning_curves": plots.learning_curves(valid, record.names, labels),
        "losses": plots.losses(losses, record.names),
    }
    return {stem: figure for stem, figure in figures.items() if figure is not None}


def write_report(run: str | Path, file_format: str = "png") -> list[Path]:
    """Draw every plot of `run` and write report.md; returns the files written, report.md first.

    Args:
        run: run folder.
        file_format: "png" (150 dpi), "pdf" or "svg".

    Raises:
        TeraconError: no such run or format.
    """
    plots.check_format(file_format)
    record = load_run(run)
    folder = record.path / "report"
    written = []
    for stem, figure in draw(record).items():
        written.append(folder / f"{stem}.{file_format}")
        plots.save(figure, written[-1])
    page = folder / "report.md"
    with atomic_write(page, "w") as file:
        file.write(markdown(record, [path.name for path in written]))
    return [page, *written]


def pretty(metric: str) -> str:
    """The name of a metric as people write it: "mrr@5" is MRR@5."""
    head, _, tail = metric.partition("@")
    return {"mrr": "MRR", "hit": "Hit", "ndcg": "NDCG"}.get(head, head) + (f"@{tail}" if tail else "")


def shown(value: float, form: str = ".4f") -> str:
    """`value` in `form`; an en dash where it was not measured."""
    return format(value, form) if math.isfinite(value) else "–"


def summary_rows(record: RunRecord) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the R table: one row per trained task, then BWT."""
    heading = ["after training", *(f"T{i + 1} {name}" for i, name in enumerate(record.names))]
    rows = [["metric", *(pretty(name) for name in record.metrics)]]
    for j, values in enumerate(record.matrix):
        if np.isfinite(values).any():
            rows.append([f"T{j + 1}", *(shown(value) if i <= j else "" for i, value in enumerate(values))])
    rows.append(["BWT (%)", *(shown(value, "+.2f") for value in record.bwt)])
    return heading, rows


def task_rows(record: RunRecord) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the training table: epochs, seconds and rate of each task, and its last rho where it has one."""
    heading = ["task", "epochs", "steps logged", "time (s)", "users/s (median)"]
    heading += ["rho at the end (T1, T2, ...)"] if record.c else []
    rows = []
    for task in sorted(record.logs):
        log = record.logs[task]
        end = log.end or {}
        rate = _column(log.steps, "users_per_s")
        row = [
            f"T{task} {record.names[task - 1]}",
            str(end.get("epochs", len(log.checks))),
            str(len(log.steps)),
            shown(_number(end.get("seconds")), ",.1f"),
            shown(float(np.nanmedian(rate)), ",.0f") if np.isfinite(rate).any() else "–",
        ]
        if record.c:
            rho = (log.steps[-1].get("rho") if log.steps else None) or []
            row.append(", ".join(shown(value, ".3g") for value in rho) or "–")
        rows.append(row)
    return heading, rows


def method_rows(record: RunRecord) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of what the method itself reports after the last epoch of each task; no rows if it reports nothing."""
    found = {
        task: {name: value for check in log.checks for name, value in (check.get("method") or {}).items()}
        for task, log in sorted(record.logs.items())
    }
    # A list has one number for each task so far.
    names = {name: isinstance(value, list) for values in found.values() for name, value in values.items()}
    rows = []
    for task, values in found.items():
        if values:
            cells = (np.ravel(values.get(name, np.nan)) for name in names)
            numbers = (", ".join(shown(_number(value), ".3g") for value in cell) for cell in cells)
            rows.append([f"T{task} {record.names[task - 1]}", *numbers])
    heading = [name.replace("_", " ") + " (T1, T2, ...)" * several for name, several in names.items()]
    return ["task", *heading], rows


def markdown_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, all but its first column aligned to the right."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(heading), line(["---"] + ["---:"] * (len(heading) - 1)), *map(line, rows)])


CAPTIONS = {
    "r_matrix": "R: test metric of each task after each training; color: change since the task was learned.",
    "similarity": "How alike the task masks are, mean over all mask sites: cosine, or 1 − cosine where all are nearly 1.",
    "similarity_by_layer": "The same at each mask site: which layers the tasks share.",
    "rho": "Share of each batch drawn to retain each past task; low means that the tasks are alike.",
    "learning_curves": "Validation metric after each epoch; the star is the epoch whose weights were kept.",
    "losses": "Training losses.",
}


def markdown(record: RunRecord, files: list[str]) -> str:
    """report.md: the method, R with BWT, every metric of the newest weights, the training tables and the plots."""
    parts = [f"# Run {record.path.resolve().name}", f"Method: `{record.method}`.", "## Results"]
    parts += [markdown_table(*summary_rows(record))]
    parts += ["R[j, i]: test metric of task i after training task j. BWT_i = 100 (R[M, i] - R[i, i]) / R[i, i]."]
    last = next((log.end for _, log in sorted(record.logs.items(), reverse=True) if log.end), None)
    test = (last or {}).get("test") or {}
    if test:
        names = sorted({name for metrics in test.values() for name in metrics})
        rows = [
            [f"T{task} {record.names[int(task) - 1]}", *(shown(_number(test[task].get(name))) for name in names)]
            for task in sorted(test, key=int)
        ]
        parts += ["## All test metrics after the newest task", markdown_table(["task", *map(pretty, names)], rows)]
    parts += ["## Training", markdown_table(*task_rows(record))]
    heading, rows = method_rows(record)
    if rows:
        parts += [f"After the last epoch of each task, by `{record.method}`:", markdown_table(heading, rows)]
    parts += ["## Plots", *(f"![{Path(name).stem}]({name})\n\n{CAPTIONS[Path(name).stem]}" for name in files)]
    return "\n\n".join(parts) + "\n"
