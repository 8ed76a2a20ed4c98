"""`teracon evaluate`, `recommend`, `predict` and `embed`: use a trained run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teracon_fast.cli.console import console, say, table
from teracon_fast.cli.progress import ConsoleObserver, counting
from teracon_fast.errors import ConfigError

if TYPE_CHECKING:
    from teracon_fast.data.user_input import Inputs
    from teracon_fast.infer.commands import TrainedRun

RunFolder = Annotated[Path, typer.Argument(help="Run folder.", show_default=False)]
After = Annotated[int | None, typer.Option("--after", help="Use the weights after this task; default: the newest.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Backend = Annotated[str, typer.Option(help="Kernels: auto, torch, or one that `teracon doctor` lists.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads.")]
Batch = Annotated[int, typer.Option(min=1, help="Users encoded at a time.")]
Input = Annotated[
    Path, typer.Option("--input", "-i", help="Users: .csv, .parquet or a prepared folder.", show_default=False)
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Parquet file to write.", show_default=False)]
Unseen = Annotated[str, typer.Option(help="Items that the run has not seen: error, pad, drop or bucket.")]
InputTask = Annotated[int, typer.Option(min=1, help="Of a prepared folder: the task whose sequences to read.")]
UserColumn = Annotated[str | None, typer.Option(help="Of a Parquet file: the column that names the user.")]
ItemsColumn = Annotated[str | None, typer.Option(help="Of a Parquet file: the column of item lists.")]


def evaluate(
    run: RunFolder,
    data: Annotated[Path | None, typer.Option(help="Prepared data; default: where the run was trained from.")] = None,
    split: Annotated[str, typer.Option(help="Samples to use: test, valid or train.")] = "test",
    unseen: Unseen = "error",
    after: After = None,
    batch_size: Batch = 1024,
    device: Device = "auto",
    backend: Backend = "auto",
    threads: Threads = None,
) -> None:
    """Measure every task of a trained model: the last row of R, with all metrics."""
    from teracon_fast.infer.commands import measure, open_run

    opened = open_run(run, after, device, backend, threads)
    with ConsoleObserver(console(stderr=True)) as observer:
        unseen_policy: Any = unseen
        found = measure(opened, data, split, batch_size, observer.on_evaluate, unseen_policy, partial(say, stderr=True))
    names = list(dict.fromkeys(name for metrics in found.values() for name in metrics))
    rows = []
    for number, metrics in found.items():
        values = [f"{metrics[name]:.4f}" if name in metrics else "" for name in names]
        rows.append([f"T{number} {opened.task(number).name}", *values])
    table(f"{split} metrics after task {len(opened.tasks)}", ["task", *names], rows)


def recommend(
    run: RunFolder,
    input_path: Input,
    output: Output,
    task: Annotated[int, typer.Option(min=1, help="Task whose labels to recommend, from 1.")] = 1,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="How many for each user.")] = 10,
    exclude_seen: Annotated[
        bool, typer.Option("--exclude-seen", help="Leave out items of the user's sequence.")
    ] = False,
    long: Annotated[bool, typer.Option("--long", help="One row a recommendation, not one a user.")] = False,
    unseen: Unseen = "error",
    input_task: InputTask = 1,
    user_column: UserColumn = None,
    items_column: ItemsColumn = None,
    after: After = None,
    batch_size: Batch = 1024,
    device: Device = "auto",
    backend: Backend = "auto",
    threads: Threads = None,
) -> None:
    """Write the best items of a task for each user, with scores, by raw id."""
    from teracon_fast.infer import commands as inference

    opened = inference.open_run(run, after, device, backend, threads)
    inputs = _inputs(opened, input_path, unseen, input_task, user_column, items_column)
    _write(
        "recommend", inputs, output,
        lambda progress: inference.recommend(opened, inputs, output, task, top_k, exclude_seen, long, batch_size, progress),
    )  # fmt: skip


def predict(
    run: RunFolder,
    input_path: Input,
    output: Output,
    task: Annotated[int, typer.Option(min=1, help="Task whose label to predict, from 1.", show_default=False)],
    unseen: Unseen = "error",
    input_task: InputTask = 1,
    user_column: UserColumn = None,
    items_column: ItemsColumn = None,
    after: After = None,
    batch_size: Batch = 1024,
    device: Device = "auto",
    backend: Backend = "auto",
    threads: Threads = None,
) -> None:
    """Write the probability of each label of a task with few labels, for each user."""
    from teracon_fast.infer import commands as inference

    opened = inference.open_run(run, after, device, backend, threads)
    inputs = _inputs(opened, input_path, unseen, input_task, user_column, items_column)
    _write(
        "predict",
        inputs,
        output,
        lambda progress: inference.predict(opened, inputs, output, task, batch_size, progress),
    )


def embed(
    run: RunFolder,
    input_path: Input,
    output: Output,
    task: Annotated[str, typer.Option(help="Task numbers from 1, separated by commas, or all.")] = "all",
    unseen: Unseen = "error",
    input_task: InputTask = 1,
    user_column: UserColumn = None,
    items_column: ItemsColumn = None,
    after: After = None,
    batch_size: Batch = 1024,
    device: Device = "auto",
    backend: Backend = "auto",
    threads: Threads = None,
) -> None:
    """Write user representations, one fixed-size float32 list a task."""
    from teracon_fast.infer import commands as inference

    opened = inference.open_run(run, after, device, backend, threads)
    numbers = list(range(1, len(opened.tasks) + 1)) if task == "all" else _numbers(task)
    inputs = _inputs(opened, input_path, unseen, input_task, user_column, items_column)
    _write(
        "embed", inputs, output, lambda progress: inference.embed(opened, inputs, output, numbers, batch_size, progress)
    )


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts) or len(set(parts)) < len(parts):
        raise ConfigError(f"--task: got {text!r}, expected all, or task numbers such as 2 or 1,3")
    return [int(part) for part in parts]


def _inputs(
    run: TrainedRun, path: Path, unseen: Any, task: int, user_column: str | None, items_column: str | None
) -> Inputs:
    from teracon_fast.data.user_input import Inputs

    return Inputs(path, run.items, run.length, unseen, task, user_column, items_column)


def _write(name: str, inputs: Inputs, output: Path, work: Callable[[Callable[[int], None]], int]) -> None:
    with counting(name, inputs.total()) as advance:
        users = work(advance)
    say(f"wrote {output}: {users:,} users, {output.stat().st_size / 2**20:.1f} MiB")
    if inputs.unseen_places:
        fate = {"pad": "became the pad", "drop": "were dropped", "bucket": "became buckets"}[inputs.unseen]
        places, strangers = inputs.unseen_places, inputs.unseen_users
        say(f"{places:,} items that the run has not seen, of {strangers:,} users, {fate}")
