"""The run folder: one process at a time, one fingerprint, one data set; and signals that stop a run at its next safe point."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from teracon_fast.config import RunConfig
from teracon_fast.data import Dictionary, TaskData, TaskSequence, open_dataset
from teracon_fast.data.order import NOISE, arranged
from teracon_fast.errors import ConfigError, TeraconError
from teracon_fast.files import atomic_write
from teracon_fast.methods import METHODS, options_of
from teracon_fast.methods.plugins import plugin_code
from teracon_fast.ops import backends

GROWN = "grown.json"


class RunStopped(TeraconError):
    """The run was asked to stop by a signal, `signum`. It has been saved, and the same command resumes it."""

    def __init__(self, signum: int, where: str = "") -> None:
        self.signum = signum
        super().__init__(f"stopped by {signal.Signals(signum).name}{where}: saved; the same command resumes")


class StopSignals:
    """While the context lasts, Ctrl-C and SIGTERM ask for a stop at the next safe point; a second one acts as usual.

    In a process that another one has started and told its number to (`PARENT`), a second signal changes nothing either, since the
    first may have come from the process group and again from the parent; and it stops when the parent is gone.
    """

    PARENT = "TERACON_PARENT"  # environment variable

    def __init__(self) -> None:
        self._parent = int(os.environ.get(self.PARENT, "0"))
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
        """Raise RunStopped if a signal has come, or the parent is gone."""
        if self._parent and os.getppid() != self._parent:
            self._received = self._received or signal.SIGTERM
        if self._received is not None:
            raise RunStopped(self._received)

    def _receive(self, signum: int, _frame: FrameType | None) -> None:
        self._received = signum
        if not self._parent:
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


def fingerprint(config: RunConfig, dataset: TaskSequence, order: Sequence[int], tasks: int) -> dict[str, dict[str, Any]]:
    """All that decides what a run finds in its first `tasks` tasks, in two views.

    Args:
        config: see `resolved`.
        dataset: in the order of training. order: numbers of its tasks in the prepared folder, NOISE for the noisy one.

    Returns:
        "result": what decides the numbers up to rounding; a finished run is reused where it is the same. "exact": what decides
        their last bits too; a task in training resumes only where it is the same.
    """
    result = {name: getattr(config, name) for name in ("method", "seed", "precision", "split_by", "parity")}
    result["test_every_epoch"] = list(config.test_every_epoch)
    result.update({f"model.{name}": value for name, value in config.model.model_dump(mode="json").items()})
    method = config.new_method(dataset.num_items)
    for name, option in options_of(METHODS[config.method]).items():
        if not option.per_task:
            # An option that the method does not keep under its name is taken as it was given.
            result[f"{config.method}.{name}"] = getattr(method, name, config.options.get(config.method, {}).get(name))
    if code := plugin_code(METHODS[config.method]):
        result["plugin code"] = code
    result.update({"data.name": dataset.name, "data.length": dataset.length, "data.num_items": dataset.num_items})
    for position, (number, data) in enumerate(zip(order[:tasks], dataset.tasks, strict=False), 1):
        found = {**config.for_task(number).model_dump(exclude={"options"}), **config.task_options(number)}
        result.update({f"task.{position}.{name}": value for name, value in found.items()})
        facts = {
            "number": number, "name": data.name, "rows": len(data.sequences), "samples": len(data.samples),
            "labels": data.num_labels, "checksum": _checksum(data, number == NOISE),
        }  # fmt: skip
        result.update({f"data.task{position}.{name}": value for name, value in facts.items()})
    exact = {
        "device": config.device, "backend": backends.resolve(config.backend, device=torch.device(config.device)),
        "algorithm": config.algorithm, "threads": config.threads, "cuda_graphs": config.cuda_graphs,
    }  # fmt: skip
    return {"result": dict(json.loads(json.dumps(result))), "exact": exact}


@lru_cache(maxsize=64)
def _checksum(task: TaskData, noisy: bool) -> int:
    """CRC-32 of all that a task is: a data set that was prepared anew in the same folder is another one.

    Args:
        noisy: it is made from task 1, which has a checksum of its own: its samples are enough.
    """
    check = 0
    for array in (task.samples,) if noisy else (task.samples, task.groups, task.sequences):
        check = zlib.crc32(np.ascontiguousarray(array).data, check)
    return check


def training_data(config: RunConfig) -> tuple[TaskSequence, tuple[int, ...]]:
    """The tasks of a run in the order of training, and their numbers in the prepared folder, NOISE for the noisy one."""
    dataset = open_dataset(config.data)
    order = config.task_order(len(dataset.tasks))
    return arranged(dataset, order, config.seed), order


def resolved_device(config: RunConfig) -> str:
    """The device that "auto" stands for here."""
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if reason := _why_no_device(config.device):
        raise ConfigError(f"device: got {config.device!r}, expected one that works here: {reason}")
    return config.device


def _why_no_device(device: str) -> str:
    """Why there is no such device here; "" if there is."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return ""


def resolved(config: RunConfig, begun: Mapping[str, Any] | None = None) -> RunConfig:
    """The configuration with what it leaves open ("auto", no thread count) set: as a run began, or as it would begin here.

    Args:
        begun: the exact view of the run's fingerprint. A device or backend that is not here is passed over: a finished run is
            read anyway, and one in the middle of a task is refused by `require_same`.
    """
    begun = begun or {}
    device = begun.get("device") if config.device == "auto" else None
    fill: dict[str, Any] = {"device": device if device and not _why_no_device(device) else resolved_device(config)}
    if config.backend == "auto" and begun:
        with contextlib.suppress(backends.BackendError):
            found = backends.resolve(begun["backend"], device=torch.device(fill["device"]))
            if found != backends.resolve("auto", device=torch.device(fill["device"])):
                fill["backend"] = found
    if config.threads is None:
        fill["threads"] = begun.get("threads") or torch.get_num_threads()
    return config.model_copy(update=fill)


def require_same(
    now: Mapping[str, Mapping[str, Any]], begun: Mapping[str, Mapping[str, Any]], folder: Path, exact: bool
) -> None:
    """Refuse to resume a run under settings that would change what it finds.

    Args:
        now, begun: fingerprints.
        exact: whether a task is in training, so that its last bits count.

    Raises:
        ConfigError: names every setting that differs, what was got and what the run began with.
    """
    lines = []
    for view in ("result", "exact") if exact else ("result",):
        was, is_now = begun[view], now[view]
        lines += [
            f"{name}: got {is_now.get(name)!r}, expected {was.get(name)!r}"
            for name in {**was, **is_now} if is_now.get(name) != was.get(name)
        ]  # fmt: skip
    if lines:
        if any(line.startswith("data.") for line in lines):
            lines.append("after its catalogue has grown, a run continues on the larger data set by way of `teracon grow`")
        raise ConfigError("\n  ".join([f"{folder} began with other settings, expected the same ones:", *lines]))


def delete_old_run(folder: Path) -> None:
    """Remove what an earlier run left in its folder; other files stay.

    Raises:
        ConfigError: the folder holds files but is not a run folder.
    """
    entries = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    entries -= {"log.txt", "error.txt"}  # of `reproduce.jobs`
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


def keep_dictionaries(dataset: TaskSequence, order: Sequence[int], folder: Path, tasks_begun: int) -> None:
    """Copy dataset.json and the item and label dictionaries into the run folder: the weights are useless without them.

    Args:
        dataset: in the order of training. order: numbers of its tasks in the prepared folder, NOISE for the noisy one.

    Raises:
        ConfigError: a dictionary that a begun task uses differs from the copy.
    """
    about = json.loads((dataset.path / "dataset.json").read_text("utf-8"))
    if tuple(order) != tuple(range(1, len(about["tasks"]) + 1)):
        about["tasks"] = [asdict(task.meta) for task in dataset.tasks]
    with atomic_write(folder / "dataset.json", "w") as file:
        file.write(json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    for position, (data, number) in enumerate(zip(dataset.tasks, order, strict=True), 1):
        if number == NOISE:
            Dictionary(data.names).save(folder / f"task{position}" / "labels.parquet")
            continue
        name = "items.parquet" if position == 1 else f"task{position}/labels.parquet"
        source = dataset.path / ("items.parquet" if position == 1 else f"task{number}/labels.parquet")
        copy = folder / name
        same = copy.exists() and copy.read_bytes() == source.read_bytes()
        if position <= tasks_begun and copy.exists() and not same:
            raise ConfigError(f"{source} differs from {copy}, expected the data that the run began with")
        if not same:
            with source.open("rb") as reader, atomic_write(copy) as writer:
                shutil.copyfileobj(reader, writer)
