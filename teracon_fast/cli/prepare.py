"""`teracon prepare NAME ...`: one command per preparer, with the options that the preparer declares."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperGroup

from teracon_fast.cli.console import command_of, console

if TYPE_CHECKING:
    from teracon_fast.data.prepare import Option, Preparer


class PreparerGroup(TyperGroup):
    """Builds the command of a preparer on demand: importing the data code takes seconds, which `teracon --help` must not."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the preparers."""
        from teracon_fast.data.prepare import PREPARERS

        return list(PREPARERS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a preparer; None for an unknown name."""
        from teracon_fast.data.prepare import PREPARERS

        return command_of(cmd_name, _command(PREPARERS[cmd_name])) if cmd_name in PREPARERS else None


app = typer.Typer(cls=PreparerGroup, no_args_is_help=True)


@app.callback()
def _prepare() -> None:
    """Convert raw behavior logs into a prepared task sequence."""


def _option(option: Option) -> inspect.Parameter:
    """A preparer's option as a command-line option: typed if a number, path or switch, else a string."""
    kind: Any = option.kind if option.kind in (int, float, bool, Path) else str
    text, default = option.help, option.default
    if get_origin(option.kind) is Literal:
        text = f"{text} ({', '.join(get_args(option.kind))})"
    shown: Any = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    if default is None or default in ((), "", False):
        shown = False
    # None when not given: the preparer's own default applies, which is thus stated once.
    flag = "--" + option.name.replace("_", "-")
    info = typer.Option(flag, help=text.replace("[", "\\["), show_default=shown)
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info]
    )


def _command(preparer: Preparer) -> Callable[..., None]:
    source = Annotated[Path | None, typer.Argument(help="Raw data: file or folder.", show_default=False)]
    output = Annotated[Path, typer.Option("--output", "-o", help="Prepared folder to create.", show_default=False)]
    parsers = {option.name: option for option in preparer.options}

    def prepare(source: Path | None, output: Path, **given: Any) -> None:
        values = {
            name: parsers[name].parse(value) if isinstance(value, str) else value
            for name, value in given.items()
            if value is not None
        }
        with console(stderr=True).status(f"preparing {output}"):
            summary = preparer(source, output, **values)
        typer.echo(str(summary))

    keyword = inspect.Parameter.KEYWORD_ONLY
    first = inspect.Parameter("source", keyword, default=None, annotation=source)
    second = inspect.Parameter("output", keyword, annotation=output)
    parameters = [first, second, *map(_option, preparer.options)]
    prepare.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    prepare.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    prepare.__doc__ = preparer.help
    return prepare
