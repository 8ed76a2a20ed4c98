"""`teracon reproduce`: the paper's tables and figures, one command each."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from teracon_fast.cli.console import console, say, table

if TYPE_CHECKING:
    from teracon_fast.config import RunConfig
    from teracon_fast.reproduce import Event

MAX_COLUMNS = 8  # of a table on the screen; a wider one is transposed


What = partial(typer.Option, rich_help_panel="What is trained")
How = partial(typer.Option, rich_help_panel="How it is trained")


def reproduce(
    experiment: Annotated[
        str, typer.Argument(help="table2, table3, table4, table5, table6, figure2 or figure3.", show_default=False)
    ],
    data: Annotated[Path, typer.Option(help="Prepared data folder.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of runs, tables, plots; finished runs are reused.", show_default=False)
    ],
    methods: Annotated[str | None, What(help="Methods, separated by commas (default: those of the paper).")] = None,
    order: Annotated[str | None, What(help="original, reversed, or tasks such as 1,3,2 (1 stays first).")] = None,
    noise_at: Annotated[int | None, What(help="Position of a noisy task, from 2; table4 has one by default.")] = None,
    held_back: Annotated[int | None, What(help="Task that figure2 adapts to (default: the fourth, or the last).")] = None,
    seeds: Annotated[str, What(help="Seeds, separated by commas.")] = "0",
    own: Annotated[
        list[str] | None, What("--set", help="An option of a method: conure.block=pre-activation.", metavar="METHOD.NAME=VALUE")
    ] = None,
    plugin: Annotated[list[Path] | None, What(help="Python file that registers methods of your own.")] = None,
    preset: Annotated[str | None, How(help="Hyper-parameters: ttl, ml, naver or demo (default: by data set).")] = None,
    config: Annotated[Path | None, How(help="TOML file, as for `teracon train`.")] = None,
    channels: Annotated[int | None, How(help="Width of the network.", min=1)] = None,
    epochs: Annotated[int | None, How(help="Maximum number of epochs of every task.", min=1)] = None,
    split_by: Annotated[str | None, How(help="sample (as published) or user.")] = None,
    quick: Annotated[bool, How("--quick", help="A tiny network and one epoch, to check that everything runs.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, each a process; GPUs are dealt out in turn.")] = 1,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    backend: Annotated[str | None, typer.Option(help="Kernels, see `teracon doctor`.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads, divided among the jobs.")] = None,
    drop_weights: Annotated[bool, typer.Option("--drop-weights", help="Delete the weights of finished runs.")] = False,
    file_format: Annotated[str, typer.Option("--format", help="Format of plots: png, pdf or svg.")] = "png",
) -> None:
    """Train what a table or figure of the paper needs, and write it with the paper's results beside ours.

    The same command resumes interrupted runs and reuses finished ones, also those of other tables. If a run fails, the others
    continue, and the exit code is 1.
    """
    from teracon_fast.cli.train import collect, exit_when_stopped, seeds_of
    from teracon_fast.reproduce import Choices, main_grids
    from teracon_fast.reproduce import reproduce as run

    given = {
        "model.channels": channels, "epochs": epochs, "split_by": split_by, "device": device, "backend": backend,
        "threads": threads,
    }  # fmt: skip
    choices = Choices(
        data, output, None if methods is None else tuple(part.strip() for part in methods.split(",")), order, noise_at, held_back,
        seeds_of(seeds), preset, config, collect(given, [], own or []), tuple(plugin or ()), quick, drop_weights,
    )  # fmt: skip
    with exit_when_stopped(), RunLines() as shown:
        done = run(experiment, choices, jobs, shown.report, file_format)
    say(f"{len(done.plan.runs)} runs: {len(done.ran) - len(done.failed)} trained, {len(done.plan.runs) - len(done.ran)} reused, "
        f"{len(done.failed)} failed")  # fmt: skip
    if not done.plan.experiment.is_figure:
        for grid in main_grids(done.plan, done.found):
            table(grid.title, *(grid.rows() if len(grid.columns) <= MAX_COLUMNS else grid.upright()))
        if done.plan.paper is None:
            say("not one of the paper's data sets: its published results are not comparable with these")
    say(f"wrote {', '.join(str(path) for path in done.files)}")
    if done.failed:
        raise typer.Exit(1)


class RunLines:
    """Shows the runs of `run_jobs`: a line each; on a terminal also the last output of the runs in progress."""

    def __init__(self) -> None:
        out = console(stderr=True)
        self._live, self._status = out.is_terminal, out.status("")  # shown on a terminal only
        self._last: dict[Path, str] = {}  # of runs in progress
        self._count = ""  # "3 of 8"

    def __enter__(self) -> RunLines:
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def report(self, event: Event, config: RunConfig, text: str) -> None:
        """See `run_jobs`."""
        from rich.markup import escape

        if event in ("done", "failed"):
            del self._last[config.run]
        else:
            self._last[config.run] = text.strip() if event == "line" else "starting"
        if event == "start":
            self._count = text
        running = "".join(f"\n  {run.name}: {line}" for run, line in self._last.items())
        self._status.update(escape(f"run {self._count}{running}"))
        if event == "failed":
            say(f"failed: {config.run}: {text}", stderr=True)
        elif event == "done" or (event == "start" and not self._live):
            say(f"{event}: {config.run}{' (' + text + ')' if text else ''}", stderr=True)
