"""`teracon train`: every value of the configuration is also a flag, made from the pydantic model.

A TOML name becomes a flag by writing dashes: `first.batch_size` is `--first-batch-size`; the section `model` is left out
(`--channels`). A setting that `[first]` and `[later]` share also has a short flag that sets it for every task (`--lr`), and
`--task 2.lr=1e-4` sets it for one task. Later ones win: preset, TOML file, --lr, --first-lr / --later-lr, --task.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_origin

import typer

from teracon_fast import config as configuration
from teracon_fast.cli.console import say, table
from teracon_fast.errors import ConfigError

SHARED = tuple(configuration.TaskConfig.model_fields)
PANELS = {"first": "First task (T1)", "later": "Later tasks (T2, T3, ...)", "model": "Network", "": "Run"}


def flag(name: str) -> str:
    """The command-line flag of a dotted configuration name."""
    return "--" + name.removeprefix("model.").replace(".", "-").replace("_", "-")


def collect(values: dict[str, Any], task: list[str], preset: str | None, path: Path | None) -> dict[str, Any]:
    """Overrides for `load_config` from the flags that were given.

    Args:
        values: dotted configuration name, or a name of SHARED (for every task), to what was given; None: not given.
        task: texts such as "2.lr=1e-4".
        preset, path: where `[[task]]` tables may come from; a value for every task replaces theirs too.

    Raises:
        ConfigError: a text of `task` has another form.
    """
    given = {name: value for name, value in values.items() if value is not None}
    overrides: dict[str, Any] = {}
    tables = _task_tables(preset, path)
    for name in [name for name in SHARED if name in given]:
        value = given.pop(name)
        overrides |= {f"first.{name}": value, f"later.{name}": value}
        for number in [number for number, entries in tables.items() if name in entries]:
            overrides[f"task.{number}.{name}"] = given.get(f"{'first' if number == 1 else 'later'}.{name}", value)
    overrides |= given
    for text in task:
        name, separator, value = text.partition("=")
        if not separator or name.count(".") != 1 or not name.split(".")[0].isdigit():
            raise ConfigError(f"--task: got {text!r}, expected NUMBER.NAME=VALUE, for example 2.lr=1e-4")
        overrides[f"task.{name}"] = value
    return overrides


def _task_tables(preset: str | None, path: Path | None) -> dict[int, dict[str, Any]]:
    tables: dict[int, dict[str, Any]] = {}
    for source in (configuration.read_preset(preset) if preset else {}, configuration.read_toml(path) if path else {}):
        entries = source.get("task", [])
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and isinstance(entry.get("number"), int):
                tables.setdefault(entry["number"], {}).update(entry)
    return tables


def run_training(
    config: Path | None,
    preset: str | None,
    fresh: bool,
    task: list[str],
    dry_run: bool,
    report: bool,
    values: dict[str, Any],
) -> None:
    """Merge the configuration, train (or go on), print R and BWT, draw the pictures."""
    settings = configuration.load_config(preset, config, collect(values, task, preset, config))
    if dry_run:
        typer.echo(settings.to_toml(), nl=False)
        return
    from teracon_fast.cli.progress import ConsoleObserver
    from teracon_fast.report.run_report import load_run, summary_rows, write_report
    from teracon_fast.train import run as continual
    from teracon_fast.train.folder import RunStopped

    try:
        with ConsoleObserver() as observer:
            continual.train(settings, observer, fresh=fresh)
    except RunStopped as stopped:
        say(str(stopped), stderr=True)
        raise typer.Exit(128 + stopped.signum) from None
    table("Test metrics", *summary_rows(load_run(settings.run)))
    if not report:
        return
    try:
        page = write_report(settings.run)[0]
    except ImportError:
        say("no pictures: matplotlib is not installed")
    else:
        say(f"pictures and tables: {page}")


def _parameter(name: str, option: typer.models.OptionInfo, kind: Any, default: Any = None) -> inspect.Parameter:
    annotation = Annotated[kind, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _shown(default: Any) -> str | bool:
    if default is None:
        return False
    return ",".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)


def _build() -> Callable[..., None]:
    """The command: a function whose signature has one parameter a configuration value."""
    names: dict[str, str] = {}  # parameter -> dotted name
    parameters = [
        _parameter("config", typer.Argument(help="TOML file with the configuration.", show_default=False), Path | None),
        _parameter(
            "preset", typer.Option("--preset", help=f"Start from {', '.join(configuration.PRESETS)}."), str | None
        ),
        _parameter(
            "task", typer.Option("--task", metavar="N.NAME=VALUE", help="A setting of one task."), list[str], []
        ),
        _parameter("fresh", typer.Option("--fresh", help="Begin anew: what RUN holds is overwritten."), bool, False),
        _parameter("dry_run", typer.Option("--dry-run", help="Print the merged configuration and stop."), bool, False),
        _parameter("report", typer.Option("--report/--no-report", help="Draw pictures at the end."), bool, True),
    ]
    shared_help: dict[str, tuple[str, Any]] = {}
    for option in configuration.options():
        parameter = option.name.replace(".", "__")
        names[parameter] = option.name
        section, _, short = option.name.rpartition(".")
        kind = str if get_origin(option.type) is list else option.type
        text = option.help + (f" ({', '.join(option.choices)})" if option.choices else "")
        text = text.replace("[", "\\[")
        names_of_flag = flag(option.name) + (f"/{flag('no_' + option.name)}" if kind is bool else "")
        info = typer.Option(
            names_of_flag, help=text, rich_help_panel=PANELS[section], show_default=_shown(option.default)
        )
        parameters.append(_parameter(parameter, info, kind | None))
        if section == "first":
            shared_help[short] = (text, kind)
    for short, (text, kind) in shared_help.items():
        names[short] = short
        info = typer.Option(flag(short), help=text, rich_help_panel="Every task", show_default=False)
        parameters.append(_parameter(short, info, kind | None))

    def train(**given: Any) -> None:
        own = {key: given.pop(key) for key in ("config", "preset", "fresh", "task", "dry_run", "report")}
        values = {
            names[key]: _listed(value) if names[key] == "model.dilations" else value for key, value in given.items()
        }
        run_training(**own, values=values)

    train.__doc__ = """Train a sequence of tasks; a run folder that was interrupted goes on by itself.

    Settings come from a preset, a TOML file and flags, later ones winning: --lr sets a value for every task, --first-lr
    and --later-lr for some, --task 2.lr=1e-4 for one.
    """
    train.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    train.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return train


def _listed(text: str | None) -> Any:
    """ "1,4,1,4" as a list; anything else as it is, for the configuration to refuse."""
    if text is None:
        return None
    parts = text.strip("[] ").split(",")
    return [int(part) for part in parts] if all(part.strip().isdigit() for part in parts) else text


train = _build()
