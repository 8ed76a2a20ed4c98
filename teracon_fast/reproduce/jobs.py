"""Training cells: each in its folder, going on where it stopped, never again once it is finished.

    OUTPUT/cells/NAME/
      result.json       what a finished cell came to, and all that decided it
      sequence.pt       the tasks finished so far; deleted with the last one, unless weights are kept
      task.pt           the task in training, as it was a moment ago
      progress.json     what epochs have measured so far
      log.txt           a line an epoch; in a process of its own, also all that it prints
      error.txt         why the cell failed, if it did
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch

from teracon_fast.data import TaskSequence, open_dataset, split_task
from teracon_fast.data.order import arranged
from teracon_fast.errors import ConfigError
from teracon_fast.files import atomic_write
from teracon_fast.methods import Method
from teracon_fast.methods.sequence import Epoch, Learnt, evaluate_method, learn_sequence
from teracon_fast.reproduce.plan import Cell, Setup, cell_folder, identity, load_plugin
from teracon_fast.train.folder import RunStopped, StopSignals, locked, resolved_device
from teracon_fast.train.memory import forget_highest_resident, highest_resident_mib
from teracon_fast.train.metrics import headline

Event = Literal["start", "epoch", "done", "failed"]
Report = Callable[[Event, Cell, str], None]


@dataclass(frozen=True)
class CellResult:
    """What a finished cell came to.

    Attributes:
        metric, tasks, R: as `results.Results`.
        epochs: number of each task. seconds: of all epochs of each task, with validation and without the tests after the task.
        parameters, kept_mib: numbers with a fraction, and MiB of everything, that inference on all tasks needs.
        peak_mib: highest memory: on a GPU what torch held there, else the resident memory of the whole process.
        device: "cpu", or the name of the GPU.
        curves: place of a watched task, from 0 -> its test metric after each epoch.
    """

    metric: list[str]
    tasks: list[str]
    R: list[list[float]]
    epochs: list[int]
    seconds: list[float]
    parameters: int
    kept_mib: float
    peak_mib: float
    device: str
    curves: dict[int, list[float]]


def read_result(setup: Setup, cell: Cell, dataset: TaskSequence) -> CellResult | None:
    """What a cell came to; None if it is not finished, or was made with other settings.

    Args:
        dataset: as prepared.
    """
    dataset = arranged(dataset, cell.order, cell.seed)
    file = cell_folder(setup, cell, dataset) / "result.json"
    if not file.is_file():
        return None
    try:
        saved = json.loads(file.read_text("utf-8"))
        if saved["cell"] != identity(setup, cell, dataset):
            return None
        found = saved["result"]
        return CellResult(**{**found, "curves": {int(place): values for place, values in found["curves"].items()}})
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: not the result of a cell ({error}); delete it to run the cell again") from None


def run_cell(
    setup: Setup, cell: Cell, device: str, threads: int, note: Callable[[str], None] | None = None,
    poll: Callable[[], None] | None = None,
) -> None:  # fmt: skip
    """Train a cell to its end, from where it was stopped if it was.

    Args:
        device: as `RunConfig.device`. threads: of torch on the CPU. note: called with a line about each epoch.
        poll: called after every step; raises RunStopped where it is asked to stop.

    Raises:
        ConfigError: another process trains it, or settings do not fit the data. DivergedError: a loss was not finite.
        RunStopped: all is saved.
    """
    for plugin in setup.plugins:
        load_plugin(plugin)
    before = torch.get_num_threads()
    dataset = arranged(open_dataset(setup.data, validate=False), cell.order, cell.seed)
    folder = cell_folder(setup, cell, dataset)
    with locked(folder):
        try:
            torch.set_num_threads(threads)
            _train(setup, cell, dataset, folder, device, note or (lambda _: None), poll)
        finally:
            torch.set_num_threads(before)
        (folder / "error.txt").unlink(missing_ok=True)


def _train(
    setup: Setup, cell: Cell, dataset: TaskSequence, folder: Path, device: str, note: Callable[[str], None],
    poll: Callable[[], None] | None,
) -> None:  # fmt: skip
    place = torch.device(resolved_device(setup.config.model_copy(update={"device": device})))
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
    else:
        forget_highest_resident()
    method = setup.new_method(cell, dataset.num_items).to(place)
    progress = _Progress(folder, cell, setup, dataset, method, place, note)
    learnt = learn_sequence(
        method, dataset, lambda task: setup.task_settings(cell.order[task]), cell.seed, setup.config.split_by, folder=folder,
        observe=progress.observe, save_seconds=setup.config.checkpoint_every_seconds, poll=poll,
    )  # fmt: skip
    result = progress.result(learnt)
    with atomic_write(folder / "result.json", "w") as file:
        about = {"cell": identity(setup, cell, dataset), "torch": str(torch.__version__), "result": vars(result)}
        file.write(json.dumps(about, indent=1) + "\n")
    # A process that is killed as a task ends leaves task.pt.
    for name in ("progress.json", "task.pt", *([] if setup.keep_weights else ["sequence.pt"])):
        (folder / name).unlink(missing_ok=True)


class _Progress:
    """What epochs measure besides the driver, kept on disk so that a stop loses none of it."""

    def __init__(
        self, folder: Path, cell: Cell, setup: Setup, dataset: TaskSequence, method: Method, place: torch.device,
        note: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.file, self.log = folder / "progress.json", folder / "log.txt"
        self.cell, self.setup, self.dataset, self.method, self.place, self.note = cell, setup, dataset, method, place, note
        saved: dict[str, Any] = {}
        begun = any((folder / name).is_file() for name in ("sequence.pt", "task.pt"))
        if begun and self.file.is_file():
            saved = json.loads(self.file.read_text("utf-8"))
        # By epoch, since one that ended after the last save comes again.
        self.curves: dict[int, dict[str, float]] = {int(task): points for task, points in saved.get("curves", {}).items()}
        self.peak = float(saved.get("peak_mib", 0.0))
        if begun:
            self._say("goes on from where it was stopped")

    def observe(self, task: int, epoch: Epoch) -> None:
        """After each epoch."""
        data = self.dataset.tasks[task]
        if task in self.cell.watch:
            if epoch.epoch == 0 and epoch.phase == self.method.phases()[0]:
                self.curves[task] = {}  # the task begins, perhaps again after a stop
            test = split_task(data, self.setup.config.split_by, self.cell.seed).test
            size = self.setup.config.evaluate_batch_size
            metrics = evaluate_method(self.method, data, task, test, size)
            self.curves[task][f"{epoch.phase} {epoch.epoch}"] = metrics[headline(data.num_labels)]
        self.peak = max(self.peak, self.highest())
        with atomic_write(self.file, "w") as file:
            file.write(json.dumps({"curves": self.curves, "peak_mib": self.peak}) + "\n")
        name = headline(data.num_labels)
        line = (
            f"task {task + 1} of {len(self.dataset.tasks)} ({data.name}), {epoch.phase}, epoch {epoch.epoch + 1}: "
            f"loss {epoch.loss:.4f}, valid {name} {epoch.valid[name]:.4f}{' (best)' if epoch.best else ''}, {epoch.seconds:.1f} s"
        )
        self._say(line)

    def _say(self, line: str) -> None:
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        self.note(line)

    def highest(self) -> float:
        if self.place.type == "cuda":
            return torch.cuda.max_memory_allocated(self.place) / 2**20
        return highest_resident_mib()

    def result(self, learnt: Learnt) -> CellResult:
        """All of it, once the sequence is finished."""
        kept = self.method.inference_state().values()
        return CellResult(
            learnt.results.metric,
            learnt.results.tasks,
            learnt.results.R,
            [len(epochs) for epochs in learnt.epochs],
            [sum(epoch.seconds for epoch in epochs) for epochs in learnt.epochs],
            sum(value.numel() for value in kept if value.is_floating_point()),
            sum(value.numel() * value.element_size() for value in kept) / 2**20,
            max(self.peak, self.highest()),
            torch.cuda.get_device_name(self.place) if self.place.type == "cuda" else str(self.place),
            {task: list(points.values()) for task, points in self.curves.items()},
        )


def run_cells(setup: Setup, cells: Sequence[Cell], dataset: TaskSequence, jobs: int, report: Report) -> list[Cell]:
    """Train cells, several at a time; one that fails does not stop the others.

    Args:
        dataset: as prepared.
        jobs: 1: one after the other in this process; more: each cell in a process of its own, so many at a time. Threads are
            divided among them, and GPUs dealt out in turn where the device is "auto" or "cuda".
        report: told of what happens: a start with its place, an epoch (one process only) and a failure with a text.

    Returns:
        The cells that failed, each with an error.txt.

    Raises:
        RunStopped: Ctrl-C or SIGTERM; all is saved.
    """
    if jobs < 1:
        raise ConfigError(f"jobs: got {jobs}, expected at least 1")
    threads = max(1, (setup.config.threads or torch.get_num_threads()) // jobs)
    with StopSignals() as stop:
        if jobs > 1:
            return _in_processes(setup, cells, dataset, jobs, threads, report, stop)
        return _in_turn(setup, cells, dataset, threads, report, stop)


def _in_turn(
    setup: Setup, cells: Sequence[Cell], dataset: TaskSequence, threads: int, report: Report, stop: StopSignals
) -> list[Cell]:
    failed = []
    for number, cell in enumerate(cells, 1):
        report("start", cell, f"{number} of {len(cells)}")
        try:
            run_cell(setup, cell, setup.config.device, threads, partial(report, "epoch", cell), stop.poll)
        except RunStopped:
            raise
        except Exception as error:
            _write_error(cell_folder(setup, cell, arranged(dataset, cell.order, cell.seed)))
            report("failed", cell, f"{type(error).__name__}: {error}")
            failed.append(cell)
        else:
            report("done", cell, "")
    return failed


def _in_processes(
    setup: Setup, cells: Sequence[Cell], dataset: TaskSequence, jobs: int, threads: int, report: Report, stop: StopSignals
) -> list[Cell]:
    context = multiprocessing.get_context("spawn")
    waiting, failed, free = list(cells), list[Cell](), list(range(jobs))
    running: dict[Any, tuple[BaseProcess, Cell, Path, int]] = {}
    try:
        while waiting or running:
            while waiting and free:
                cell, slot = waiting.pop(0), free.pop(0)
                folder = cell_folder(setup, cell, arranged(dataset, cell.order, cell.seed))
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "error.txt").unlink(missing_ok=True)
                arguments = (setup, cell, _device(setup.config.device, slot), threads, folder)
                process: BaseProcess = context.Process(target=_child, args=arguments, daemon=True)
                # Ctrl-C reaches all processes of a terminal; this one passes it on.
                with _blocked(signal.SIGINT):
                    process.start()
                running[process.sentinel] = process, cell, folder, slot
                report("start", cell, f"{len(cells) - len(waiting)} of {len(cells)}")
            stop.poll()
            for sentinel in connection.wait(list(running), timeout=0.5):
                process, cell, folder, slot = running.pop(sentinel)
                process.join()
                free.append(slot)
                if process.exitcode == 0:
                    report("done", cell, "")
                    continue
                failed.append(cell)
                if not (folder / "error.txt").is_file():
                    with atomic_write(folder / "error.txt", "w") as file:
                        file.write(f"the process ended with exit code {process.exitcode}; see log.txt\n")
                report("failed", cell, (folder / "error.txt").read_text("utf-8").strip().splitlines()[-1])
    finally:
        for process, *_ in running.values():
            process.terminate()
        for process, *_ in running.values():
            process.join()
    return failed


@contextmanager
def _blocked(signum: signal.Signals) -> Iterator[None]:
    """A signal waits; processes that are started meanwhile never get it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signum})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _device(device: str, slot: int) -> str:
    """The device of one of several processes: GPUs in turn."""
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") and torch.cuda.is_available() else 0
    return f"cuda:{slot % gpus}" if gpus else device


def _child(setup: Setup, cell: Cell, device: str, threads: int, folder: Path) -> None:
    """What a process does: all that it prints goes to the cell's log."""
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for stream in (1, 2):
        os.dup2(log, stream)
    parent = multiprocessing.parent_process()
    assert parent is not None
    with StopSignals(patient=True) as stop:

        def poll() -> None:
            stop.poll()
            if not parent.is_alive():
                raise RunStopped(signal.SIGTERM)

        _run_child(setup, cell, device, threads, folder, poll)


def _run_child(setup: Setup, cell: Cell, device: str, threads: int, folder: Path, poll: Callable[[], None]) -> None:
    try:
        run_cell(setup, cell, device, threads, poll=poll)
    except RunStopped as stopped:
        sys.exit(128 + stopped.signum)
    except Exception:
        _write_error(folder)
        sys.exit(1)


def _write_error(folder: Path) -> None:
    """The exception in progress, as error.txt."""
    with atomic_write(folder / "error.txt", "w") as file:
        file.write(traceback.format_exc())
