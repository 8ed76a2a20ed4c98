"""Progress of training and inference: live bars on a terminal, an occasional plain line in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from teracon_fast.cli.console import console
from teracon_fast.train.log import Observer, Step, TaskStart

LOG_SECONDS = 30.0  # between two progress lines in a log
DRAW_SECONDS = 0.1  # between two updates of a bar


class Rate:
    """Items per second, an exponentially decaying average (`half_life` in seconds); the clock starts at the first `add`."""

    def __init__(self, half_life: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._half_life, self._clock = half_life, clock
        self._count = self._seconds = 0.0
        self._last: float | None = None

    def add(self, count: float) -> None:
        """Count `count` items done since the last call. The first call only starts the clock."""
        now = self._clock()
        if self._last is not None:
            seconds = now - self._last
            keep = 0.5 ** (seconds / self._half_life)
            self._count, self._seconds = self._count * keep + count, self._seconds * keep + seconds
        self._last = now

    def pause(self) -> None:
        """Stop the clock until the next `add`."""
        self._last = None

    @property
    def per_second(self) -> float:
        """The rate; 0 while unknown."""
        return self._count / self._seconds if self._seconds > 0 else 0.0


def _metrics(metrics: dict[str, float]) -> str:
    first = ["accuracy"] if "accuracy" in metrics else ["mrr@5", "hit@1", "ndcg@5"]
    return "  ".join(f"{name} {metrics[name]:.4f}" for name in first)


def _logged(event: dict[str, Any]) -> str:
    """The losses of a step or valid event of any method, and rho, hit@1 and the method's own numbers where it has them."""
    parts = []
    for name in [name for name in event if name.endswith("_loss")] or ["loss"]:
        value, label = event.get(name), "loss" if name == "class_loss" else name.removesuffix("_loss").replace("_", " ")
        if value is not None:
            parts.append(f"{label} {value:.4f}" if value >= 0.01 else f"{label} {value:.2e}")
    if event.get("rho"):
        parts.append("rho " + " ".join(f"{value:.3f}" for value in event["rho"]))
    if "hit@1" in event:
        parts.append(f"hit@1 {event['hit@1']:.3f}")
    for name, value in (event.get("method") or {}).items():
        numbers = value if isinstance(value, list) else [value]
        parts.append(" ".join([name.replace("_", " "), *(f"{number:.3g}" for number in numbers)]))
    return "  ".join(parts)


class ConsoleObserver(Observer):
    """Shows the progress of a training run; used as a context manager around it.

    Args:
        out: a terminal gets live bars, anything else plain lines.
        clock: seconds, for the rate.
    """

    def __init__(self, out: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out or console()
        self._clock = clock
        self._live = self._out.is_terminal
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), TextColumn("[dim]{task.fields[note]}"),
            console=self._out, transient=True, disable=not self._live,
            auto_refresh=False,  # refreshed by `_show`: no second thread beside training
        )  # fmt: skip
        self._rate = Rate(clock=clock)
        self._start: TaskStart | None = None
        self._bar: TaskID | None = None
        self._drawn = clock()
        self._note = ""

    def __enter__(self) -> ConsoleObserver:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def on_task_start(self, start: TaskStart) -> None:
        """Print a line that names the task."""
        self._start, self._note = start, ""
        where = f", resuming at epoch {start.epoch + 1}, batch {start.batch + 1}" if start.epoch or start.batch else ""
        size = f"{start.batches_per_epoch} batches of {start.batch_size}, at most {start.epochs} epochs"
        self._print(f"T{start.task} of {start.num_tasks}: {start.name} ({size}{where})", "bold")
        self._rate = Rate(clock=self._clock)
        self._drawn = self._clock()

    def on_step(self, step: Step) -> None:
        """Advance the bar; in a log, print a line every LOG_SECONDS."""
        if step.event is not None:
            self._note = f"step {step.event['step']}: {_logged(step.event)}"
        epochs = f"/{self._start.epochs}" if self._start else ""
        name = f"T{step.task} epoch {step.epoch + 1}{epochs}"
        self.advance(name, step.batch + 1, step.num_batches, step.users, step.users, "left in this epoch")

    def advance(self, name: str, done: int, total: int, users: int, users_each: int = 1, left: str = "left") -> None:
        """Advance the bar to step `done` of `total`, after `users` more users; in a log, print a line every LOG_SECONDS, with the
        seconds that are `left` at `users_each` users a step.
        """
        self._rate.add(users)
        now = self._clock()
        if now - self._drawn < (DRAW_SECONDS if self._live else LOG_SECONDS) and not (done == total and self._live):
            return
        self._drawn = now
        rate = f"{self._rate.per_second:,.0f} users/s" if self._rate.per_second else ""
        if self._live:
            self._show(name, done, total, rate)
        else:
            seconds = (total - done) * users_each / max(self._rate.per_second, 1e-9)
            eta = f"  {seconds:.0f} s {left}" if rate else ""
            self._print(f"{name}  {done:,}/{total:,}  {rate}{eta}  {self._note}".rstrip())

    def on_evaluate(self, task: int, split: str, done: int, total: int) -> None:
        """Advance the bar of an evaluation; only on a terminal, since evaluations are short."""
        self._rate.pause()
        if self._live and (self._clock() - self._drawn >= DRAW_SECONDS or done >= total):
            self._drawn = self._clock()
            self._show(f"T{task} {split}", done, total, "")

    def on_valid(self, event: dict[str, Any]) -> None:
        """Print a line with the validation metrics of the epoch."""
        self._rate.pause()
        self._hide()
        best = "  *best so far" if event.get("best") else ""
        rate = f"  {self._rate.per_second:,.0f} users/s" if self._rate.per_second else ""
        phase = "" if event.get("phase", "train") == "train" else f" {event['phase']}"
        valid = f"valid {_metrics(event['metrics'])}"
        self._print(f"  T{event['task']}{phase} epoch {event['epoch'] + 1}:  {_logged(event)}  {valid}{rate}{best}")

    def on_task_end(self, event: dict[str, Any]) -> None:
        """Print the test metrics of every task so far."""
        self._hide()
        self._print(f"  T{event['task']} finished: {event['epochs']} epochs, {event['seconds']:.1f} s")
        for task, metrics in event["test"].items():
            self._print(f"    test T{task}:  {_metrics(metrics)}")

    def on_message(self, text: str) -> None:
        """Print a line."""
        self._print(text)

    def _print(self, line: str, style: str | None = None) -> None:
        self._out.print(escape(line), style=style)

    def _show(self, name: str, done: int, total: int, rate: str) -> None:
        if self._bar is None or self._progress.tasks[-1].total != total or self._progress.tasks[-1].completed > done:
            self._hide()
            self._bar = self._progress.add_task(name, total=total, completed=done, rate=rate, note=self._note)
        self._progress.update(self._bar, description=name, completed=done, rate=rate, note=self._note, refresh=True)

    def _hide(self) -> None:
        if self._bar is not None:
            self._progress.remove_task(self._bar)
            self._progress.refresh()
            self._bar = None


@contextmanager
def counting(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar (in a log: plain lines) for a loop over users; yields a function to call with the number done so far."""
    done = 0
    with ConsoleObserver(console(stderr=True)) as shown:

        def advance(now_done: int) -> None:
            nonlocal done
            shown.advance(name, now_done, total, now_done - done)
            done = now_done

        shown.advance(name, 0, total, 0)  # starts the clock
        yield advance
