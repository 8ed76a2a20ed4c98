"""A trained run on a catalogue that has grown: a new run folder with rows for the new items and labels; the old one stays.

Growing is a step of its own, not something that training does on the way, because it changes what the old results mean: the
larger data set has other rows, other test samples and more labels to rank among. In the new folder everything is of the larger
data set: the weights after every task have the same new rows, R is measured again with them, and the log says so. What follows
is a run like any other: `teracon train` goes on with it, to the same bits after an interruption.

The teacher and the student of the next task begin from one file, so they have the same new rows. A label that came by growth
has an untrained row in the head of its (finished) task; retention holds its scores where the initial row puts them. So
inference leaves these labels out, see `runfolder.trained_labels`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from teracon_fast.checkpoints import load_model, load_state, read_notes, save_model, save_state
from teracon_fast.config import RunConfig, load_config
from teracon_fast.continual import Results, derived_seed, results_of, task_split
from teracon_fast.data import Dictionary, TaskSequence, open_dataset
from teracon_fast.data.layout import read_about
from teracon_fast.errors import ConfigError
from teracon_fast.evaluation import evaluate
from teracon_fast.files import atomic_write
from teracon_fast.runfolder import (
    check_tasks,
    keep_dictionaries,
    locked,
    resolved,
    settings,
    trained_labels,
    write_trained_labels,
)
from teracon_fast.runlog import Observer, RunLog


@dataclass(frozen=True)
class Growth:
    """What `grow` did.

    Attributes:
        items: numbers of items before and after, the pad and buckets counted.
        labels: the same of the labels of each task, by its number from 1.
        results: R and BWT of the grown weights on the larger data set.
    """

    items: tuple[int, int]
    labels: dict[int, tuple[int, int]]
    results: Results


def grow(run: str | Path, data: str | Path, output: str | Path, observer: Observer | None = None) -> Growth:
    """Make a run folder for a larger catalogue from a run that stands between two tasks. `run` stays as it is.

    Args:
        run: run folder; all of its begun tasks are finished.
        data: prepared folder of which the items, and the labels of the finished tasks, extend those of the run: made with
            `--extend`. It may have further tasks.
        output: run folder to make; written whole or not at all.
        observer: told of the progress.

    Raises:
        ConfigError: no such run, a task in training, an id that has moved, another length or other tasks, or `output` exists.
        CheckpointError, DataError: a file is missing or damaged.
    """
    run, output, observer = Path(run), Path(output), observer or Observer()
    if not (run / "config.toml").is_file():
        raise ConfigError(f"{run}: has no config.toml, expected a run folder that `teracon train` made")
    if output.exists():
        raise ConfigError(f"{output}: exists already, expected a new folder")
    dataset = open_dataset(data)
    threads = torch.get_num_threads()
    with locked(run), _folder(output) as folder:
        if not (run / "checkpoints" / "resume.pt").exists():
            raise ConfigError(f"{run}: no task is finished yet")
        state = load_state(run / "checkpoints" / "resume.pt")
        done = len(state["tests"])
        if state["position"] is not None:
            raise ConfigError(f"{run}: task {state['begun']} is in training, expected a run between two tasks: finish it first")
        labels = _require_extended(run, dataset, done)
        overrides = {"data": str(data), "run": str(output)}
        config = resolved(load_config(path=run / "config.toml", overrides=overrides), state["settings"])
        config = config.model_copy(update={"num_tasks": None})
        if config.split_by == "sample":
            observer.on_message(
                f"{run} splits by sample: some test samples of the larger data may have been trained on, so that the tests after "
                "growth are too good; a run with split_by = user has no such doubt"
            )
        try:
            torch.set_num_threads(state["settings"]["threads"])
            tests = _grow_weights(run, folder, config, dataset, done, observer)
        finally:
            torch.set_num_threads(threads)
        keep_dictionaries(dataset, folder, 0)
        items = len(Dictionary.load(run / "items.parquet")), dataset.num_items
        growth = Growth(items, labels, results_of(dataset, tests))
        known = trained_labels(run)
        trained = {number: known.get(number, before) for number, (before, _) in labels.items()}
        write_trained_labels(folder, {n: count for n, count in trained.items() if count < labels[n][1]})
        with atomic_write(folder / "config.toml", "w") as file:
            file.write(config.to_toml())
        with atomic_write(folder / "results.json", "w") as file:
            file.write(json.dumps(dataclasses.asdict(growth.results), indent=2) + "\n")
        offset = _write_log(run, folder, state["log_offset"], growth, tests)
        save_state(folder / "checkpoints" / "resume.pt", {
            "settings": settings(config, dataset, done), "begun": done, "tests": tests, "steps": state["steps"],
            "log_offset": offset, "torch": str(torch.__version__), "position": None,
        })  # fmt: skip
    return growth


@contextmanager
def _folder(path: Path) -> Iterator[Path]:
    """A folder that gets its name when the context ends without an error, and is removed otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.parent / f".{path.name}.{os.getpid()}.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "checkpoints").mkdir(parents=True)
    try:
        yield folder
        os.replace(folder, path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _require_extended(run: Path, dataset: TaskSequence, done: int) -> dict[int, tuple[int, int]]:
    """Numbers of labels of the finished tasks, before and after.

    Raises:
        ConfigError: the data set does not extend that of the run.
    """
    about = read_about(run)
    if dataset.length != about.length:
        raise ConfigError(f"{dataset.path}: got sequences of length {dataset.length}, expected {about.length} as in {run}")
    got, expected = [data.name for data in dataset.tasks[:done]], [meta.name for meta in about.tasks[:done]]
    if got != expected:
        raise ConfigError(f"{dataset.path}: its first tasks are {got}, expected {expected} as in {run}")
    _require_prefix("item", run / "items.parquet", dataset.path / "items.parquet", run)
    labels = {1: (len(Dictionary.load(run / "items.parquet")), dataset.num_items)}
    for number, data in enumerate(dataset.tasks[1:done], 2):
        name = f"task{number}/labels.parquet"
        before = _require_prefix(f"label of task {number},", run / name, dataset.path / name, run)
        labels[number] = before, data.num_labels
    return labels


def _require_prefix(what: str, old: Path, new: Path, run: Path) -> int:
    """Number of ids of the dictionary `old`, all of which must have their indices in `new` too."""
    expected, got = Dictionary.load(old).ids, Dictionary.load(new).ids[: len(Dictionary.load(old))]
    moved = np.flatnonzero(expected[: len(got)] != got)
    first = int(moved[0]) if len(moved) else len(got)
    if first < len(expected):
        found = repr(got[first]) if first < len(got) else "none"
        raise ConfigError(
            f"{new}: {what} with index {first} is {found}, expected {expected[first]!r} as in {run}: indices of a trained "
            f"model must not move; prepare the data with --extend {run}"
        )
    return len(expected)


def _grow_weights(
    run: Path, folder: Path, config: RunConfig, dataset: TaskSequence, done: int, observer: Observer
) -> list[list[dict[str, float]]]:
    """Write the grown weights after each task; returns the test metrics of each with every task so far."""
    splits = [task_split(config, data) for data in dataset.tasks[:done]]
    check_tasks(dataset, splits)
    tests = []
    for after in range(1, done + 1):
        name = f"checkpoints/task{after}.safetensors"
        old = load_model(run / name, config.device, config.backend, config.algorithm)
        generator = torch.Generator().manual_seed(derived_seed(config.seed, done, "grown"))
        model = old.grown(dataset.num_items, [data.num_labels for data in dataset.tasks[:after]], generator)
        save_model(model, folder / name, read_notes(run / name))
        s = config.for_task(after).s_max
        tests.append([
            evaluate(
                model, data, number - 1, split.test, s, config.evaluate_batch_size, partial(observer.on_evaluate, number, "test")
            )
            for number, (data, split) in enumerate(zip(dataset.tasks[:after], splits, strict=False), 1)
        ])  # fmt: skip
    return tests


def _write_log(run: Path, folder: Path, offset: int, growth: Growth, tests: list[list[dict[str, float]]]) -> int:
    """The log of the run with the tests measured again, and what was done; returns its length in bytes."""
    with (run / "metrics.jsonl").open("rb") as reader, atomic_write(folder / "metrics.jsonl") as writer:
        for line in reader.read(offset).splitlines():
            event: dict[str, Any] = json.loads(line)
            if event["event"] == "task_end":
                event["test"] = {str(number): metrics for number, metrics in enumerate(tests[event["task"] - 1], 1)}
            if event["event"] != "run_end":
                writer.write((json.dumps(event) + "\n").encode())
    log = RunLog(folder, (folder / "metrics.jsonl").stat().st_size, tensorboard=False)
    log.write("grown", len(tests), run=run.resolve().name, items=growth.items, labels=growth.labels)
    log.write("run_end", len(tests), R=growth.results.R, bwt=growth.results.bwt)
    end = log.synced_offset()
    log.close()
    return end
