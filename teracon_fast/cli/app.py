"""Puts the commands together."""

from __future__ import annotations

from typing import Annotated

import typer

from teracon_fast import __version__
from teracon_fast.cli import grow, infer, inspect, prepare, reproduce
from teracon_fast.cli.console import ErrorGroup

app = typer.Typer(
    name="teracon",
    cls=ErrorGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Continual user representation learning (TERACON): from raw behavior logs to recommendations.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"teracon {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the whole traceback of an error; may stand anywhere.")
    ] = False,
) -> None:
    pass


app.add_typer(prepare.app, name="prepare")


@app.command("train")
def _train() -> None:
    """Train a sequence of tasks by any method; an interrupted run resumes automatically."""  # see ErrorGroup


app.command("grow")(grow.grow)
app.command("evaluate")(infer.evaluate)
app.command("recommend")(infer.recommend)
app.command("predict")(infer.predict)
app.command("embed")(infer.embed)
app.command("reproduce")(reproduce.reproduce)
app.command("report")(inspect.report)
app.command("doctor")(inspect.doctor)
