"""What a preparer is to the command line (name, help, typed options) and what it returns (a summary)."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from teracon_fast.errors import ConfigError


@dataclass(frozen=True)
class TaskSummary:
    """Size of one prepared task. `mean_length` is in real items a row; `users` counts distinct groups."""

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
        length: items in a row, pads included.
        items: distinct items and buckets, the pad not counted.
        users: distinct users of the first task.
        mean_length: real items a row, over the rows of all tasks.
        pad_share: share of pads, from 0 to 1, over the rows of all tasks.
        seconds: wall time of the preparation.
        tasks: one entry a task, in the order of the sequence.
        notes: what was left out and why, one sentence each.
    """

    name: str
    path: Path
    length: int
    items: int
    users: int
    mean_length: float
    pad_share: float
    seconds: float
    tasks: tuple[TaskSummary, ...]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The summary as JSON values."""
        return {**asdict(self), "path": str(self.path)}

    def __str__(self) -> str:
        lines = [
            f"{self.name}: {len(self.tasks)} tasks, {self.users:,} users, {self.items:,} items, length {self.length}, "
            f"{self.mean_length:.1f} real items a row, {self.pad_share:.1%} pads, {self.seconds:.1f} s -> {self.path}"
        ]
        lines += [
            f"  T{number} {task.name} ({task.kind}): {task.users:,} users, {task.rows:,} rows, {task.samples:,} samples, "
            f"{task.labels:,} labels, {task.mean_length:.1f} real items a row"
            for number, task in enumerate(self.tasks, start=1)
        ]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


@dataclass(frozen=True)
class Option:
    """One named option of a preparer: its keyword, type, default and help text."""

    name: str
    annotation: Any
    default: Any
    help: str

    def parse(self, text: str) -> Any:
        """The value that a command line's text stands for; lists are separated by commas, "none" is None.

        Raises:
            ConfigError: the text is no value of the option's type.
        """
        kinds = (
            get_args(self.annotation) if get_origin(self.annotation) in (Union, types.UnionType) else (self.annotation,)
        )
        if type(None) in kinds and text.lower() in ("none", ""):
            return None
        kind = next(kind for kind in kinds if kind is not type(None))
        if get_origin(kind) is tuple:
            return tuple(part.strip() for part in text.split(",") if part.strip())
        if get_origin(kind) is Literal:
            if text not in get_args(kind):
                raise ConfigError(f"option {self.name}: got {text!r}; expected one of {', '.join(get_args(kind))}")
            return text
        if kind is bool:
            if text.lower() not in ("true", "false"):
                raise ConfigError(f"option {self.name}: got {text!r}; expected true or false")
            return text.lower() == "true"
        try:
            return kind(text)
        except ValueError as error:
            raise ConfigError(f"option {self.name}: got {text!r}; expected {kind.__name__}") from error


@dataclass(frozen=True)
class Preparer:
    """A preparer by name. The module that does the work is imported at first use.

    Attributes:
        name: name on the command line, and X in `teracon_fast.data.prepare.X:prepare_X`.
    """

    name: str

    @cached_property
    def function(self) -> Callable[..., Summary]:
        """`prepare_<name>(source, output, **options) -> Summary`."""
        function: Callable[..., Summary] = getattr(
            import_module(f"teracon_fast.data.prepare.{self.name}"), f"prepare_{self.name}"
        )
        return function

    @property
    def help(self) -> str:
        """First line of the preparer's docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @cached_property
    def options(self) -> tuple[Option, ...]:
        """The keyword-only parameters, with the help text that the docstring's `Args:` section gives them."""
        texts = _argument_texts(inspect.getdoc(self.function) or "")
        parameters = inspect.signature(self.function, eval_str=True).parameters.values()
        return tuple(
            Option(parameter.name, parameter.annotation, parameter.default, texts.get(parameter.name, ""))
            for parameter in parameters
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        )

    def parse(self, texts: Mapping[str, str]) -> dict[str, Any]:
        """Typed options from a command line's `name=text` pairs; "-" and "_" in a name are the same.

        Raises:
            ConfigError: an unknown option or a text that is no value of its type.
        """
        known = {option.name: option for option in self.options}
        values: dict[str, Any] = {}
        for name, text in texts.items():
            key = name.replace("-", "_")
            if key not in known:
                raise ConfigError(f"preparer {self.name} has no option {name!r}; it has: {', '.join(known)}")
            values[key] = known[key].parse(text)
        return values

    @property
    def needs_source(self) -> bool:
        """Whether the preparer has no data of its own to fall back on."""
        annotation = inspect.signature(self.function, eval_str=True).parameters["source"].annotation
        return type(None) not in get_args(annotation)

    def __call__(self, source: Path | None, output: Path, **options: Any) -> Summary:
        """Prepare `source` into the folder `output`.

        Raises:
            ConfigError: an option is out of range, or `source` is None and the preparer needs one.
            DataError: what the preparer says of its files.
        """
        if source is None and self.needs_source:
            raise ConfigError(f"preparer {self.name} needs SOURCE, the raw data")
        return self.function(source, output, **options)


def _argument_texts(doc: str) -> dict[str, str]:
    """name -> text of the entries of a docstring's `Args:` section."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)*)", doc, flags=re.MULTILINE)
    texts: dict[str, str] = {}
    name = ""
    for line in (section.group(1) if section else "").splitlines():
        entry = re.match(r"^    (\w+): (.*)$", line)
        if entry:
            name = entry.group(1)
            texts[name] = entry.group(2).strip()
        elif name and line.strip():
            texts[name] += " " + line.strip()
    return texts
