"""What a preparer is to the command line (name, help, typed options), and the summary that it returns."""

from __future__ import annotations

import inspect
import re
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from teracon_fast.data.store import check_output
from teracon_fast.errors import ConfigError


@dataclass(frozen=True)
class TaskSummary:
    """Size of one prepared task. `mean_length` counts real items per row, `users` distinct groups; `pad_share` is from 0 to 1."""

    name: str
    kind: str
    users: int
    rows: int
    samples: int
    labels: int
    mean_length: float
    pad_share: float


@dataclass(frozen=True)
class Summary:
    """What a preparer wrote.

    Attributes:
        name: name of the data set.
        path: the prepared folder.
        length: items per row, with pads.
        items: distinct items and buckets, without the pad.
        users: distinct users of the first task.
        mean_length: real items per row, over the rows of all tasks.
        tasks: in order.
        notes: what was skipped and why, one sentence each.
        seconds: wall time of the preparation.
    """

    name: str
    path: Path
    length: int
    items: int
    users: int
    mean_length: float
    tasks: tuple[TaskSummary, ...]
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def pad_share(self) -> float:
        """Share of pads, from 0 to 1, over the rows of all tasks."""
        return 1 - self.mean_length / self.length

    def __str__(self) -> str:
        lines = [
            f"{self.name}: {len(self.tasks)} tasks, {self.users:,} users, {self.items:,} items, length {self.length}, "
            f"{self.mean_length:.1f} real items per row, {self.pad_share:.1%} pads, {self.seconds:.1f} s -> {self.path}"
        ]
        lines += [
            f"  T{number} {task.name} ({task.kind}): {task.users:,} users, {task.rows:,} rows, {task.samples:,} samples, "
            f"{task.labels:,} labels, {task.mean_length:.1f} real items per row"
            for number, task in enumerate(self.tasks, start=1)
        ]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


@dataclass(frozen=True, kw_only=True)
class WriterOptions:
    """Options of every preparer, passed to the `DatasetWriter`.

    Args:
        extend: prepared folder or run folder whose items and labels keep their indices; new ones follow.
        min_count: items that occur less often in T1 share the buckets.
        buckets: number of buckets that rare items share by a hash of their ids; none: as in the extended data set.
        overwrite: replace an existing prepared folder.
    """

    extend: Path | None = None
    min_count: int = 1
    buckets: int | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Option:
    """An option of a preparer: keyword, type, default and help text."""

    name: str
    annotation: Any
    default: Any
    help: str

    @property
    def kind(self) -> Any:
        """The type of the option's values other than None."""
        union = get_origin(self.annotation) in (Union, types.UnionType)
        kinds = get_args(self.annotation) if union else (self.annotation,)
        return next(kind for kind in kinds if kind is not type(None))

    def parse(self, text: str) -> Any:
        """A list (comma-separated) or choice from its text on the command line; ConfigError if it is not one of the choices."""
        if get_origin(self.kind) is tuple:
            return tuple(part.strip() for part in text.split(",") if part.strip())
        if get_origin(self.kind) is Literal and text not in get_args(self.kind):
            flag, choices = "--" + self.name.replace("_", "-"), ", ".join(get_args(self.kind))
            raise ConfigError(f"{flag}: got {text!r}; expected one of {choices}")
        return text


@dataclass(frozen=True)
class Preparer:
    """A preparer by name. Its module is imported on first use.

    Attributes:
        name: name on the command line, and X in `teracon_fast.data.prepare.X:prepare_X`.
    """

    name: str

    @cached_property
    def function(self) -> Callable[..., Summary]:
        """`prepare_<name>(source, output, writer, **options) -> Summary`."""
        module = import_module(f"teracon_fast.data.prepare.{self.name}")
        function: Callable[..., Summary] = getattr(module, f"prepare_{self.name}")
        return function

    @property
    def help(self) -> str:
        """First line of the preparer's docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @cached_property
    def options(self) -> tuple[Option, ...]:
        """The preparer's own options, then those of every preparer."""
        return (*_declared(self.function), *_declared(WriterOptions))

    @property
    def needs_source(self) -> bool:
        """Whether the preparer needs a source, having no default one."""
        annotation = inspect.signature(self.function, eval_str=True).parameters["source"].annotation
        return type(None) not in get_args(annotation)

    def __call__(self, source: Path | None, output: Path, **options: Any) -> Summary:
        """Prepare `source` into the folder `output`.

        Raises:
            ConfigError: an option is out of range, or no source though one is needed.
            DataError: a file is missing or malformed, or `output` exists and may not be replaced.
        """
        began = time.perf_counter()
        if source is None and self.needs_source:
            raise ConfigError(f"preparer {self.name}: got no SOURCE; expected the raw data")
        shared = {option.name for option in _declared(WriterOptions)} & set(options)
        writer = WriterOptions(**{name: options.pop(name) for name in shared})
        check_output(output, writer.overwrite)
        summary = self.function(source, output, writer, **options)
        return replace(summary, seconds=time.perf_counter() - began)


def _declared(function: Callable[..., Any]) -> Iterator[Option]:
    """The keyword-only parameters, with their help texts from the docstring: entries `name: text` and their further lines."""
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(function) or "", flags=re.MULTILINE)
    texts = {name: " ".join(text.split()) for name, text in entries}
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            yield Option(parameter.name, parameter.annotation, parameter.default, texts.get(parameter.name, ""))
