"""Errors raised on bad input. Each message names what was got and what was expected."""

from __future__ import annotations

from pathlib import Path


class TeraconError(ValueError):
    """Base class of every error that this library raises on bad input."""


class ShapeError(TeraconError):
    """A tensor has another shape, dtype or device than the operation expects."""


class ConfigError(TeraconError):
    """A configuration value or a combination of values is not valid."""


class CheckpointError(TeraconError):
    """A checkpoint cannot be read, or does not fit the model."""


class DataError(TeraconError):
    """A data file is malformed.

    Args:
        path: the file.
        reason: what was got and what was expected.
        line: line (text files, from 1) or row (Parquet, from 0) of the first offence; None when the whole file is meant.
    """

    def __init__(self, path: str | Path, reason: str, line: int | None = None) -> None:
        self.path, self.line, self.reason = Path(path), line, reason
        where = f"{path}" if line is None else f"{path}:{line}"
        super().__init__(f"{where}: {reason}")
