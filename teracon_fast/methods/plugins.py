"""The methods by name, and Python files of other people that add theirs."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
import traceback
from functools import lru_cache
from pathlib import Path
from typing import Any

from teracon_fast.errors import ConfigError
from teracon_fast.methods.base import Method

METHODS: dict[str, type[Method]] = {}


def load_plugin(path: Path) -> None:
    """Run a Python file that adds methods to `METHODS`; once in a process.

    Raises:
        ConfigError: there is no such Python file, or it fails.
    """
    path = path.resolve()
    name = f"teracon_plugin_{hashlib.sha256(str(path).encode()).hexdigest()[:10]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"plugin: got {path}, expected a Python file")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception):
            raise
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        raise ConfigError(f"plugin: {where}: {type(error).__name__}: {error}") from error


def find_method(name: str) -> type[Method]:
    """A method by its name.

    Raises:
        ConfigError: there is none, or what a plugin registered is not a complete subclass of `Method`.
    """
    if name not in METHODS:
        raise ConfigError(f"method: got {name!r}, expected one of {', '.join(METHODS)}")
    kind: Any = METHODS[name]
    if not (inspect.isclass(kind) and issubclass(kind, Method) and not inspect.isabstract(kind)):
        lacks = f" without {', '.join(sorted(kind.__abstractmethods__))}" if inspect.isabstract(kind) else ""
        raise ConfigError(f"METHODS[{name!r}]: got {kind}{lacks}, expected a subclass of Method that implements all of it")
    return METHODS[name]


@lru_cache(maxsize=64)
def plugin_code(kind: type[Method]) -> str:
    """A hash of the source files of a method that is not part of this package: once edited, it is another method. Else ""."""
    files = set()
    for base in kind.__mro__:
        if base.__module__.split(".")[0] not in ("teracon_fast", "torch", "abc", "builtins"):
            try:
                files.add(inspect.getsourcefile(base) or "")
            except TypeError:  # made in an interactive session
                continue
    texts = [Path(file).read_bytes() for file in sorted(files) if Path(file).is_file()]
    return hashlib.sha256(b"".join(texts)).hexdigest()[:16] if texts else ""
