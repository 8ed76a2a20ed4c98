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
        int, typer.Option(min=0, help="Passes over task 1's training sequences that fit the rows of new items, and nothing else.")
    ] = 0,
) -> None:
    """Give a trained run rows for the new items and labels of a larger data set, in a new run folder.

    All tasks are tested again on the larger data; then `teracon train OUTPUT/config.toml` goes on with its further tasks.
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
            say(f"labels of task {number}: {before:,} -> {after:,}")
    say(f"wrote {output}; go on with: teracon train {output / 'config.toml'}")
