"""`teracon train`: every value of the configuration is also a flag, made from the pydantic model and the methods' options.

A TOML name becomes a flag by writing dashes: `first.batch_size` is `--first-batch-size`, `conure.pruning` is
`--conure-pruning`; the section `model` is left out (`--channels`). A setting of tasks also has a short flag that sets it for
every task (`--lr`), and `--task 2.lr=1e-4` sets it for one task. Later ones win: preset, TOML file, --lr, --first-lr and
--later-lr, --task, --set.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from teracon_fast import config as configuration
from teracon_fast.cli.console import say, table
from teracon_fast.errors import ConfigError
from teracon_fast.methods import METHODS

PANELS = {"": "Run", "first": "First task (T1)", "later": "Later tasks (T2, T3, ...)", "model": "Network"}
PANELS |= {method: f"Method {method}" for method in METHODS}


def flag(name: str) -> str:
    """The command-line flag of a dotted configuration name."""
    return "--" + {"plugins": "plugin"}.get(name, name).removeprefix("model.").replace(".", "-").replace("_", "-")


def collect(values: dict[str, Any], task: list[str], own: list[str]) -> dict[str, Any]:
    """Overrides for `load_config` from the flags that were given.

    Args:
        values: names of the configuration to what was given; None, or no plugins: not given.
        task: texts such as "2.lr=1e-4". own: texts such as "my_method.width=8".

    Raises:
        ConfigError: a text of `task` or `own` has another form.
    """
    overrides = {name: value for name, value in values.items() if value is not None and value != []}
    for text in task:
        name, separator, value = text.partition("=")
        if not separator or name.count(".") != 1 or not name.split(".")[0].isdigit():
            raise ConfigError(f"--task: got {text!r}, expected NUMBER.NAME=VALUE, for example 2.lr=1e-4")
        overrides[f"task.{name}"] = value
    for text in own:
        name, separator, value = text.partition("=")
        if not (separator and name):
            raise ConfigError(f"--set: got {text!r}, expected NAME=VALUE, for example conure.block=pre-activation")
        overrides[name] = value
    return overrides


def seeds_of(text: str) -> tuple[int, ...]:
    """The seeds of "0,1,2"."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise ConfigError(f"--seeds: got {text!r}, expected different numbers separated by commas, for example 0,1,2")
    return tuple(map(int, parts))


@contextmanager
def exit_when_stopped() -> Iterator[None]:
    """Exit with the code of the signal that stopped a run."""
    from teracon_fast.train.folder import RunStopped

    try:
        yield
    except RunStopped as stopped:
        say(str(stopped), stderr=True)
        raise typer.Exit(128 + stopped.signum) from None


def run_training(
    config: Path | None, preset: str | None, fresh: bool, task: list[str], own: list[str], seeds: str | None, jobs: int,
    dry_run: bool, report: bool, values: dict[str, Any],
) -> None:  # fmt: skip
    """Merge the configuration, train (or resume), print R and BWT, draw the plots."""
    settings = configuration.load_config(preset, config, collect(values, task, own))
    if dry_run:
        typer.echo(settings.to_toml(), nl=False)
        return
    if seeds is not None:
        _train_seeds(settings, seeds_of(seeds), jobs, fresh, report)
        return
    from teracon_fast.cli.progress import ConsoleObserver
    from teracon_fast.train.run import train

    with exit_when_stopped(), ConsoleObserver() as observer:
        train(settings, observer, fresh=fresh)
    _show(settings.run, report)


def _show(run: Path, report: bool) -> None:
    """The results of a finished run: a table, and the report where it is wanted."""
    from teracon_fast.report.run_report import load_run, summary_rows, write_report

    table("Test metrics", *summary_rows(load_run(run)))
    if not report:
        return
    try:
        page = write_report(run)[0]
    except ImportError:
        say("no plots: matplotlib is not installed")
    else:
        say(f"plots and tables: {page}")


def _train_seeds(settings: configuration.RunConfig, seeds: tuple[int, ...], jobs: int, fresh: bool, report: bool) -> None:
    """A run for each seed, RUN/seed0, RUN/seed1, ..., each in a process of its own."""
    from teracon_fast.cli.reproduce import RunLines
    from teracon_fast.reproduce.jobs import run_jobs
    from teracon_fast.train.folder import delete_old_run

    configs = [settings.model_copy(update={"run": settings.run / f"seed{seed}", "seed": seed}) for seed in seeds]
    if fresh:
        for config in configs:
            config.run.mkdir(parents=True, exist_ok=True)
            delete_old_run(config.run)
    with exit_when_stopped(), RunLines() as shown:
        failed = run_jobs(configs, jobs, shown.report)
    for config in configs:
        if config not in failed:
            say(f"seed {config.seed}: {config.run}")
            _show(config.run, report)
    if failed:
        raise typer.Exit(1)


def _parameter(name: str, option: Any, kind: Any, default: Any = None) -> inspect.Parameter:
    annotation = Annotated[kind, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _shown(default: Any) -> str | bool:
    if default is None or default == ():
        return False
    return ",".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)


def _build() -> Callable[..., None]:
    """The command: a function whose signature has one parameter a configuration value."""
    names: dict[str, str] = {}  # parameter -> dotted name
    presets = ", ".join(configuration.PRESETS)
    parameters = [
        _parameter("config", typer.Argument(help="TOML file with the configuration.", show_default=False), Path | None),
        _parameter("preset", typer.Option("--preset", help=f"Start from {presets}."), str | None),
        _parameter("task", typer.Option("--task", metavar="N.NAME=VALUE", help="A setting of one task."), list[str], []),
        _parameter("own", typer.Option("--set", metavar="NAME=VALUE", help="Any value by its TOML name."), list[str], []),
        _parameter("seeds", typer.Option("--seeds", help="A run for each seed (0,1,2): RUN/seed0, RUN/seed1, ..."), str | None),
        _parameter("jobs", typer.Option("--jobs", min=1, help="With --seeds: runs at a time."), int, 1),
        _parameter("fresh", typer.Option("--fresh", help="Start over: what RUN holds is deleted."), bool, False),
        _parameter("dry_run", typer.Option("--dry-run", help="Print the merged configuration and stop."), bool, False),
        _parameter("report", typer.Option("--report/--no-report", help="Draw plots at the end."), bool, True),
    ]
    own = [parameter.name for parameter in parameters]
    for option in configuration.FLAGS:
        section, _, short = option.name.rpartition(".")
        text = option.help + (f" ({', '.join(option.choices)})" if option.choices else "")
        text = text.replace("[", "\\[")
        kind = str if option.type == list[int] else option.type  # 1,4,1,4

        def add(name: str, panel: str, default: Any, text: str = text, kind: Any = kind) -> None:
            parameter = name.replace(".", "__")
            names[parameter] = name
            spelled = flag(name) + (f"/{flag('no_' + name)}" if kind is bool else "")
            info = typer.Option(spelled, help=text, rich_help_panel=panel, show_default=_shown(default))
            parameters.append(_parameter(parameter, info, kind | None))

        add(option.name, PANELS[section], option.default)
        if section == "first":
            add(short, "Every task", None)

    def train(**given: Any) -> None:
        mine = {key: given.pop(key) for key in own}
        run_training(**mine, values={names[key]: value for key, value in given.items()})

    train.__doc__ = """Train a sequence of tasks by any method; an interrupted run resumes automatically.

    Settings come from a preset, a TOML file and flags, later ones winning: --lr sets a value for every task, --first-lr
    and --later-lr for some, --task 2.lr=1e-4 for one.
    """
    train.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    train.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return train


train = _build()
