"""What a run found: R, BWT, final metrics."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from teracon_fast.files import atomic_write
from teracon_fast.train.metrics import backward_transfer, headline, result_matrix

if TYPE_CHECKING:
    from teracon_fast.data import TaskSequence


@dataclass(frozen=True)
class Results:
    """What a run found. Tasks in order.

    Attributes:
        metric: the metric that stands for each task, "mrr@5" or "accuracy".
        tasks: their names.
        R: R[j][i] is the test metric of task i after training task j, i <= j.
        bwt: what later tasks did to each, in percent; None where R[i][i] is 0.
        final: every test metric after the last task; keys "1", "2", ...
    """

    metric: list[str]
    tasks: list[str]
    R: list[list[float]]
    bwt: list[float | None]
    final: dict[str, dict[str, float]]

    def write(self, folder: Path) -> None:
        """Write FOLDER/results.json, if it is not there already."""
        path, text = folder / "results.json", json.dumps(asdict(self), indent=2) + "\n"
        if not path.exists() or path.read_text("utf-8") != text:
            with atomic_write(path, "w") as file:
                file.write(text)


def results_of(dataset: TaskSequence, tests: list[list[dict[str, float]]]) -> Results:
    """R and BWT of the test metrics of each task after each task."""
    tasks = dataset.tasks[: len(tests)]
    metric = [headline(data.num_labels) for data in tasks]
    matrix = [[metrics[metric[i]] for i, metrics in enumerate(row)] for row in tests]
    bwt = [None if math.isnan(value) else value for value in backward_transfer(result_matrix(matrix)).tolist()]
    final = {str(number): metrics for number, metrics in enumerate(tests[-1], 1)}
    return Results(metric, [data.name for data in tasks], matrix, bwt, final)
