"""The report of a run: reads its log, writes pictures and report.md under RUN/report/.

Works on a run that is still training or was interrupted: whatever has been logged is shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from teracon_fast.config import load_config
from teracon_fast.errors import DataError, TeraconError
from teracon_fast.files import atomic_write
from teracon_fast.report import plots
from teracon_fast.train.metrics import backward_transfer, headline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]


@dataclass
class TaskLog:
    """Events of one task in metrics.jsonl, in the order of training: logged steps, validations, and the end (None before)."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] | None = None


@dataclass
class RunRecord:
    """A run as read back from its folder.

    `names`, `metrics`, `bwt`: one entry a task; `matrix`: [M, M], NaN where nothing was measured; `logs`: task from
    1 -> TaskLog; `pairs`: (i, j), i > j, tasks from 1 -> cosine similarity of their masks at each site [S];
    `c`: task from 1 -> scale of the cosine in rho (Eq. 15).
    """

    path: Path
    names: list[str]
    metrics: list[str]
    matrix: Array
    bwt: list[float]
    logs: dict[int, TaskLog]
    pairs: dict[tuple[int, int], Array]
    c: dict[int, float]


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Events of a metrics.jsonl file; a half-written last line (a killed run) is left out.

    Raises:
        DataError: a line is not a JSON object with "event" and "task".
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                event = json.loads(line)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    return
                raise DataError(path, f"not JSON ({error}), expected one JSON object a line", number) from None
            if not isinstance(event, dict) or "event" not in event or not isinstance(event.get("task"), int):
                reason = f'got {str(event)[:60]!r}, expected a JSON object with "event" and "task"'
                raise DataError(path, reason, number)
            yield event


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _pairs(logs: dict[int, TaskLog]) -> dict[tuple[int, int], Array]:
    """Mask similarities ([S][T][T]) at the end of the last finished task, by pair of tasks."""
    ended = [task for task, log in logs.items() if log.end and log.end.get("similarity")]
    if not ended:
        return {}
    last = max(ended)
    table = np.asarray((logs[last].end or {})["similarity"], dtype=float)
    if table.ndim != 3 or table.shape[1:] != (last, last):
        raise TeraconError(f"similarity of task {last} has shape {list(table.shape)}, expected [sites, {last}, {last}]")
    return {(i, j): table[:, i - 1, j - 1] for i in range(2, last + 1) for j in range(1, i)}


def _fold(events: Iterator[dict[str, Any]]) -> dict[int, TaskLog]:
    """Events by task."""
    logs: dict[int, TaskLog] = {}
    for event in events:
        log = logs.setdefault(int(event["task"]), TaskLog())
        if event["event"] == "step":
            log.steps.append(event)
        elif event["event"] == "valid":
            log.checks.append(event)
        elif event["event"] == "task_end":
            log.end = event
    return logs


def load_run(run: str | Path) -> RunRecord:
    """Read a run folder back: settings from config.toml, names and sizes from dataset.json, all else from metrics.jsonl.

    Raises:
        TeraconError: the folder or one of the three files is missing; DataError: a file is malformed.
    """
    run = Path(run)
    if not run.is_dir():
        raise TeraconError(f"{run}: no such run folder")
    for name in ("config.toml", "dataset.json", "metrics.jsonl"):
        if not (run / name).is_file():
            raise TeraconError(f"{run}: has no {name}: not a run folder, or nothing has been trained in it yet")
    logs = _fold(read_events(run / "metrics.jsonl"))
    tasks = read_json(run / "dataset.json")["tasks"][: max(logs, default=0)]
    metrics = [headline(task["num_labels"]) for task in tasks]
    matrix = np.full((len(tasks), len(tasks)), np.nan)
    done = [task for task in sorted(logs) if logs[task].end is not None]
    for j in done:
        test = (logs[j].end or {})["test"]
        matrix[j - 1, :j] = [_number(test[str(i)].get(metrics[i - 1])) for i in range(1, j + 1)]
    bwt = np.full(len(tasks), np.nan)
    if done:
        # The newest task has nothing after it to forget it: its backward transfer is left undefined.
        bwt[: done[-1] - 1] = backward_transfer(matrix[: done[-1], : done[-1]])[:-1]
    config = load_config(path=run / "config.toml")
    c = {task: config.task_options(task).get("c", 6.0) for task in logs}
    return RunRecord(run, [task["name"] for task in tasks], metrics, matrix, bwt.tolist(), logs, _pairs(logs), c)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        DataError: the file is not one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(path, f"got text that is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise DataError(path, f"got {type(content).__name__}, expected a JSON object")
    return content


def _column(events: list[dict[str, Any]], name: str) -> Array:
    return np.asarray([_number(event.get(name)) for event in events], dtype=float)


def _curves(log: TaskLog, task: int) -> plots.LossCurves:
    steps, checks = log.steps, log.checks
    retention = (_column(steps, "retention_loss"), _column(checks, "retention_loss")) if task > 1 else (None, None)
    return plots.LossCurves(
        _column(steps, "step"), _column(steps, "class_loss"), retention[0],
        _column(checks, "step"), _column(checks, "class_loss"), retention[1],
    )  # fmt: skip


def draw(record: RunRecord) -> dict[str, Figure]:
    """The pictures of a run that have something to show, by file stem."""
    loss = {task: _curves(log, task) for task, log in record.logs.items()}
    rho, valid = {}, {}
    for task, log in record.logs.items():
        if task > 1 and log.steps:
            rho[task] = (loss[task].step, np.asarray([step["rho"] for step in log.steps], dtype=float))
        scores = _column([check["metrics"] for check in log.checks], record.metrics[task - 1])
        valid[task] = (_column(log.checks, "epoch") + 1, scores, _column(log.checks, "best"))
    labels = [pretty(name) for name in record.metrics]
    drawn = {
        "r_matrix": plots.r_matrix(record.matrix, record.names, labels, record.bwt),
        "similarity": plots.similarity(record.pairs, record.names),
        "similarity_by_layer": plots.similarity_by_layer(record.pairs, record.names),
        "rho": plots.rho_over_training(rho, record.names, record.c),
        "learning_curves": plots.learning_curves(valid, record.names, labels),
        "losses": plots.losses(loss, record.names),
    }
    return {stem: figure for stem, figure in drawn.items() if figure is not None}


def write_report(run: str | Path, file_format: str = "png") -> list[Path]:
    """Draw every picture of `run` and write report.md; returns the files written, report.md first.

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
    """Heading and rows of the training table: epochs, seconds, rate, last rho of each task."""
    heading = ["task", "epochs", "steps logged", "time (s)", "users/s (median)", "rho at the end (T1, T2, ...)"]
    rows = []
    for task in sorted(record.logs):
        log = record.logs[task]
        end = log.end or {}
        rate = _column(log.steps, "users_per_s")
        rho = log.steps[-1].get("rho", []) if log.steps else []
        rows.append(
            [
                f"T{task} {record.names[task - 1]}",
                str(end.get("epochs", len(log.checks))),
                str(len(log.steps)),
                shown(_number(end.get("seconds")), ",.1f"),
                shown(float(np.nanmedian(rate)), ",.0f") if np.isfinite(rate).any() else "–",
                ", ".join(shown(value, ".3g") for value in rho) or "–",
            ]
        )
    return heading, rows


def markdown_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, all but its first column aligned to the right."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(heading), line(["---"] + ["---:"] * (len(heading) - 1)), *map(line, rows)])


CAPTIONS = {
    "r_matrix": "R: test metric of each task after each training; colour: change since the task was learned.",
    "similarity": "How alike the task masks are, mean over all mask sites: cosine, or 1 − cosine where all are nearly 1.",
    "similarity_by_layer": "The same at each mask site: which layers the tasks share.",
    "rho": "Share of each batch drawn to retain each past task; low means that the tasks are alike.",
    "learning_curves": "Validation metric after each epoch; the star is the epoch whose weights were kept.",
    "losses": "Training losses.",
}


def markdown(record: RunRecord, files: list[str]) -> str:
    """report.md: the R matrix with BWT, the training table, every metric of the final model and the pictures."""
    parts = [f"# Run {record.path.resolve().name}", "## Results", markdown_table(*summary_rows(record))]
    parts.append("R[j, i]: test metric of task i after training task j. BWT_i = 100 (R[M, i] - R[i, i]) / R[i, i].")
    last = next((log.end for _, log in sorted(record.logs.items(), reverse=True) if log.end), None)
    test = (last or {}).get("test") or {}
    if test:
        names = sorted({name for metrics in test.values() for name in metrics})
        rows = [
            [f"T{task} {record.names[int(task) - 1]}", *(shown(_number(test[task].get(name))) for name in names)]
            for task in sorted(test, key=int)
        ]
        parts += ["## All test metrics of the newest model", markdown_table(["task", *map(pretty, names)], rows)]
    parts += ["## Training", markdown_table(*task_rows(record)), "## Pictures"]
    parts += [f"![{Path(name).stem}]({name})\n\n{CAPTIONS[Path(name).stem]}" for name in files]
    return "\n\n".join(parts) + "\n"
