"""What is to be trained: cells, each a method over a sequence of tasks with a seed, and all that decides what they come to."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import sys
import traceback
import typing
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from teracon_fast.config import RunConfig, load_config
from teracon_fast.data import TaskData, TaskSequence, check_tasks, open_dataset, split_task
from teracon_fast.data.order import NOISE, arranged, parse_order, with_noise
from teracon_fast.errors import ConfigError
from teracon_fast.methods import HAT, METHODS, Conure, Method, Sizes, Teracon
from teracon_fast.methods.conure import PRUNING
from teracon_fast.methods.sequence import Settings
from teracon_fast.reproduce.experiments import TITLES, Experiment, Variant, experiment
from teracon_fast.reproduce.paper import Paper, paper_of

QUICK = {"model.channels": 8, "model.dilations": [1, 2], "first.epochs": 1, "later.epochs": 1}


@dataclass(frozen=True)
class Choices:
    """What a user asks for.

    Attributes:
        data: prepared folder. output: where cells, tables and pictures go.
        methods: None: those of the paper.
        order: "original", "reversed" or "1,3,2"; None: the experiment's own.
        noise_at: place of the noisy task from 1; None: only where the experiment has one, and there as in the paper.
        held_back: number of the task that Figure 2 adapts to; None: the fourth, or the last.
        seeds: each is a run of its own.
        preset: of `config.PRESETS`; None: that of the paper's data set, or else the published program's settings.
        config: TOML file, as of `teracon train`.
        overrides: dotted names of the configuration to values.
        options: method -> arguments of its constructor.
        plugins: Python files that add methods to `methods.METHODS`.
        quick: a tiny network and one epoch.
        keep_weights: of finished cells.
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
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    plugins: tuple[Path, ...] = ()
    quick: bool = False
    keep_weights: bool = False


@dataclass(frozen=True)
class Cell:
    """A method over a sequence of tasks with a seed.

    Attributes:
        method: name. options: of its constructor, sorted.
        order: task numbers from 1, 0 the noisy one.
        seed: of everything random.
        watch: places in the order, from 0, of tasks whose test metric is measured after every epoch.
    """

    method: str
    options: tuple[tuple[str, Any], ...]
    order: tuple[int, ...]
    seed: int
    watch: tuple[int, ...] = ()


@dataclass(frozen=True)
class Setup:
    """What all cells have in common; it is sent to other processes.

    Attributes:
        data, output: folders. config: settings. pruning: CONURE's ratios, a key of its `PRUNING`.
        plugins: see `Choices`. keep_weights: see `Choices`.
    """

    data: Path
    output: Path
    config: RunConfig
    pruning: str
    plugins: tuple[Path, ...] = ()
    keep_weights: bool = False

    def task_settings(self, number: int) -> Settings:
        """How a task is learnt, by its number in the data set: it is the same wherever the task stands."""
        config = self.config.later if number == NOISE else self.config.for_task(number)
        return Settings(
            config.lr, config.batch_size, config.epochs, config.patience, config.select,
            evaluate_batch_size=self.config.evaluate_batch_size,
        )  # fmt: skip

    def new_method(self, cell: Cell, num_items: int) -> Method:
        """The cell's method before its first task.

        Raises:
            ConfigError: an option is unknown, of another type than its annotation, or refused by the constructor; or the
                configuration holds what methods cannot follow.
        """
        kind, config = METHODS[cell.method], self.config
        model = config.model
        sizes = Sizes(num_items, model.channels, model.dilations, model.kernel_size, config.backend, config.algorithm)
        options = self._own_options(kind, cell.order) | _checked(cell.method, dict(cell.options))
        try:
            method = kind(sizes, **options)
        except TypeError as error:  # of a plugin: its constructor takes something else than sizes and settings
            raise ConfigError(f"{cell.method}: its constructor refuses sizes and {options}: {error}") from error
        if isinstance(method, Conure):
            for place in range(len(cell.order)):
                method.ratio(place)
        return method

    def _own_options(self, kind: type[Method], order: Sequence[int]) -> dict[str, Any]:
        later = [self.config.later if number == NOISE else self.config.for_task(number) for number in order[1:]]
        if issubclass(kind, Conure):
            ratios = PRUNING[self.pruning]
            return {"pruning": tuple(ratios[-1 if number == NOISE else min(number, len(ratios)) - 1] for number in order)}
        if not issubclass(kind, Teracon | HAT):
            return {}
        scales = {task.s_max for task in (self.config.first, *later)}
        if len(scales) > 1 or len({task.c for task in later}) > 1:
            raise ConfigError("the configuration gives tasks different s_max or c, expected one for all tasks")
        options: dict[str, Any] = {"s_max": scales.pop()}
        if issubclass(kind, Teracon):
            alphas = tuple(task.alpha for task in later)
            options["alpha"] = alphas[0] if len(set(alphas)) == 1 else alphas or 0.7
            options["c"] = later[0].c if later else self.config.first.c
            options |= {name: getattr(self.config, name) for name in ("mask", "sampling", "student_mask")}
        return options


def _checked(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a method, known ones and of the types that its constructor is annotated with."""
    constructor = METHODS[method].__init__
    known = list(inspect.signature(METHODS[method]).parameters)[1:]  # behind sizes
    try:
        hints = typing.get_type_hints(constructor)
    except NameError:  # a plugin's, of names that only a type checker sees
        hints = {}
    for name, value in options.items():
        if name not in known:
            raise ConfigError(f"{method} has no setting {name!r}, expected one of {known}")
        hint = hints.get(name, Any)
        try:
            options[name] = TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False)).validate_python(value, strict=True)
        except PydanticUserError:  # no type that can be checked
            continue
        except ValidationError:
            raise ConfigError(f"{method}.{name}: got {value!r}, expected {inspect.formatannotation(hint)}") from None
    return options


def identity(setup: Setup, cell: Cell, dataset: TaskSequence) -> dict[str, Any]:
    """All that decides what a cell comes to, as JSON has it. How fast it is computed is not part of that.

    Args:
        dataset: arranged in the order of the cell.
    """
    method = setup.new_method(cell, dataset.num_items).settings()
    unrecorded = {name: value for name, value in cell.options if name not in method}
    code = _foreign_code(METHODS[cell.method])
    settings = [asdict(setup.task_settings(number)) for number in cell.order]
    found = {
        "method": {name: value for name, value in method.items() if name not in ("backend", "algorithm")},
        "order": cell.order,
        "seed": cell.seed,
        "watch": cell.watch,
        "split_by": setup.config.split_by,
        "settings": [{key: of_task[key] for key in of_task if key != "evaluate_batch_size"} for of_task in settings],
        "data": {
            "name": dataset.name, "num_items": dataset.num_items, "length": dataset.length,
            "tasks": [
                {
                    "name": task.name, "labels": task.num_labels, "samples": len(task.samples),
                    "check": _check(task, number == NOISE),
                }
                for number, task in zip(cell.order, dataset.tasks, strict=True)
            ],
        },
        **({"options": unrecorded} if unrecorded else {}),
        **({"code": code} if code else {}),
    }  # fmt: skip
    return dict(json.loads(json.dumps(found)))


@lru_cache(maxsize=64)
def _check(task: TaskData, noisy: bool) -> int:
    """A checksum of all that a task is: a data set that was prepared anew in the same folder is another one.

    Args:
        noisy: it is made from task 1, which has a checksum of its own: its samples are enough.
    """
    check = 0
    for array in (task.samples,) if noisy else (task.samples, task.groups, task.sequences):
        check = zlib.crc32(np.ascontiguousarray(array).data, check)
    return check


@lru_cache(maxsize=64)
def _foreign_code(kind: type[Method]) -> str:
    """A hash of the files of a method that is not this package's: once it is edited, it is another method. Else ""."""
    files = set()
    for base in kind.__mro__:
        if base.__module__.split(".")[0] not in ("teracon_fast", "torch", "abc", "builtins"):
            try:
                files.add(inspect.getsourcefile(base) or "")
            except TypeError:  # made in an interactive session
                continue
    texts = [Path(file).read_bytes() for file in sorted(files) if Path(file).is_file()]
    return hashlib.sha256(b"".join(texts)).hexdigest()[:16] if texts else ""


def cell_folder(setup: Setup, cell: Cell, dataset: TaskSequence) -> Path:
    """OUTPUT/cells/METHOD-ORDER-seedN-HASH: cells of other settings have other folders.

    Args:
        dataset: as `identity`.
    """
    text = json.dumps(identity(setup, cell, dataset), sort_keys=True)
    order = ".".join("n" if number == NOISE else str(number) for number in cell.order)
    return setup.output / "cells" / f"{cell.method}-{order}-seed{cell.seed}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


@dataclass(frozen=True)
class Row:
    """A line of a table: the same cell once for each seed.

    Attributes:
        label: what it is called. method: by name. variant: of the experiment. shown: what the variant is called.
        cells: one a seed. single: SinMo's, in the original order. plain: without the noisy task. Empty where not needed.
    """

    label: str
    method: str
    variant: Variant
    shown: str
    cells: tuple[Cell, ...]
    single: tuple[Cell, ...] = ()
    plain: tuple[Cell, ...] = ()


@dataclass(frozen=True)
class Plan:
    """An experiment on a data set.

    Attributes:
        experiment: which. setup: of all cells. dataset: as prepared. rows: of its tables. cells: all that they need, each once.
        paper: what the paper has of this data set; None: it is another one.
        seeds: of each row.
        file_name: of its page and tables, without an ending: the experiment, and behind it an order or place that was asked for.
    """

    experiment: Experiment
    setup: Setup
    dataset: TaskSequence
    rows: tuple[Row, ...]
    cells: tuple[Cell, ...]
    paper: Paper | None
    seeds: tuple[int, ...]
    file_name: str

    def arranged(self, cell: Cell) -> TaskSequence:
        """The data set in the order of a cell."""
        return arranged(self.dataset, cell.order, cell.seed)

    def folder(self, cell: Cell) -> Path:
        """Where a cell is."""
        return cell_folder(self.setup, cell, self.arranged(cell))


def make_plan(name: str, choices: Choices) -> Plan:
    """What an experiment trains.

    Raises:
        ConfigError: unknown experiment or method, an order or place that the data set does not have, or bad settings.
    """
    what = experiment(name)
    for plugin in choices.plugins:
        load_plugin(plugin)
    if not choices.seeds or len(set(choices.seeds)) < len(choices.seeds) or min(choices.seeds) < 0:
        raise ConfigError(f"seeds: got {list(choices.seeds)}, expected different non-negative integers, at least one")
    methods = what.methods if choices.methods is None else choices.methods
    for method in (*methods, *choices.options):
        if method not in METHODS:
            raise ConfigError(f"got method {method!r}, expected one of {', '.join(METHODS)}")
        kind: Any = METHODS[method]
        if not (inspect.isclass(kind) and issubclass(kind, Method) and not inspect.isabstract(kind)):
            lacks = f" without {', '.join(sorted(kind.__abstractmethods__))}" if inspect.isabstract(kind) else ""
            raise ConfigError(f"METHODS[{method!r}]: got {kind}{lacks}, expected a subclass of Method that implements all of it")
    if not methods or len(set(methods)) < len(methods):
        raise ConfigError(f"methods: got {', '.join(methods) or 'none'}, expected each once, at least one")
    for method, options in choices.options.items():
        _checked(method, dict(options))  # also of methods that this experiment does not train
    if choices.held_back is not None and not what.held_back:
        raise ConfigError(f"held-back: got task {choices.held_back} for {name}, expected it with figure2 only")
    dataset = open_dataset(choices.data)
    paper = paper_of(dataset)
    setup = _setup(choices, paper)
    orders = [_order(what, variant, choices, dataset, paper) for variant in what.variants]
    rows = [
        _row(what, variant, order, method, methods, choices, dataset)
        for variant, order in zip(what.variants, orders, strict=True)
        for method in methods
    ]
    wanted = [cell for row in rows for cell in (*row.single, *row.plain, *row.cells)]
    cells = tuple(dict.fromkeys(wanted))
    for cell in cells:
        setup.new_method(cell, dataset.num_items)  # refuses bad options before anything is trained
    used = {number for cell in cells for number in cell.order}
    tasks = arranged(dataset, [*sorted(used - {NOISE}), *([NOISE] if NOISE in used else [])], choices.seeds[0])
    check_tasks(tasks, [split_task(task, setup.config.split_by, choices.seeds[0]) for task in tasks.tasks])
    return Plan(what, setup, dataset, tuple(rows), cells, paper, choices.seeds, _file_name(name, choices))


def _file_name(name: str, choices: Choices) -> str:
    order = "" if choices.order in (None, "original") else f"_{str(choices.order).replace(' ', '').replace(',', '-')}"
    noise = "" if choices.noise_at is None else f"_noise{choices.noise_at}"
    held_back = "" if choices.held_back is None else f"_task{choices.held_back}"
    return f"{name}{order}{noise}{held_back}"


def _setup(choices: Choices, paper: Paper | None) -> Setup:
    preset = choices.preset or (paper.key if paper is not None else None)
    given = {**(QUICK if choices.quick else {}), **choices.overrides}
    config = load_config(preset, choices.config, {**given, "data": choices.data, "run": choices.output})
    if config.precision != "fp32" or config.cuda_graphs or config.parity != "official":
        raise ConfigError(
            f"got precision {config.precision!r}, cuda_graphs {config.cuda_graphs} and parity {config.parity!r}, "
            "expected 'fp32', False and 'official': the methods have no others"
        )
    if config.seed or config.num_tasks is not None:
        raise ConfigError(
            f"configuration: got seed {config.seed} and num_tasks {config.num_tasks}, expected neither: experiments take their "
            "seeds from --seeds, and all tasks"
        )
    pruning = "ml" if preset == "ml" else "ttl"
    return Setup(choices.data, choices.output, config, pruning, choices.plugins, choices.keep_weights)


def _order(
    what: Experiment, variant: Variant, choices: Choices, dataset: TaskSequence, paper: Paper | None
) -> tuple[int, ...]:
    count = len(dataset.tasks)
    # Table 3 compares the original order with another one, the reversed if none is asked for.
    text = (choices.order or "reversed") if variant.reverse else "original" if what.columns else choices.order or "original"
    order = parse_order(text, count)
    if what.held_back:
        if count < 2:
            raise ConfigError(f"{what.name}: the data set has {count} task, expected at least 2, one of them held back")
        held_back = min(4, count) if choices.held_back is None else choices.held_back
        if not 2 <= held_back <= count:
            raise ConfigError(f"held-back: got task {held_back}, expected 2 to {count}")
        order = order[: order.index(held_back) + 1]
    if choices.noise_at is None and not variant.noise:
        return order
    if choices.noise_at is not None:
        place = choices.noise_at
    else:
        place = paper.noise_at if paper is not None and paper.noise_at else max(2, len(order) // 2 + 1)
    if what.held_back and place > len(order):
        raise ConfigError(f"noise-at: got {place}, expected 2 to {len(order)}: the held-back task stays last")
    return with_noise(order, place)


def _row(
    what: Experiment, variant: Variant, order: tuple[int, ...], method: str, methods: Sequence[str], choices: Choices,
    dataset: TaskSequence,
) -> Row:  # fmt: skip
    original, quiet = parse_order("original", len(dataset.tasks)), tuple(number for number in order if number != NOISE)
    options = tuple(sorted({**choices.options.get(method, {}), **variant.options}.items()))
    places = tuple(range(len(order)))
    watch = {"none": (), "last": places[-1:], "all": places}[what.watch]
    single = what.single or "sinmo" in methods
    name = TITLES.get(method, method)
    shown = choices.order if variant.reverse and choices.order else variant.label
    label = f"{name} ({shown})" if shown else name
    sinmo = tuple(sorted(choices.options.get("sinmo", {}).items()))
    return Row(
        label, method, variant, shown,
        tuple(Cell(method, options, order, seed, watch) for seed in choices.seeds),
        tuple(Cell("sinmo", sinmo, original, seed) for seed in choices.seeds) if single and what.watch == "none" else (),
        tuple(Cell(method, options, quiet, seed) for seed in choices.seeds) if what.plain else (),
    )  # fmt: skip


def load_plugin(path: Path) -> None:
    """Run a Python file that adds methods to `methods.METHODS`; once in a process.

    Raises:
        ConfigError: there is no such Python file, or it fails.
    """
    path = path.resolve()
    name = f"teracon_plugin_{hashlib.sha256(str(path).encode()).hexdigest()[:10]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"plugin: got {path}, expected a Python file")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception):
            raise
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        raise ConfigError(f"plugin: {where}: {type(error).__name__}: {error}") from error
