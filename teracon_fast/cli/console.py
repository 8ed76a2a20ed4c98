"""What the commands print: consoles, tables, and errors as one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from teracon_fast.cli.extras import advice
from teracon_fast.errors import TeraconError

ORDER = ("prepare", "train", "grow", "evaluate", "recommend", "predict", "embed", "reproduce", "report", "doctor")
_WIDE = 200  # columns of output that is not a terminal: a log must not break the rows of a table


def console(stderr: bool = False) -> Console:
    """A console on the present stdout or stderr; wide, and without colours or control codes, when that is not a terminal."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _WIDE
    return Console(file=stream, width=width, highlight=False, soft_wrap=not stream.isatty())


def say(message: str, stderr: bool = False) -> None:
    """Print a line as it is: brackets are not markup."""
    console(stderr).print(escape(message))


def table(title: str, heading: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; all but the first column are aligned to the right."""
    grid = Table(title=escape(title), title_justify="left", header_style="bold", title_style="bold")
    for index, name in enumerate(heading):
        grid.add_column(escape(name), justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(escape(cell) for cell in row))
    console().print(grid)


class ErrorGroup(TyperGroup):
    """The top-level command: turns errors of bad input into one line on stderr and exit code 2.

    `--traceback`, anywhere in the command line, lets them through.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        """The commands in the order of use."""
        known = super().list_commands(ctx)
        return sorted(known, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take --traceback out of the arguments, wherever it stands."""
        ctx.meta["traceback"] = "--traceback" in args
        return super().parse_args(ctx, [arg for arg in args if arg != "--traceback"])

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (TeraconError, ImportError, OSError) as error:
            line = _one_line(error)
            if ctx.meta["traceback"] or line is None:
                raise
            console(stderr=True).print(f"[bold red]error:[/] {escape(line)}")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            if ctx.meta["traceback"]:
                raise
            say("interrupted", stderr=True)
            raise typer.Exit(130) from None


def _one_line(error: Exception) -> str | None:
    """The message for an error of bad input; None for an error that is a defect and needs its traceback."""
    if isinstance(error, ImportError):
        return advice(error) or (str(error) if "pip install" in str(error) else None)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    return str(error)
