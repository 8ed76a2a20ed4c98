"""What a training run tells the outside: metrics.jsonl, TensorBoard scalars, and an Observer for live progress.

Events of metrics.jsonl (one JSON object a line; tasks count from 1, epochs and batches from 0, `step` restarts with each task):

- step: task, epoch, batch, step, loss, its parts by name (class_loss; of some methods retention_loss, attention_loss,
  first_task_loss), hit@1 (of the batch; of task 1 the real targets), users_per_s, and what the method reports: scale (s), rho.
- valid: task, phase, epoch (of the phase), step (the epoch's last), metrics, best, the losses (means over the epoch's samples),
  method (what `Method.describe` gives: open_mask_share, free_weights, sparsity, ...), and with test_every_epoch also test.
- task_end: task, epochs (of all phases), best_epoch, seconds (of training and validation), test ({"1": metrics, ...}), and what
  `Method.summarize` gives: of TERACON similarity ([S][T][T], cosines of the masks).
- run_end: task (the last one), R, bwt, cost (parameters and kept_mib of what inference on all tasks needs, peak_mib, device).
- grown: task (the last finished one), run (whose weights grew), items ([before, after]), labels ({"1": [before, after], ...}),
  fit_losses (of each epoch in which the new rows were fitted); the task_end events before it hold tests of the grown weights.

Fields named in TIME_FIELDS hold times; all others are the same in every run of one configuration on one machine.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from teracon_fast.errors import CheckpointError, DataError

TIME_FIELDS = ("time", "seconds", "users_per_s")


@dataclass(frozen=True)
class TaskStart:
    """A task starts, or resumes at (epoch, batch)."""

    task: int  # from 1
    name: str
    num_tasks: int
    epochs: int  # at most
    batches_per_epoch: int
    batch_size: int
    epoch: int
    batch: int


@dataclass(frozen=True)
class Step:
    """A training step is done. `event` is the logged step event, on the steps that are logged."""

    task: int
    epoch: int
    batch: int  # from 0
    num_batches: int
    users: int  # samples of this batch
    event: dict[str, Any] | None


class Observer:
    """Live view of a run: override the methods of interest. They are called from the training loop and should be quick."""

    def on_task_start(self, start: TaskStart) -> None:
        """A task begins or is resumed."""

    def on_step(self, step: Step) -> None:
        """A training step is done (on a GPU: queued)."""

    def on_evaluate(self, task: int, split: str, done: int, total: int) -> None:
        """`done` of `total` samples of task `task` (from 1) have been ranked; split is "valid" or "test"."""

    def on_valid(self, event: dict[str, Any]) -> None:
        """An epoch has been validated: the valid event."""

    def on_task_end(self, event: dict[str, Any]) -> None:
        """A task is trained and every task so far tested: the task_end event."""

    def on_message(self, text: str) -> None:
        """Something a person should know: resumed, interrupted, already finished."""


class RunLog:
    """Appends events to RUN/metrics.jsonl and scalars to RUN/tensorboard/task{i}.

    Args:
        folder: the run folder.
        offset: bytes of metrics.jsonl that a checkpoint vouches for; what follows them is cut off, so that the steps
            which a resumed run repeats are not logged twice.
        steps: for each task the number of steps done, so that TensorBoard forgets the later ones.
        tensorboard: write scalars when TensorBoard is installed.
    """

    def __init__(self, folder: Path, offset: int = 0, steps: dict[int, int] | None = None, tensorboard: bool = True) -> None:
        self._folder, self._steps, path = folder, steps or {}, folder / "metrics.jsonl"
        path.touch()
        size = path.stat().st_size
        if size < offset:
            raise CheckpointError(f"{path}: got {size} bytes, expected at least the {offset} that the checkpoint names")
        self._file: IO[bytes] = path.open("r+b")
        self._file.truncate(offset)
        self._file.seek(offset)
        self._writers: dict[int, Any] = {}
        self._tensorboard = tensorboard and find_spec("tensorboard") is not None

    def write(self, event: str, task: int, **fields: Any) -> dict[str, Any]:
        """Append one event, stamped with the time; returns it."""
        record = {"event": event, "time": time.time(), "task": task, **fields}
        self._file.write((json.dumps(record) + "\n").encode())
        self._file.flush()
        if self._tensorboard and event in ("step", "valid"):
            writer = self._writer(task)
            for name, value in _scalars(fields, prefix=f"{event}/"):
                writer.add_scalar(name, value, fields["step"])
        return record

    def synced_offset(self) -> int:
        """Bytes written so far, all of them safe on disk: what a checkpoint may vouch for."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        for writer in self._writers.values():
            writer.close()

    def _writer(self, task: int) -> Any:
        if task not in self._writers:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            for writer in self._writers.values():
                writer.close()
            # A folder of its own per task: step numbers restart with each task, and purging goes by step number.
            folder = self._folder / "tensorboard" / f"task{task}"
            purge = self._steps.get(task, 0) if folder.exists() else None
            self._writers = {task: SummaryWriter(str(folder), purge_step=purge)}
        return self._writers[task]


def _scalars(fields: dict[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            yield from _scalars({str(i): entry for i, entry in enumerate(value, 1)}, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name not in ("epoch", "batch", "step"):
            yield prefix + name, float(value)


@dataclass
class TaskLog:
    """Events of one task in the order they were logged: steps, validations, and the end (None while it trains)."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] | None = None


def read_log(run: Path) -> dict[int, TaskLog]:
    """The log of each task (from 1) in RUN/metrics.jsonl; empty if nothing has been logged. A truncated last line, which a
    killed run leaves, is ignored.

    Raises:
        DataError: no such file, or a line that is not a JSON object with "event" and "task".
    """
    path, logs = run / "metrics.jsonl", dict[int, TaskLog]()
    if not path.is_file():
        raise DataError(path, "no such file; expected the log of a run")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                event = json.loads(line)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    break
                raise DataError(path, f"not JSON ({error}); expected one JSON object a line", number) from None
            if not isinstance(event, dict) or "event" not in event or not isinstance(event.get("task"), int):
                reason = f'got {str(event)[:60]!r}; expected a JSON object with "event" and "task"'
                raise DataError(path, reason, number)
            log = logs.setdefault(event["task"], TaskLog())
            if event["event"] == "step":
                log.steps.append(event)
            elif event["event"] == "valid":
                log.checks.append(event)
            elif event["event"] == "task_end":
                log.end = event
    return logs
