"""Training processes that are killed, at any moment and while they save, go on to the same bits."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from test_continual import assert_same_run, tiny_config
from tiny_data import write_tiny

from teracon_fast.train.log import Observer, Step
from teracon_fast.train.run import train

TASKS = 4
# Children fork from a server that has the imports done (torch's optimizers import torch._dynamo at their first step) but has
# never computed, so that a start takes a fraction of a second.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["teracon_fast.train.run", "torch._dynamo", "safetensors.torch", "pyarrow.parquet", "pytest"]
)


class Reporter(Observer):
    """Tells the parent of everything that happens, when it happens."""

    def __init__(self, parent: Connection) -> None:
        self.parent = parent

    def on_step(self, step: Step) -> None:
        self.parent.send("step")

    def on_evaluate(self, task: int, split: str, done: int, total: int) -> None:
        self.parent.send("evaluate")

    def on_valid(self, event: dict[str, Any]) -> None:
        self.parent.send("valid")

    def on_task_end(self, event: dict[str, Any]) -> None:
        self.parent.send("task_end")

    def on_message(self, text: str) -> None:
        self.parent.send(text)


def train_child(data: Path, run: Path, parent: Connection, renames: int | None = None, late: bool = False) -> None:
    """Train; with `renames`, die without any clean-up at that many renames: just before the last one, or just after."""
    if renames is not None:
        real, left = os.replace, renames

        def replace(source: Any, target: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0 and not late:
                os._exit(9)
            real(source, target)
            if left == 0:
                os._exit(9)

        os.replace = replace  # type: ignore[assignment]
    train(tiny_config(data, run, checkpoint_every_steps=2, first__epochs=2), Reporter(parent))
    parent.send("finished")


def start(data: Path, run: Path, *rest: Any) -> tuple[BaseProcess, Connection]:
    ours, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=train_child, args=(data, run, theirs, *rest))
    process.start()
    theirs.close()
    return process, ours


def messages(connection: Connection) -> list[str]:
    """All that a child says until it is gone."""
    said = []
    try:
        while True:
            said.append(connection.recv())
    except EOFError:
        return said


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """Data, the folder of an uninterrupted run, and what its process said."""
    home = tmp_path_factory.mktemp("resume")
    write_tiny(home / "data", tasks=TASKS, rows=120)
    process, connection = start(home / "data", home / "whole")
    said = messages(connection)
    process.join()
    assert process.exitcode == 0 and said[-1] == "finished"
    return home / "data", home / "whole", said


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_moments(folders: tuple[Path, Path, list[str]], tmp_path: Path, seed: int) -> None:
    data, whole, said_by_whole = folders
    moments, resumed = random.Random(seed), 0
    for _ in range(6):
        process, connection = start(data, tmp_path / "run")
        for _ in range(moments.randrange(2, len(said_by_whole) // 5)):
            said = connection.recv()
            resumed += said.startswith("going on with task")
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -9
        connection.close()
    process, connection = start(data, tmp_path / "run")
    assert messages(connection)[-1] == "finished"
    process.join()
    assert resumed >= 2
    assert_same_run(tmp_path / "run", whole, TASKS)
    assert (tmp_path / "run" / "results.json").read_bytes() == (whole / "results.json").read_bytes()


@pytest.mark.parametrize("late", [False, True])
def test_killed_while_saving(folders: tuple[Path, Path, list[str]], tmp_path: Path, late: bool) -> None:
    """One child after the other dies at a rename of its own: of the configuration, a dictionary, weights, a checkpoint."""
    data, whole, _ = folders
    counts, deaths, leftovers = random.Random(5), 0, 0
    while True:
        # Begin with the first renames of a run; later ones are far enough apart that each child gets further.
        renames = deaths + 1 if deaths < 6 else counts.randrange(3, 14)
        process, connection = start(data, tmp_path / "run", renames, late)
        said = messages(connection)
        process.join()
        if process.exitcode == 0:
            assert said[-1] == "finished"
            break
        assert process.exitcode == 9
        deaths += 1
        leftovers += bool(list((tmp_path / "run").rglob(".*.tmp")))
    assert deaths >= 7 and leftovers == (0 if late else deaths)
    assert_same_run(tmp_path / "run", whole, TASKS)
    assert (tmp_path / "run" / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    assert not list((tmp_path / "run").rglob(".*.tmp")), "what killed processes left is cleaned up"
