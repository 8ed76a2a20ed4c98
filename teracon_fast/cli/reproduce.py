"""`teracon reproduce`: the paper's tables and figures, one command each."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teracon_fast.cli.console import console, say, table
from teracon_fast.errors import ConfigError

if TYPE_CHECKING:
    from teracon_fast.reproduce import Cell, Event

WIDEST = 8  # columns of a table as a screen shows it; one of more is turned


def _what(text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="What is trained", **more)


def _how(text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="How it is trained", **more)


def reproduce(
    experiment: Annotated[
        str, typer.Argument(help="table2, table3, table4, table5, table6, figure2 or figure3.", show_default=False)
    ],
    data: Annotated[Path, typer.Option(help="Prepared data folder.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of runs, tables and pictures; runs are used again.", show_default=False)
    ],
    methods: Annotated[str | None, _what("Methods, separated by commas; those of the paper if not given.")] = None,
    order: Annotated[str | None, _what("original, reversed, or tasks such as 1,3,2 (1 stays first).")] = None,
    noise_at: Annotated[int | None, _what("Place of a noisy task, from 2; table4 has one by itself.")] = None,
    held_back: Annotated[int | None, _what("Task that figure2 adapts to; the fourth, or the last.")] = None,
    seeds: Annotated[str, _what("Seeds, separated by commas.")] = "0",
    own: Annotated[
        list[str] | None,
        _what("A setting of a method, as conure.block=pre-activation.", "--set", metavar="METHOD.NAME=VALUE"),
    ] = None,
    plugin: Annotated[list[Path] | None, _what("Python file that adds methods to METHODS.")] = None,
    preset: Annotated[str | None, _how("Hyper-parameters: ttl, ml, naver or demo; by the data set if not given.")] = None,
    config: Annotated[Path | None, _how("TOML file as of `teracon train`.")] = None,
    channels: Annotated[int | None, _how("Width of the network.", min=1)] = None,
    epochs: Annotated[int | None, _how("Epochs of every task, at most.", min=1)] = None,
    split_by: Annotated[str | None, _how("sample (as published) or user.")] = None,
    quick: Annotated[bool, _how("A tiny network and one epoch: does everything run?", "--quick")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, each in a process; GPUs are dealt out in turn.")] = 1,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    backend: Annotated[str | None, typer.Option(help="Kernels, see `teracon doctor`.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads, divided among the jobs.")] = None,
    keep_weights: Annotated[bool, typer.Option("--keep-weights", help="Keep sequence.pt of finished runs.")] = False,
    file_format: Annotated[str, typer.Option("--format", help="Format of pictures: png, pdf or svg.")] = "png",
) -> None:
    """Train what a table or figure of the paper needs, and write it with the paper's figures beside ours.

    Stopped, the same line goes on; runs that are finished are not trained again, also those of another table. A run that fails
    is reported, the others go on, and the exit code is 1.
    """
    from teracon_fast.reproduce import Choices
    from teracon_fast.reproduce import reproduce as run
    from teracon_fast.train.folder import RunStopped

    given = {
        "model.channels": channels, "first.epochs": epochs, "later.epochs": epochs, "split_by": split_by, "device": device,
        "backend": backend, "threads": threads,
    }  # fmt: skip
    choices = Choices(
        data, output, None if methods is None else tuple(part.strip() for part in methods.split(",")), order, noise_at, held_back,
        _seeds(seeds), preset, config, {name: value for name, value in given.items() if value is not None},
        _settings(own or []), tuple(plugin or ()), quick, keep_weights,
    )  # fmt: skip
    try:
        with _Shown() as shown:
            done = run(experiment, choices, jobs, shown.report, file_format)
    except RunStopped as stopped:
        say(str(stopped), stderr=True)
        raise typer.Exit(128 + stopped.signum) from None
    from teracon_fast.reproduce import main_grids

    say(f"{len(done.plan.cells)} runs: {len(done.ran) - len(done.failed)} trained now, "
        f"{len(done.plan.cells) - len(done.ran)} finished before, {len(done.failed)} failed")  # fmt: skip
    if not done.plan.experiment.is_figure:
        for grid in main_grids(done.plan, done.found):
            table(grid.title, *(grid.rows() if len(grid.columns) <= WIDEST else grid.upright()))
        if done.plan.paper is None:
            say("another data set than the paper's: its figures can not be compared with these")
    say(f"wrote {', '.join(str(path) for path in done.files)}")
    if done.failed:
        raise typer.Exit(1)


def _seeds(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--seeds: got {text!r}, expected numbers separated by commas, for example 0,1,2")
    return tuple(map(int, parts))


def _settings(texts: list[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        method, dot, key = name.partition(".")
        if not (separator and dot and method and key.isidentifier()):
            raise ConfigError(f"--set: got {text!r}, expected METHOD.NAME=VALUE, for example conure.block=pre-activation")
        try:
            parsed = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            parsed = value
        found.setdefault(method, {})[key] = tuple(parsed) if isinstance(parsed, list) else parsed
    return found


class _Shown:
    """Lines about runs; on a terminal also what the present one does."""

    def __init__(self) -> None:
        self._out = console(stderr=True)
        self._status = self._out.status("") if self._out.is_terminal else None
        self._running: list[Cell] = []
        self._count = ""  # "3 of 8"

    def __enter__(self) -> _Shown:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def report(self, event: Event, cell: Cell, text: str) -> None:
        from rich.markup import escape

        order = ",".join(str(number) if number else "noise" for number in cell.order)
        name = f"{cell.method}, tasks {order}, seed {cell.seed}"
        if event == "start":
            self._running.append(cell)
            self._count = text
        elif event in ("done", "failed"):
            self._running.remove(cell)
        if self._status is not None:
            names = ", ".join(f"{of.method} (seed {of.seed})" for of in self._running)
            self._status.update(escape(f"run {self._count}: {names}{': ' + text if event == 'epoch' else ''}"))
        if event == "failed":
            say(f"failed: {name}: {text}", stderr=True)
        elif event == "done" or (event == "start" and self._status is None):
            say(f"{event}: {name}{' (' + text + ')' if text else ''}", stderr=True)
