"""What an experiment trains: the configuration of a run for each row of its table and each seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from teracon_fast.config import RunConfig, load_config
from teracon_fast.data import TaskSequence, check_tasks, open_dataset, split_task
from teracon_fast.data.order import NOISE, arranged, parse_order, with_noise
from teracon_fast.errors import CheckpointError, ConfigError
from teracon_fast.methods.plugins import find_method
from teracon_fast.reproduce.experiments import EXPERIMENTS, TITLES, Experiment, Variant
from teracon_fast.reproduce.paper import Paper, paper_of
from teracon_fast.train.checkpoint import RunState
from teracon_fast.train.folder import fingerprint

QUICK = {"model.channels": 8, "model.dilations": [1, 2], "epochs": 1, "tensorboard": False}
# Settings that an experiment makes for each of its runs.
OWN_SETTINGS = ("method", "order", "noise_at", "num_tasks", "seed", "test_every_epoch")


@dataclass(frozen=True)
class Choices:
    """What a user asks for.

    Attributes:
        data: prepared folder. output: folder of runs, tables and plots.
        methods: None: those of the paper.
        order: "original", "reversed" or "1,3,2"; None: the experiment's own.
        noise_at: position of the noisy task, from 1; None: the paper's, in experiments that have a noisy task.
        held_back: number of the task that Figure 2 adapts to; None: the fourth, or the last.
        seeds: one run each.
        preset: of `config.PRESETS`; None: that of the paper's data set, else the published program's settings.
        config: TOML file, as for `teracon train`.
        overrides: dotted names of the configuration to values, `conure.block` for example.
        plugins: Python files that register methods.
        quick: a tiny network and one epoch. drop_weights: delete the weights of finished runs.
    """

    data: Path
    output: Path
    methods: tuple[str, ...] | None = None
    order: str | None = None
    noise_at: int | None = None
    held_back: int | None = None
    seeds: tuple[int, ...] = (0,)
    preset: str | None = None
    config: Path | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    plugins: tuple[Path, ...] = ()
    quick: bool = False
    drop_weights: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a table: one run per seed.

    Attributes:
        label: what the row is called. method: name. variant: of the experiment. shown: what the variant is called.
        order: numbers of the tasks, NOISE for the noisy one.
        runs: one per seed. single: SinMo in the original order. plain: the same without the noisy task. Empty if not needed.
    """

    label: str
    method: str
    variant: Variant
    shown: str
    order: tuple[int, ...]
    runs: tuple[RunConfig, ...]
    single: tuple[RunConfig, ...] = ()
    plain: tuple[RunConfig, ...] = ()


@dataclass(frozen=True)
class Plan:
    """An experiment on a data set.

    Attributes:
        experiment: which one. output: folder of its files. config: settings that all runs share.
        dataset: as prepared. rows: of the table. runs: all that the rows need, without duplicates.
        paper: the paper's results on this data set; None: it is another one.
        seeds: of each row.
        file_name: of the page and tables, without suffix: the experiment, then order and positions if they were given.
    """

    experiment: Experiment
    output: Path
    config: RunConfig
    dataset: TaskSequence
    rows: tuple[Row, ...]
    runs: tuple[RunConfig, ...]
    paper: Paper | None
    seeds: tuple[int, ...]
    file_name: str


def make_plan(name: str, choices: Choices) -> Plan:
    """The runs and rows of an experiment. Trains nothing and writes nothing.

    Raises:
        ConfigError: unknown experiment or method, an order or position that the data set does not have, or bad settings.
    """
    if name not in EXPERIMENTS:
        raise ConfigError(f"got {name!r}, expected one of {', '.join(EXPERIMENTS)}")
    what, seeds = EXPERIMENTS[name], choices.seeds
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) >= 2**63:
        raise ConfigError(f"seeds: got {list(seeds)}, expected different non-negative integers, at least one")
    if choices.held_back is not None and not what.held_back:
        raise ConfigError(f"held-back: got task {choices.held_back} for {name}, expected it with figure2 only")
    methods = what.methods if choices.methods is None else choices.methods
    if not methods or len(set(methods)) < len(methods):
        raise ConfigError(f"methods: got {', '.join(methods) or 'none'}, expected each once, at least one")
    dataset = open_dataset(choices.data)
    paper = paper_of(dataset)
    shared = _settings(choices, paper)
    for setting in OWN_SETTINGS:
        if (got := getattr(shared, setting)) != RunConfig.model_fields[setting].default:
            raise ConfigError(f"configuration: got {setting} {got!r}, expected none: the experiment sets it for each run")
    original = parse_order("original", len(dataset.tasks))
    wants_single = (what.single or "sinmo" in methods) and not what.is_figure

    def runs(config: RunConfig, order: tuple[int, ...], tested: tuple[int, ...] = ()) -> tuple[RunConfig, ...]:
        return tuple(_new_run(config, dataset, order, seed, tested) for seed in seeds)

    single = runs(_settings(choices, paper, "sinmo"), original) if wants_single else ()
    rows = []
    for variant in what.variants:
        order = _order(what, variant, choices, dataset, paper)
        positions = tuple(range(1, len(order) + 1))
        tested = {"none": (), "last": positions[-1:], "all": positions}[what.watch]
        shown = choices.order if variant.reverse and choices.order else variant.label
        for method in methods:
            config = _settings(choices, paper, method, variant)
            title = TITLES.get(method, method)
            plain = runs(config, tuple(number for number in order if number != NOISE)) if what.plain else ()
            label = f"{title} ({shown})" if shown else title
            rows.append(Row(label, method, variant, shown, order, runs(config, order, tested), single, plain))
    needed = [run for row in rows for run in (*row.single, *row.plain, *row.runs)]
    used = {number for row in rows for number in row.order} | ({*original} if single else set())
    tasks = arranged(dataset, sorted(used, key=lambda number: (number == NOISE, number)), seeds[0])
    check_tasks(tasks, [split_task(task, shared.split_by, seeds[0]) for task in tasks.tasks])
    file_name = name if choices.order in (None, "original") else f"{name}_{str(choices.order).replace(' ', '').replace(',', '-')}"
    file_name += "" if choices.noise_at is None else f"_noise{choices.noise_at}"
    file_name += "" if choices.held_back is None else f"_task{choices.held_back}"
    all_runs = tuple({run.run: run for run in needed}.values())
    return Plan(what, choices.output, shared, dataset, tuple(rows), all_runs, paper, seeds, file_name)


def _settings(choices: Choices, paper: Paper | None, method: str | None = None, variant: Variant | None = None) -> RunConfig:
    """The configuration of a method's runs, or of all methods, before order and seed are set."""
    preset = choices.preset or (paper.key if paper is not None else None)
    given = {**(QUICK if choices.quick else {}), **choices.overrides, "data": choices.data, "run": choices.output}
    if choices.plugins:
        given["plugins"] = [str(path.resolve()) for path in choices.plugins]
    if method is None:
        return load_config(preset, choices.config, given)
    find_method(method)
    own = {f"{method}.{name}": value for name, value in (variant.options if variant else {}).items()}
    config = load_config(preset, choices.config, {**given, **own, "method": method})
    return config.model_copy(update={"options": {name: table for name, table in config.options.items() if name == method}})


def _new_run(
    config: RunConfig, dataset: TaskSequence, order: tuple[int, ...], seed: int, tested: tuple[int, ...]
) -> RunConfig:
    """The configuration of one run, in OUTPUT/runs/METHOD-ORDER-seedN-HASH: runs with other settings have other folders."""
    original = range(1, len(dataset.tasks) + 1)
    numbers = [number for number in order if number != NOISE]
    rest = [number for number in original if number not in numbers]
    config = config.model_copy(update={
        "seed": seed, "test_every_epoch": tested,
        "order": "original" if [*numbers, *rest] == [*original] else ",".join(map(str, [*numbers, *rest])),
        "noise_at": order.index(NOISE) + 1 if NOISE in order else None, "num_tasks": len(order) if rest else None,
    })  # fmt: skip
    method = config.new_method(dataset.num_items)
    for number in order:
        method.configure(config.task_options(number))
    # The result view says nothing of the device, which may not exist here.
    anywhere = config.model_copy(update={"device": "cpu", "backend": "torch"})
    view = fingerprint(anywhere, arranged(dataset, order, seed), order, len(order))["result"]
    text = ".".join("n" if number == NOISE else str(number) for number in order)
    return config.model_copy(update={"run": config.run / "runs" / f"{config.method}-{text}-seed{seed}-{_digest(view)}"})


def _digest(view: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(view, sort_keys=True).encode()).hexdigest()[:10]


def is_finished(run: Path) -> bool:
    """Whether a run of a plan is finished with the settings that its folder is named after, on whatever device and backend."""
    if not (run / "results.json").is_file():
        return False
    try:
        state = RunState.load(run)
    except CheckpointError:
        return False  # the run itself will say what is wrong with its folder
    return state is not None and state.training is None and run.name.endswith(_digest(state.fingerprint["result"]))


def _order(
    what: Experiment, variant: Variant, choices: Choices, dataset: TaskSequence, paper: Paper | None
) -> tuple[int, ...]:
    count = len(dataset.tasks)
    # Table 3 compares the original order with another one, the reversed by default.
    text = (choices.order or "reversed") if variant.reverse else "original" if what.columns else choices.order or "original"
    order: Sequence[int] = parse_order(text, count)
    if what.held_back:
        if count < 2:
            raise ConfigError(f"{what.name}: the data set has {count} task, expected at least 2, one of them held back")
        held_back = min(4, count) if choices.held_back is None else choices.held_back
        if not 2 <= held_back <= count:
            raise ConfigError(f"held-back: got task {held_back}, expected 2 to {count}")
        order = order[: order.index(held_back) + 1]
    position = choices.noise_at
    if position is None and variant.noise:
        position = paper.noise_at if paper is not None and paper.noise_at else max(2, len(order) // 2 + 1)
    if position is None:
        return tuple(order)
    if what.held_back and position > len(order):
        raise ConfigError(f"noise-at: got {position}, expected 2 to {len(order)}: the held-back task stays last")
    return with_noise(order, position)
