"""What a run keeps on disk of its method.

    RUN/checkpoints/task{i}.safetensors         what task i changed: with the files before it, the method as task i left it
                    best-{phase}.safetensors   best weights so far of a phase of the task in training
                    resume.pt                   where an interrupted run resumes

The header of a task's file names every tensor of the state after that task, the file that holds it, and its digest. A tensor that
a task leaves as it was is not written again: frozen networks of earlier tasks cost nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teracon_fast.errors import CheckpointError
from teracon_fast.files import atomic_write
from teracon_fast.methods.base import Method
from teracon_fast.model.checkpoints import read_header, read_pickle, read_tensors, write_tensors

FORMAT_VERSION = 2


def task_file(folder: Path, task: int) -> Path:
    """Weights after a task (from 1)."""
    return folder / "checkpoints" / f"task{task}.safetensors"


@dataclass(frozen=True)
class TaskHeader:
    """What a task's file says of the method after it.

    Attributes:
        method: name. task: from 1. labels: of each task so far.
        tensors: name of each tensor of the state -> (task whose file holds it, SHA-256).
        notes: JSON values: s_max, validation metrics and the like.
    """

    method: str
    task: int
    labels: list[int]
    tensors: dict[str, tuple[int, str]]
    notes: dict[str, Any] = field(default_factory=dict)


def save_task(folder: Path, method: Method, notes: Mapping[str, Any] | None = None) -> None:
    """Write what the task that has just ended changed. Files of the tasks before are there.

    Raises:
        CheckpointError: the file of the task before is missing or damaged.
    """
    task = method.task + 1
    before = read_task_header(folder, task - 1).tensors if task > 1 else {}
    own, tensors = dict[str, Tensor](), dict[str, tuple[int, str]]()
    for name, value in method.state_dict().items():
        value = value.detach().cpu().contiguous()
        digest = _digest(value)
        kept = name in before and before[name][1] == digest
        tensors[name] = before[name] if kept else (task, digest)
        if not kept:
            own[name] = value
    header = {
        "version": FORMAT_VERSION, "method": method.name, "task": task, "labels": method.labels, "tensors": tensors,
        "notes": dict(notes or {}),
    }  # fmt: skip
    write_tensors(task_file(folder, task), own, {**header, "checksum": _checksum(header)})


def read_task_header(folder: Path, task: int) -> TaskHeader:
    """The header of a task's file (from 1).

    Raises:
        CheckpointError: the file is missing, damaged or of another version.
    """
    path = task_file(folder, task)
    header = read_header(path, FORMAT_VERSION)
    if header.pop("checksum", None) != _checksum(header):
        raise CheckpointError(f"{path}: the checksum of its header is not the recorded one: the file is damaged")
    try:
        tensors = {name: (int(number), str(digest)) for name, (number, digest) in header["tensors"].items()}
        return TaskHeader(header["method"], header["task"], header["labels"], tensors, header["notes"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its header is damaged: {error!r}") from None


def load_task(folder: Path, task: int, method: Method) -> None:
    """Bring a method that has started no task to where it was after a task (from 1).

    Raises:
        CheckpointError: a file is missing or damaged, its tensors are not those that the header names, or they do not fit.
    """
    header = read_task_header(folder, task)
    if header.method != method.name:
        raise CheckpointError(f"{task_file(folder, task)}: weights of {header.method}, expected those of {method.name}")
    state: dict[str, Tensor] = {}
    for number in sorted({number for number, _ in header.tensors.values()}):
        path = task_file(folder, number)
        read_task_header(folder, number)  # damage to any file is reported
        wanted = {name: digest for name, (of, digest) in header.tensors.items() if of == number}
        found = read_tensors(path, wanted)
        for name, digest in wanted.items():
            if _digest(found[name]) != digest:
                raise CheckpointError(f"{path}: the checksum of {name} is not the recorded one: the file is damaged")
        state |= found
    try:
        method.restore(header.labels, state)
    except RuntimeError as error:
        raise CheckpointError(f"{task_file(folder, task)}: the weights do not fit {method.name}: {error}") from None


def _best_file(folder: Path, phase: str) -> Path:
    # One for each phase: a run that resumes in the first one must not find weights of the second.
    return folder / "checkpoints" / f"best-{phase}.safetensors"


def save_best(folder: Path, phase: str, state: Mapping[str, Tensor]) -> None:
    """Write the best weights so far of a phase of the task in training."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    write_tensors(_best_file(folder, phase), tensors, {"version": FORMAT_VERSION})


def load_best(folder: Path, phase: str) -> dict[str, Tensor]:
    """What `save_best` wrote."""
    path = _best_file(folder, phase)
    read_header(path, FORMAT_VERSION)
    return read_tensors(path)


def forget_best(folder: Path) -> None:
    """The task in training is finished."""
    for path in (folder / "checkpoints").glob("best-*.safetensors"):
        path.unlink()


@dataclass
class RunState:
    """What resume.pt holds.

    Attributes:
        fingerprint: see `folder.fingerprint`.
        begun: tasks started so far. training: of the task in training, see `loop.TaskCheckpoint.plain`; None between tasks.
        tests: for each finished task the test metrics of every task so far.
        steps: of each task. log_offset: bytes of metrics.jsonl. torch: version. peak_mib: highest memory so far.
    """

    fingerprint: dict[str, dict[str, Any]]
    begun: int = 0
    training: dict[str, Any] | None = None
    tests: list[list[dict[str, float]]] = field(default_factory=list)
    steps: dict[int, int] = field(default_factory=dict)
    log_offset: int = 0
    torch: str = str(torch.__version__)
    peak_mib: float = 0.0

    @staticmethod
    def file(folder: Path) -> Path:
        """Where a run keeps it."""
        return folder / "checkpoints" / "resume.pt"

    def save(self, folder: Path) -> None:
        """Replace resume.pt, whole or not at all."""
        with atomic_write(self.file(folder)) as file:
            torch.save({"version": FORMAT_VERSION, **vars(self)}, file)

    @staticmethod
    def load(folder: Path) -> RunState | None:
        """What was saved; None if there is nothing.

        Raises:
            CheckpointError: the file is damaged or of another version.
        """
        path = RunState.file(folder)
        if not path.exists():
            return None
        saved = read_pickle(path)
        version = saved.pop("version", None) if isinstance(saved, dict) else type(saved).__name__
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{path}: got version {version!r}, expected {FORMAT_VERSION}; --fresh starts over")
        try:
            return RunState(**saved)
        except TypeError as error:
            raise CheckpointError(f"{path}: not the state of a run: {error}") from None


def _checksum(header: Mapping[str, Any]) -> str:
    """SHA-256 of a header without its checksum."""
    return hashlib.sha256(json.dumps(header).encode()).hexdigest()


def _digest(value: Tensor) -> str:
    """SHA-256 of dtype, shape and bytes."""
    found = hashlib.sha256(json.dumps([str(value.dtype), list(value.shape)]).encode())
    if value.numel():
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()

