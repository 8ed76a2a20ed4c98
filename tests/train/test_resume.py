"""Training processes that are killed, at any moment and while they save, resume to the same bytes: by every method."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from tiny_data import write_tiny
from tiny_run import assert_same_run, events

from teracon_fast.methods import METHODS

TASKS, KILLS = 6, 10
SETTINGS = """
    --channels 8 --dilations 1,2 --epochs 2 --batch-size 32 --lr 0.01 --checkpoint-every-steps 2 --log-every 2
    --evaluate-batch-size 32 --threads 1 --no-tensorboard --no-report
"""
# Children fork from a server that has the imports done (torch's optimizers import torch._dynamo at their first step) but has
# never computed, so that a start takes a fraction of a second.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([
    "teracon_fast.cli.app", "teracon_fast.cli.train", "teracon_fast.train.run", "teracon_fast.cli.progress",
    "teracon_fast.report.run_report", "torch._dynamo", "safetensors.torch", "pyarrow.parquet", "pytest",
])  # fmt: skip


def teracon(arguments: list[str], parent: Connection, moments: int = 0, renames: int = 0, late: bool = False) -> None:
    """Run the command line; tell the parent of every moment; die of SIGKILL at a moment, or before or after a rename."""
    from teracon_fast.cli.app import app
    from teracon_fast.cli.progress import ConsoleObserver

    real, left = os.replace, {"moments": moments, "renames": renames}

    def count(what: str) -> bool:
        left[what] -= 1
        return left[what] == 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def watched(name: str) -> None:
        def told(self: ConsoleObserver, *given: Any) -> None:
            parent.send(given[0] if name == "on_message" else name)
            if count("moments"):
                die()

        setattr(ConsoleObserver, name, told)

    def replace(source: Any, target: Any) -> None:
        last = count("renames")
        if last and not late:
            die()
        real(source, target)
        if last:
            die()

    for name in ("on_step", "on_evaluate", "on_valid", "on_task_end", "on_message"):
        watched(name)
    os.replace = replace  # type: ignore[assignment]
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
    app(arguments, standalone_mode=False)
    parent.send("finished")


def start(method: str, data: Path, run: Path, **options: Any) -> tuple[BaseProcess, Connection]:
    ours, theirs = PROCESSES.Pipe(duplex=False)
    arguments = ["train", "--method", method, "--data", str(data), "--run", str(run), *SETTINGS.split()]
    process = PROCESSES.Process(target=teracon, args=(arguments, theirs), kwargs=options)
    process.start()
    theirs.close()
    return process, ours


def finish(process: BaseProcess, connection: Connection) -> list[str]:
    """All that a child says until it is gone."""
    said = []
    try:
        while True:
            said.append(connection.recv())
    except EOFError:
        process.join()
        return said


def assert_same_bytes(run: Path, undisturbed: Path) -> None:
    """Weights, results, and all of the log but times and memory."""
    assert_same_run(run, undisturbed, TASKS)
    for name in ("results.json", "dataset.json", "items.parquet", "task3/labels.parquet"):
        assert (run / name).read_bytes() == (undisturbed / name).read_bytes(), name


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("resume") / "data", tasks=TASKS, rows=80, length=6).path


class Whole:
    """Undisturbed runs, each trained once."""

    def __init__(self, data: Path, home: Path) -> None:
        self.data, self.home, self.said = data, home, dict[str, list[str]]()

    def run(self, method: str) -> tuple[Path, int]:
        """The folder, and the number of moments that its process went through."""
        if method not in self.said:
            self.said[method] = finish(*start(method, self.data, self.home / method))
            assert self.said[method][-1] == "finished"
        return self.home / method, len(self.said[method])


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(data, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("method", METHODS)
def test_six_tasks_killed_ten_times(method: str, data: Path, whole: Whole, tmp_path: Path) -> None:
    undisturbed, moments = whole.run(method)
    assert len(events(undisturbed, "task_end")) == TASKS
    chance, resumed = random.Random(method), 0
    for _ in range(KILLS):
        process, connection = start(method, data, tmp_path / "run", moments=chance.randrange(4, moments // (KILLS - 2)))
        said = finish(process, connection)
        assert process.exitcode == -signal.SIGKILL, "it ended before it could be killed"
        resumed += any(text.startswith("resuming task") for text in said)
    assert finish(*start(method, data, tmp_path / "run"))[-1] == "finished"
    assert resumed > KILLS // 2
    assert_same_bytes(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_from_outside_at_random_moments(data: Path, whole: Whole, tmp_path: Path, seed: int) -> None:
    undisturbed, moments = whole.run("teracon")
    chance = random.Random(seed)
    for _ in range(6):
        process, connection = start("teracon", data, tmp_path / "run")
        for _ in range(chance.randrange(2, moments // 5)):
            connection.recv()
        time.sleep(chance.uniform(0, 0.02))
        process.kill()
        process.join()
        connection.close()
    assert finish(*start("teracon", data, tmp_path / "run"))[-1] == "finished"
    assert_same_bytes(tmp_path / "run", undisturbed)


@pytest.mark.parametrize(("method", "late"), [("teracon", False), ("conure", False), ("teracon", True)])
def test_killed_while_saving(data: Path, whole: Whole, tmp_path: Path, method: str, late: bool) -> None:
    """One child after the other dies at a rename of its own: of the configuration, a dictionary, weights, a checkpoint."""
    undisturbed, _ = whole.run(method)
    chance, deaths, leftovers = random.Random(5), 0, 0
    while True:
        # Begin with the first renames of a run; later ones are far enough apart that each child gets further.
        renames = deaths + 1 if deaths < 6 else chance.randrange(12, 40)
        process, connection = start(method, data, tmp_path / "run", renames=renames, late=late)
        said = finish(process, connection)
        if process.exitcode == 0:
            assert said[-1] == "finished"
            break
        assert process.exitcode == -signal.SIGKILL
        deaths += 1
        leftovers += bool(list((tmp_path / "run").rglob(".*.tmp")))
    assert deaths >= 7 and leftovers == (0 if late else deaths)
    assert_same_bytes(tmp_path / "run", undisturbed)
    assert not list((tmp_path / "run").rglob(".*.tmp")), "what killed processes left is cleaned up"
