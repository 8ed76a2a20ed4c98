"""Training runs as processes, several at a time.

Each run is `teracon train` with a configuration file. It leaves in its folder, besides what every run does:

    RUN/log.txt       all that its processes printed
        error.txt     why the last one failed, if it did
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from teracon_fast.config import RunConfig, load_config
from teracon_fast.errors import ConfigError
from teracon_fast.files import atomic_write
from teracon_fast.train.checkpoint import RunState
from teracon_fast.train.folder import StopSignals

POLL_SECONDS = 0.1

Event = Literal["start", "line", "done", "failed"]
Report = Callable[[Event, RunConfig, str], None]


def run_jobs(configs: Sequence[RunConfig], jobs: int, report: Report | None = None) -> list[RunConfig]:
    """Train runs, each in a process of its own. A failed run does not stop the others; an interrupted one resumes.

    CPU threads are divided among the jobs, and GPUs dealt out in turn if the device is "auto" or "cuda". A run that has begun
    keeps the threads and the device that it began with, unless others are asked for.

    Args:
        configs: of the runs, each with a folder of its own.
        jobs: processes at a time.
        report: called with "start" and "2 of 8", "line" and what the process has printed last, "done" and "", "failed" and why.

    Returns:
        The runs that failed, each with an error.txt in its folder.

    Raises:
        RunStopped: Ctrl-C or SIGTERM; every run in progress has been saved.
    """
    if jobs < 1:
        raise ConfigError(f"jobs: got {jobs}, expected at least 1")
    waiting, failed, running = list(configs), list[RunConfig](), dict[int, _Job]()
    tell = report or (lambda event, config, text: None)
    with StopSignals() as stop:
        try:
            while waiting or running:
                for slot in range(jobs):
                    if waiting and slot not in running:
                        config = waiting.pop(0)
                        running[slot] = _Job(config, slot, jobs)
                        tell("start", config, f"{len(configs) - len(waiting)} of {len(configs)}")
                stop.poll()
                time.sleep(POLL_SECONDS)
                for slot, job in list(running.items()):
                    if line := job.new_line():
                        tell("line", job.config, line)
                    code = job.process.poll()
                    if code is None:
                        continue
                    del running[slot]
                    if code:
                        failed.append(job.config)
                    tell("failed" if code else "done", job.config, job.write_error(code) if code else "")
        finally:
            for job in running.values():
                job.process.terminate()
            for job in running.values():
                job.process.wait()
    return failed


class _Job:
    """A run in a process."""

    def __init__(self, config: RunConfig, slot: int, jobs: int) -> None:
        self.config, self.folder = config, config.run
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "error.txt").unlink(missing_ok=True)
        # Not config.toml: the run may refuse this configuration and keep the one it began with.
        with atomic_write(self.folder / ".job.toml", "w") as file:
            file.write(_dealt(config, slot, jobs).to_toml())
        command = [sys.executable, "-m", "teracon_fast", "train", str(self.folder / ".job.toml"), "--no-report"]
        with (self.folder / "log.txt").open("ab") as log:
            self.start = self.seen = log.tell()
            # In a process group of its own: Ctrl-C reaches this process only, which passes it on.
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, process_group=0,
                env={**os.environ, StopSignals.PARENT: str(os.getpid())},
            )  # fmt: skip

    def new_line(self) -> str:
        """The last line of the log if the log has grown since the last call; else ""."""
        seen, self.seen = self.seen, (self.folder / "log.txt").stat().st_size
        return self._printed(seen)[-1] if self.seen > seen else ""

    def write_error(self, code: int) -> str:
        """Write error.txt: the traceback, or the message of an error in the input. Returns it as one line."""
        lines = self._printed(self.start)
        starts = [at for at, line in enumerate(lines) if line.startswith(("Traceback (", "error: "))]
        lines = [f"killed by {signal.Signals(-code).name}, see log.txt"] if code < 0 else lines[max(starts, default=-1) :]
        with atomic_write(self.folder / "error.txt", "w") as file:
            file.write("\n".join(lines) + "\n")
        if lines[0].startswith("error: "):
            return " ".join(line.strip() for line in lines).removeprefix("error: ")
        return lines[-1]

    def _printed(self, start: int) -> list[str]:
        """Lines of the log from an offset on; one empty line if there are none."""
        with (self.folder / "log.txt").open("rb") as log:
            log.seek(start)
            lines = log.read().decode(errors="replace").splitlines()
        return [line.rstrip() for line in lines if line.strip()] or [""]


def _dealt(config: RunConfig, slot: int, jobs: int) -> RunConfig:
    """The configuration of a process, one of several: its threads and its GPU."""
    begun = load_config(path=config.run / "config.toml") if RunState.file(config.run).exists() else None
    threads, device = config.threads, config.device
    if threads is not None or begun is None:
        threads = max(1, (threads or torch.get_num_threads()) // jobs)
    if device in ("auto", "cuda"):
        gpus = torch.cuda.device_count()
        if begun is not None and (device == "auto" or begun.device.startswith("cuda")):
            device = begun.device
        elif gpus:
            device = f"cuda:{slot % gpus}"
    return config.model_copy(update={"threads": threads, "device": device})
