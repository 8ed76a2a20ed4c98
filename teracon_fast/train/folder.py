"""The run folder as a place: one process at a time, one configuration, one data set, and a polite way to stop."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from teracon_fast.config import RunConfig
from teracon_fast.errors import ConfigError, TeraconError
from teracon_fast.files import atomic_write
from teracon_fast.ops import backends

if TYPE_CHECKING:
    from teracon_fast.data import TaskSequence

# What may differ between the beginning of a run and its continuation: nothing of it changes the arithmetic.
_FREE = {"data", "run", "num_tasks", "log_every", "checkpoint_every_seconds", "checkpoint_every_steps", "tensorboard"}


GROWN = "grown.json"


class RunStopped(TeraconError):
    """The run was asked to stop (Ctrl-C or SIGTERM). It has been saved, and the same command goes on with it.

    Attributes:
        signum: the signal's number.
    """

    def __init__(self, signum: int, where: str = "") -> None:
        self.signum = signum
        super().__init__(f"stopped by {signal.Signals(signum).name}{where}: saved, run the same command to go on")


class StopSignals:
    """While the context lasts, Ctrl-C and SIGTERM ask for a stop at the next safe point; a second one acts as usual.

    Args:
        patient: a second one changes nothing either. For a process that gets the same signal from its group and its parent.
    """

    def __init__(self, patient: bool = False) -> None:
        self._patient = patient
        self._received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals only there
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def poll(self) -> None:
        """Raise RunStopped if a signal has come."""
        if self._received is not None:
            raise RunStopped(self._received)

    def _receive(self, signum: int, _frame: FrameType | None) -> None:
        self._received = signum
        if not self._patient:
            self._restore()

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before.clear()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder for this process. The lock goes with the process, also when it is killed.

    Raises:
        ConfigError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ConfigError(f"{folder}: {holder} is training into this run folder, expected a free one") from None
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        for leftover in (*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")):
            leftover.unlink()  # of a process killed while it wrote
        yield


def settings(config: RunConfig, dataset: TaskSequence, task: int) -> dict[str, Any]:
    """All that decides the arithmetic of tasks 1..`task`, flat: what a resumed run must agree on."""
    sections = {"model", "first", "later", "task"}
    flat: dict[str, Any] = config.model_dump(mode="json", exclude=_FREE | sections)
    flat["device"] = resolved_device(config)
    flat["backend"] = backends.resolve(config.backend, device=torch.device(flat["device"]))
    if not config.cuda_graphs:  # runs of earlier versions do not name it
        del flat["cuda_graphs"]
    flat["threads"] = config.threads or torch.get_num_threads()
    flat.update({f"model.{name}": value for name, value in config.model.model_dump(mode="json").items()})
    flat.update({"data.length": dataset.length, "data.num_items": dataset.num_items})
    for number, data in enumerate(dataset.tasks[:task], 1):
        flat.update({f"task.{number}.{name}": value for name, value in config.for_task(number).model_dump().items()})
        facts = {"rows": len(data.sequences), "samples": len(data.samples), "labels": data.num_labels}
        flat.update({f"data.task{number}.{name}": value for name, value in facts.items()})
    return flat


def resolved_device(config: RunConfig) -> str:
    """The device that "auto" stands for here."""
    if config.device != "auto":
        try:
            torch.empty(0, device=config.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"device: got {config.device!r}, expected one that works here: {reason}") from None
        return config.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolved(config: RunConfig, begun: Mapping[str, Any]) -> RunConfig:
    """The configuration with what it leaves open ("auto", no thread count) set as the run began."""
    fill: dict[str, Any] = {}
    if config.device == "auto":
        fill["device"] = begun["device"]
    device = torch.device(fill.get("device", config.device))
    if config.backend == "auto" and backends.resolve("auto", device=device) != begun["backend"]:
        fill["backend"] = begun["backend"]
    if config.threads is None:
        fill["threads"] = begun["threads"]
    return config.model_copy(update=fill)


def require_same(now: Mapping[str, Any], begun: Mapping[str, Any], folder: Path) -> None:
    """Refuse to continue a run under settings that would change its arithmetic.

    Raises:
        ConfigError: names every differing setting, what was got and what the run began with.
    """
    different = [name for name in {**begun, **now} if now.get(name) != begun.get(name)]
    if different:
        lines = [f"{name}: got {now.get(name)!r}, expected {begun.get(name)!r}" for name in different]
        if any(name.startswith("data.") for name in different):
            lines.append("a run goes on with another data set, one whose catalogue has grown, after `teracon grow`")
        raise ConfigError("\n  ".join([f"{folder} began with other settings, expected the same ones:", *lines]))


def delete_old_run(folder: Path) -> None:
    """Remove what an earlier run left in its folder; other files stay.

    Raises:
        ConfigError: the folder holds files but is not a run folder.
    """
    entries = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if entries and "config.toml" not in entries:
        raise ConfigError(f"{folder}: got a folder with other files in it, expected a new, empty or run folder")
    for name in ("results.json", "metrics.jsonl", GROWN):
        (folder / name).unlink(missing_ok=True)
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)


def trained_labels(folder: Path) -> dict[int, int]:
    """For each task (from 1) of a grown run with labels that came by growth: how many labels, the first ones, are trained."""
    if not (folder / GROWN).exists():
        return {}
    return {int(number): count for number, count in json.loads((folder / GROWN).read_text())["trained_labels"].items()}


def write_trained_labels(folder: Path, counts: Mapping[int, int]) -> None:
    """Write what `trained_labels` reads."""
    with atomic_write(folder / GROWN, "w") as file:
        file.write(json.dumps({"trained_labels": counts}) + "\n")


def keep_dictionaries(dataset: TaskSequence, folder: Path, tasks_begun: int) -> None:
    """Copy dataset.json and the item and label dictionaries into the run folder: the weights are useless without them.

    Raises:
        ConfigError: a dictionary that a begun task uses differs from the copy.
    """
    begun = {"items.parquet"} | {f"task{number}/labels.parquet" for number in range(1, tasks_begun + 1)}
    labels = [f"task{number}/labels.parquet" for number in range(1, len(dataset.tasks) + 1)]
    for name in ("dataset.json", "items.parquet", *labels):
        source, copy = dataset.path / name, folder / name
        if not source.exists():
            continue
        same = copy.exists() and copy.read_bytes() == source.read_bytes()
        if tasks_begun and name in begun and copy.exists() and not same:
            raise ConfigError(f"{source} differs from {copy}, expected the data that the run began with")
        if not same:
            with source.open("rb") as reader, atomic_write(copy) as writer:
                shutil.copyfileobj(reader, writer)
