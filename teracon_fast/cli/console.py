"""Output of the commands: consoles, tables, one-line errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from teracon_fast.cli.extras import advice
from teracon_fast.errors import TeraconError

ORDER = ("prepare", "train", "grow", "evaluate", "recommend", "predict", "embed", "reproduce", "report", "doctor")
_WIDE = 200  # columns if the output is not a terminal, so that rows of tables stay on one line in a log


def console(stderr: bool = False) -> Console:
    """A console on the current stdout or stderr; if that is not a terminal, wide and without colors and control codes."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _WIDE
    return Console(file=stream, width=width, highlight=False, soft_wrap=not stream.isatty())


def say(message: str, stderr: bool = False) -> None:
    """Print a line verbatim: brackets are not markup."""
    console(stderr).print(escape(message))


def table(title: str, heading: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, all columns but the first right-aligned."""
    grid = Table(title=escape(title), title_justify="left", header_style="bold", title_style="bold")
    for index, name in enumerate(heading):
        grid.add_column(escape(name), justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(escape(cell) for cell in row))
    console().print(grid)


def command_of(name: str, function: Callable[..., None]) -> Any:
    """The Click command of a function whose signature is made on demand."""
    single = typer.Typer(add_completion=False, rich_markup_mode="rich")
    single.command(name)(function)
    return typer.main.get_command(single)


class ErrorGroup(TyperGroup):
    """The top-level command. Bad input ends in one line on stderr and exit code 2, or with `--traceback`, anywhere on the
    command line, in the traceback.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        """The commands in the order in which they are used."""
        known = super().list_commands(ctx)
        return sorted(known, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        """The command to run; `train` is built on demand: its flags need the methods, and so torch, which takes seconds."""
        name, command, rest = super().resolve_command(ctx, args)
        if name == "train":
            from teracon_fast.cli.train import train

            command = command_of(name, train)
        return name, command, rest

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments without --traceback, wherever it is."""
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
    """The message of an error caused by bad input; None for a bug, which needs its traceback."""
    if isinstance(error, ImportError):
        return advice(error) or (str(error) if "pip install" in str(error) else None)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    return str(error)
