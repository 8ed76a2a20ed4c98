"""`teracon evaluate`, `recommend`, `predict` and `embed`: use a trained run."""

# No postponed annotations: the fields of the option classes become parameters, whose types Typer reads.

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teracon_fast.cli.console import console, say, table
from teracon_fast.cli.progress import ConsoleObserver, counting

if TYPE_CHECKING:
    from teracon_fast.infer.open import TrainedRun

Panel = partial(typer.Option, rich_help_panel="Machine")
Unseen = Annotated[str, typer.Option(help="Items unknown to the run: error, pad, drop or bucket.")]


@dataclass(kw_only=True)
class RunOptions:
    """What every command on a trained run takes."""

    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)]
    after: Annotated[
        str | None, typer.Option(help="Use the weights after this task, by name or number; default: the last one trained.")
    ] = None
    unseen: Unseen = "error"
    batch_size: Annotated[int, Panel(min=1, help="Users encoded at a time.")] = 1024
    device: Annotated[str, Panel(help="auto, cpu, cuda or cuda:N.")] = "auto"
    backend: Annotated[str | None, Panel(help="Kernels: auto, torch, or one that `teracon doctor` lists; default: the run's.")] = None
    threads: Annotated[int | None, Panel(min=1, help="CPU threads.")] = None

    def open(self) -> "TrainedRun":
        """The run."""
        from teracon_fast.infer.open import open_run

        return open_run(self.run, self.after, self.device, self.backend, self.threads)


@dataclass(kw_only=True)
class UserOptions(RunOptions):
    """What every command takes that reads users and writes a Parquet file."""

    input: Annotated[
        Path, typer.Option("--input", "-i", help="Users: .csv, .parquet or a prepared folder.", show_default=False)
    ]
    output: Annotated[Path, typer.Option("--output", "-o", help="Parquet file to write.", show_default=False)]
    input_task: Annotated[str, typer.Option(help="Prepared folder: the task to read sequences of, by name or number.")] = "1"
    user_column: Annotated[str | None, typer.Option(help="Parquet: column with the user.")] = None
    items_column: Annotated[str | None, typer.Option(help="Parquet: column with the lists of items.")] = None
    opened: "TrainedRun" = field(init=False)

    def __post_init__(self) -> None:
        self.opened = self.open()

    def write(self, work: Callable[..., int], *arguments: Any) -> None:
        """Run one of the functions of `infer.predictor` and say what it wrote."""
        from teracon_fast.data.layout import read_about
        from teracon_fast.data.user_input import Inputs
        from teracon_fast.infer.open import task_number

        run, unseen, task = self.opened, self.unseen, 1
        if self.input.is_dir():
            task = task_number([meta.name for meta in read_about(self.input).tasks], self.input_task, self.input)
        policy: Any = unseen
        inputs = Inputs(self.input, run.items, run.length, policy, task, self.user_column, self.items_column)
        with counting(work.__name__, inputs.total()) as advance:
            users = work(run, inputs, self.output, *arguments, batch_size=self.batch_size, progress=advance)
        say(f"wrote {self.output}: {users:,} users, {self.output.stat().st_size / 2**20:.1f} MiB")
        if inputs.unseen_items:
            fate = {"pad": "became the pad", "drop": "were dropped", "bucket": "became buckets"}[unseen]
            say(f"{inputs.unseen_items:,} items unknown to the run, of {inputs.unseen_users:,} users, {fate}")


def _flat(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the fields of its first parameter, a class of options, in place of that parameter."""
    first, *own = inspect.signature(command).parameters.values()
    kind = first.annotation
    shared = [
        inspect.Parameter(
            entry.name, inspect.Parameter.KEYWORD_ONLY, annotation=entry.type,
            default=inspect.Parameter.empty if entry.default is MISSING else entry.default,
        )
        for entry in fields(kind) if entry.init
    ]  # fmt: skip

    def flat(**given: Any) -> None:
        options = kind(**{entry.name: given.pop(entry.name) for entry in shared})
        command(options, **given)

    parameters = [entry.replace(kind=inspect.Parameter.KEYWORD_ONLY) for entry in own]
    required = [entry for entry in shared if entry.default is inspect.Parameter.empty]
    flat.__doc__ = command.__doc__
    flat.__signature__ = inspect.Signature([*required, *parameters, *(entry for entry in shared if entry not in required)])  # type: ignore[attr-defined]
    flat.__annotations__ = {entry.name: entry.annotation for entry in [*shared, *parameters]}
    return flat


@_flat
def evaluate(
    options: RunOptions,
    data: Annotated[Path | None, typer.Option(help="Prepared data; default: the data that the run was trained on.")] = None,
    split: Annotated[str, typer.Option(help="Samples to use: test, valid or train.")] = "test",
) -> None:
    """Measure every task of a trained run: the last row of R, with all metrics."""
    from teracon_fast.infer.measure import measure

    run = options.open()
    policy: Any = options.unseen
    with ConsoleObserver(console(stderr=True)) as observer:
        found = measure(run, data, split, options.batch_size, observer.on_evaluate, policy, partial(say, stderr=True))
    names = list(dict.fromkeys(name for metrics in found.values() for name in metrics))
    rows = [
        [f"T{task.number} {task.name}", *(f"{found[task.number][name]:.4f}" if name in found[task.number] else "" for name in names)]
        for task in run.tasks
    ]
    table(f"{split} metrics after {run.tasks[-1]}", ["task", *names], rows)


@_flat
def recommend(
    options: UserOptions,
    task: Annotated[str, typer.Option(help="Task to recommend labels of, by name or number.")] = "1",
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Labels per user.")] = 10,
    exclude_seen: Annotated[bool, typer.Option("--exclude-seen", help="Leave out items of the user's sequence.")] = False,
    long: Annotated[bool, typer.Option("--long", help="One row per recommendation instead of one per user.")] = False,
) -> None:
    """Write the best items (or other labels) of a task for each user, with scores."""
    from teracon_fast.infer import predictor

    options.write(predictor.recommend, task, top_k, exclude_seen, long)


@_flat
def predict(
    options: UserOptions,
    task: Annotated[str, typer.Option(help="Task to predict the label of, by name or number.", show_default=False)],
) -> None:
    """Write the probability of each label of a task with few labels, for each user."""
    from teracon_fast.infer import predictor

    options.write(predictor.predict, task)


@_flat
def embed(
    options: UserOptions,
    task: Annotated[str, typer.Option(help="Tasks by name or number, separated by commas, or all.")] = "all",
) -> None:
    """Write user representations: a list of float32 per task."""
    from teracon_fast.infer import predictor

    everything = [str(entry.number) for entry in options.opened.tasks]
    options.write(predictor.embed, everything if task == "all" else task.split(","))
