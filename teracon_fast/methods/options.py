"""Options of methods, declared in the signatures of their constructors."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from teracon_fast.errors import ConfigError


@dataclass(frozen=True)
class Option:
    """Declares an argument of a method's constructor as an option: `alpha: Annotated[float, Option("weight of ...")] = 0.7`.

    From there it is a key of the method's TOML table, a flag of `teracon train`, and part of a run's fingerprint. The
    constructor keeps it under the same name.

    Attributes:
        help: one line.
        per_task: whether each task may have a value of its own, see `Method.configure`.
        least, above: the value is at least, or more than, this.
    """

    help: str
    per_task: bool = False
    least: float | None = None
    above: float | None = None


@dataclass(frozen=True, kw_only=True)
class DeclaredOption(Option):
    """An option as a method's constructor declares it; `type` is its annotation without `Option`."""

    name: str
    type: Any
    default: Any

    def check(self, method: str, value: Any) -> None:
        """Raise ConfigError unless a value is one of the declared choices, finite, and in the declared range."""
        choices = get_args(self.type) if get_origin(self.type) is Literal else ()
        if choices and value not in choices:
            expected = f"one of {list(choices)}"
        elif isinstance(value, float) and not math.isfinite(value):
            expected = "a finite number"
        elif self.least is not None and value < self.least:
            expected = f"at least {self.least:g}"
        elif self.above is not None and value <= self.above:
            expected = f"more than {self.above:g}"
        else:
            return
        raise ConfigError(f"{method}: {self.name} is {value!r}, expected {expected}")


def options_of(kind: type) -> dict[str, DeclaredOption]:
    """The options that a method declares, by name, in order. An argument without `Option` is one without help."""
    try:
        hints = get_type_hints(kind.__init__, include_extras=True)  # type: ignore[misc]
    except NameError:  # a plugin's, of names that only a type checker sees
        hints = {}
    found = {}
    for name, parameter in list(inspect.signature(kind).parameters.items())[1:]:  # after sizes
        hint = hints.get(name, Any)
        inner, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        option = next((extra for extra in extras if isinstance(extra, Option)), Option(""))
        found[name] = DeclaredOption(**vars(option), name=name, type=inner, default=parameter.default)
    return found
