"""`teracon grow`: a trained run on a catalogue that has grown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from teracon_fast.cli.console import console, say, table


def grow(
    run: Annotated[Path, typer.Argument(help="Run folder; it stays as it is.", show_default=False)],
    data: Annotated[Path, typer.Option(help="Data prepared with --extend RUN.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder to make.", show_default=False)],
    epochs: Annotated[
        int, typer.Option(min=0, help="Epochs of task 1 that train the rows of new items and nothing else; 0: left untrained.")
    ] = 0,
) -> None:
    """Extend a trained run to the new items and labels of a larger data set, in a new run folder.

    All tasks are tested again on the larger data; `teracon train OUTPUT/config.toml` then trains its further tasks. Works for
    every method with one item embedding for all tasks.
    """
    from teracon_fast.cli.progress import ConsoleObserver
    from teracon_fast.report.run_report import load_run, summary_rows
    from teracon_fast.train import growth

    with ConsoleObserver(console(stderr=True)) as observer:
        grown = growth.grow(run, data, output, observer, epochs)
    table(f"Test metrics on {data}", *summary_rows(load_run(output)))
    say(f"items, with the pad: {grown.items[0]:,} -> {grown.items[1]:,}")
    for number, (before, after) in grown.labels.items():
        if number > 1 and after > before:
            say(f"labels of task {number} ({grown.results.tasks[number - 1]}): {before:,} -> {after:,}")
    say(f"wrote {output}; to train further tasks: teracon train {output / 'config.toml'}")
