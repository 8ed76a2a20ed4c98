"""Settings of a training run: TOML in and out, validated by pydantic, presets of the paper's Table 10.

A configuration is merged from a preset, a TOML file and single values (`first.lr`, `task.2.alpha`), later ones winning.
Tasks count from 1. `[first]` holds the settings of T1, `[later]` those of T2..TM, and each `[[task]]` table with a `number`
changes some of them for one task. A table with the name of a method, such as `[conure]`, holds its options
(`methods.Option`); per-task options may also stand in `[first]`, `[later]` and `[[task]]`. Needs the extra `train`.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.errors import PydanticUserError

from teracon_fast.data.order import NOISE, parse_order, with_noise
from teracon_fast.errors import ConfigError
from teracon_fast.methods import METHODS, DeclaredOption, Method, Sizes, load_plugin, options_of
from teracon_fast.methods.plugins import find_method

PRESETS = ("ttl", "ml", "naver", "demo")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


LearningRate = Annotated[float, Field(gt=0, description="learning rate of Adam")]
BatchSize = Annotated[int, Field(ge=1, description="samples a step")]
Epochs = Annotated[int, Field(ge=1, description="most epochs of a phase")]
Patience = Annotated[int, Field(ge=1, description="epochs without a better validation score before training stops")]
Select = Annotated[
    Literal["hit@1", "mrr@5"],
    Field(description="validation score that picks the best weights; tasks of at most 20 labels use accuracy"),
]


class _TaskSection(_Section):
    """A section of settings of tasks. Keys that it does not know are options of methods, checked by `RunConfig`."""

    options: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        own = {name: value for name, value in values.items() if name in cls.model_fields and name != "options"}
        return {**own, "options": {name: value for name, value in values.items() if name not in own}}

    def flat(self) -> dict[str, Any]:
        """The values that are set, options among them."""
        return {**self.model_dump(mode="json", exclude_none=True, exclude={"options"}), **self.options}


class TaskConfig(_TaskSection):
    """How one task is trained. The defaults are those of T1 in the published program."""

    lr: LearningRate = 1e-3
    batch_size: BatchSize = 32
    epochs: Epochs = 10
    patience: Patience = 5
    select: Select = "hit@1"


class LaterConfig(TaskConfig):
    """How T2..TM are trained. A value that is not given is that of the published program for them, whatever else is given."""

    lr: LearningRate = 1e-4
    batch_size: BatchSize = 1024
    epochs: Epochs = 100


class TaskOverride(_TaskSection):
    """Settings of one task that differ from `[first]` or `[later]`."""

    number: Annotated[int, Field(ge=1, description="the task, from 1")]
    lr: LearningRate | None = None
    batch_size: BatchSize | None = None
    epochs: Epochs | None = None
    patience: Patience | None = None
    select: Select | None = None


class ModelConfig(_Section):
    """Shape of the network. The defaults are the paper's."""

    channels: Annotated[int, Field(ge=1, description="f: width of item embeddings, task embeddings and layers")] = 256
    dilations: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1, description="dilation of each residual block")
    ] = (1, 4) * 4
    kernel_size: Annotated[int, Field(ge=2, description="taps of every convolution")] = 3


class RunConfig(_Section):
    """Everything that a training run needs to know."""

    data: Annotated[Path, Field(description="prepared data folder")]
    run: Annotated[Path, Field(description="run folder; created, or resumed when it exists")]
    method: Annotated[str, Field(description=f"one of {', '.join(METHODS)}, or of a plugin")] = "teracon"
    plugins: Annotated[tuple[Path, ...], Field(description="Python files that register methods of your own")] = ()
    num_tasks: Annotated[int | None, Field(ge=1, description="train only the first so many tasks, else all")] = None
    order: Annotated[
        str, Field(description="of the tasks: original, reversed, or numbers such as 1,3,2 (1 stays first)")
    ] = "original"
    noise_at: Annotated[
        int | None, Field(ge=2, description="put a noisy task at this position (paper, Section 4.3), from 2")
    ] = None
    test_every_epoch: Annotated[
        tuple[int, ...], Field(description="positions, from 1, of tasks whose test metrics are logged after each epoch")
    ] = ()
    seed: Annotated[
        int, Field(ge=0, lt=2**63, description="seed of initial weights, split, data order and user draws")
    ] = 0
    device: Annotated[str, Field(description="auto, cpu, cuda or cuda:N")] = "auto"
    backend: Annotated[str, Field(description="kernels: auto, torch, or one that `teracon doctor` lists")] = "auto"
    algorithm: Annotated[
        Literal["auto", "direct", "winograd"], Field(description="of convolutions: auto takes the faster; direct rounds less")
    ] = "auto"
    threads: Annotated[int | None, Field(ge=1, description="CPU threads; PyTorch's choice when not given")] = None
    precision: Annotated[Literal["fp32", "bf16"], Field(description="products of training steps; evaluation is fp32")] = "fp32"
    cuda_graphs: Annotated[
        bool, Field(description="replay training steps as CUDA graphs; needs --device cuda and --backend triton")
    ] = False
    split_by: Annotated[
        Literal["sample", "user"], Field(description="80/5/15 split over samples (published) or over users")
    ] = "sample"
    parity: Annotated[
        Literal["official", "paper"], Field(description="annealing of s: the published program's or Eq. 19")
    ] = "official"
    evaluate_batch_size: Annotated[int, Field(ge=1, description="sequences encoded at a time in evaluation")] = 1024
    log_every: Annotated[int, Field(ge=1, description="steps between two logged losses")] = 20
    checkpoint_every_seconds: Annotated[
        float, Field(gt=0, description="least seconds between two checkpoints; saving takes at most a twentieth of the time")
    ] = 120.0
    checkpoint_every_steps: Annotated[int | None, Field(ge=1, description="steps between two checkpoints")] = None
    tensorboard: Annotated[bool, Field(description="also write TensorBoard scalars, when it is installed")] = True
    model: ModelConfig = ModelConfig()
    first: TaskConfig = TaskConfig()
    later: LaterConfig = LaterConfig()
    task: tuple[TaskOverride, ...] = ()
    options: dict[str, dict[str, Any]] = {}  # method -> option -> value; tables with the methods' names in TOML

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, values: Any) -> Any:
        """Move the tables of methods to `options`; plugins are loaded, since they add some."""
        if not isinstance(values, Mapping):
            return values
        plugins = values.get("plugins", ())
        # Absolute, so that the run folder can be opened from anywhere.
        plugins = [Path(plugin).absolute() for plugin in ([plugins] if isinstance(plugins, str | Path) else plugins)]
        for plugin in plugins:
            load_plugin(plugin)
        tables = {name: value for name, value in values.items() if name in METHODS}
        rest = {name: value for name, value in values.items() if name not in METHODS}
        rest["plugins"] = plugins
        return {**rest, "options": {**rest.get("options", {}), **tables}}

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        numbers = [override.number for override in self.task]
        for number in numbers:
            if numbers.count(number) > 1:
                raise ValueError(f"task: got two [[task]] tables with number = {number}, expected one")
        find_method(self.method)
        for method, values in self.options.items():
            declared = options_of(METHODS[method])
            for name, value in values.items():
                values[name] = _valid_option(f"{method}.{name}", name, value, declared)
        per_task = {name: option for kind in METHODS.values() for name, option in options_of(kind).items() if option.per_task}
        sections = {"first": self.first, "later": self.later} | {f"task {section.number}": section for section in self.task}
        for where, section in sections.items():
            for name, value in section.options.items():
                section.options[name] = _valid_option(f"{where}.{name}", name, value, per_task, list(type(section).model_fields))
        return self

    def for_task(self, number: int) -> TaskConfig:
        """Settings of task `number` (from 1) of the data set, its `[[task]]` table applied; NOISE has those of `[later]`."""
        values = (self.first if number == 1 else self.later).flat()
        for override in self.task:
            if override.number == number:
                values.update({name: value for name, value in override.flat().items() if name != "number"})
        return TaskConfig.model_validate(values)

    def task_options(self, number: int) -> dict[str, Any]:
        """Per-task options of the method for a task of the data set (from 1, or NOISE).

        A value of the task's own wins, then the method's table, then the method's default; of a list, a task has the one at its
        number, tasks behind its end the last.
        """
        found, own, table = {}, self.for_task(number).options, self.options.get(self.method, {})
        for name, option in options_of(METHODS[self.method]).items():
            if option.per_task:
                value = own.get(name, table.get(name, option.default))
                if isinstance(value, Sequence) and not isinstance(value, str):
                    value = value[-1 if number == NOISE else min(number, len(value)) - 1]
                found[name] = value
        return found

    def task_order(self, num_tasks: int) -> tuple[int, ...]:
        """Numbers in the data set, from 1, of the tasks in the order of training; NOISE is the noisy one."""
        order = parse_order(self.order, num_tasks)
        return order if self.noise_at is None else with_noise(order, self.noise_at)

    def new_method(self, num_items: int) -> Method:
        """The method before its first task.

        Raises:
            ConfigError: its constructor refuses an option.
        """
        kind, given = find_method(self.method), self.options.get(self.method, {})
        sizes = Sizes(num_items, **dict(self.model), backend=self.backend, algorithm=self.algorithm)
        options = {name: given[name] for name, option in options_of(kind).items() if name in given and not option.per_task}
        try:
            method = kind(sizes, **options)
        except TypeError as error:  # of a plugin: its constructor takes something else than sizes and options
            raise ConfigError(f"{self.method}: its constructor refuses sizes and {options}: {error}") from error
        method.configure(self.task_options(1))
        return method

    def to_toml(self) -> str:
        """The configuration as TOML text; `load_config` of it gives an equal configuration."""
        sections = {"first", "later", "task", "options"}
        values = self.model_dump(mode="json", exclude_none=True, exclude=sections)
        values |= {"first": self.first.flat(), "later": self.later.flat(), "task": [section.flat() for section in self.task]}
        return write_toml({**values, **{method: table for method, table in self.options.items() if table}})


def _valid_option(
    where: str, name: str, value: Any, declared: Mapping[str, DeclaredOption], others: Sequence[str] = ()
) -> Any:
    """The value of an option as its declared type.

    Raises:
        ValueError: no such option, or another type.
    """
    if name not in declared:
        near = difflib.get_close_matches(name, [*declared, *others], n=1, cutoff=0.5)
        raise ValueError(f"{where}: unknown key" + (f", did you mean {near[0]!r}?" if near else ""))
    kind = declared[name].type
    try:
        return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False)).validate_python(value)
    except PydanticUserError:  # no type that can be checked
        return value
    except ValidationError:
        raise ValueError(f"{where}: got {value!r}, expected {_type_name(kind)}") from None


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    names = {float: "a number", int: "an integer", bool: "true or false", str: "a text"}
    return names.get(kind, str(kind).replace("typing.", ""))


def load_config(
    preset: str | None = None, path: str | Path | None = None, overrides: Mapping[str, Any] | None = None
) -> RunConfig:
    """Merge a preset, a TOML file and single values into a configuration.

    Args:
        preset: one of PRESETS, or None for the published program's settings.
        path: TOML file.
        overrides: dotted names to values, e.g. {"first.lr": 0.01, "task.2.alpha": "0.9", "conure.pruning": 0.5}. A string is
            read as a TOML value where it is one ("0.9", "[1, 4]", "true") and else taken as it is. None values are left out.
            A name of SHARED is for every task. It, and an option given for a method, replaces what preset and file say of
            single tasks.

    Raises:
        ConfigError: unknown preset, unreadable file, unknown key (naming the nearest known one), or a bad value.
    """
    values: dict[str, Any] = {}
    if preset is not None:
        if preset not in PRESETS:
            raise ConfigError(f"preset: got {preset!r}, expected one of {', '.join(PRESETS)}")
        _merge(values, tomllib.loads((resources.files("teracon_fast") / "presets" / f"{preset}.toml").read_text("utf-8")))
    if path is not None:
        _merge(values, read_toml(path))
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    for name in given:
        _clear_tasks(values, name)
    given = {f"{section}.{name}": given[name] for section in ("first", "later") for name in SHARED if name in given} | given
    for name, value in given.items():
        if name not in SHARED:
            _merge(values, _nested(name, _parsed(name, value)))
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, str(path) if path is not None else "configuration")) from None


def read_toml(path: str | Path) -> dict[str, Any]:
    """Values of a TOML file; ConfigError names the file when it cannot be read."""
    try:
        return tomllib.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


@dataclass(frozen=True)
class Flag:
    """One value of the configuration, as a command line needs to know it."""

    name: str  # dotted: "first.lr"
    type: Any  # int, float, bool, str, Path or list[int]
    choices: tuple[str, ...]  # of a str; empty when it is free
    default: Any  # None: not set, or required
    help: str


def flags() -> Iterator[Flag]:
    """Every value that `load_config(overrides=...)` takes, except those of single tasks (`task.N.name`) and of plugins."""
    yield from _flags(RunConfig, "", {})
    for method, kind in METHODS.items():
        for option in options_of(kind).values():
            yield _option_flag(f"{method}.{option.name}", option, option.default)


def _flags(section: type[BaseModel], prefix: str, defaults: Mapping[str, Any]) -> Iterator[Flag]:
    for name, field in section.model_fields.items():
        default = defaults.get(name, None if field.is_required() else field.default)
        if isinstance(default, BaseModel):
            yield from _flags(type(default), f"{prefix}{name}.", default.model_dump())
        elif name == "options" and prefix:
            per_task = {o.name: o for kind in METHODS.values() for o in options_of(kind).values() if o.per_task}
            yield from (_option_flag(prefix + option.name, option, None) for option in per_task.values())
        elif name not in ("task", "options"):
            kind, choices = _plain_type(field.annotation)
            yield Flag(prefix + name, kind, choices, default, field.description or "")


def _option_flag(name: str, option: DeclaredOption, default: Any) -> Flag:
    kind, choices = _plain_type(option.type)
    return Flag(name, kind if kind in (int, float, bool, str) else str, choices, default, option.help)


def _plain_type(annotation: Any) -> tuple[Any, tuple[str, ...]]:
    if get_origin(annotation) is Literal:
        return str, get_args(annotation)
    if get_origin(annotation) is tuple:
        return (list[Path] if get_args(annotation)[0] is Path else list[int]), ()
    inner = [part for part in get_args(annotation) if part is not type(None)]
    return (str if len(inner) > 1 else inner[0] if inner else annotation), ()


def write_toml(values: Mapping[str, Any]) -> str:
    """TOML text of nested dictionaries whose values are strings, numbers, booleans, lists of them, or lists of tables."""
    scalars: list[str] = []
    tables: list[str] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            tables.append(f"[{key}]\n{write_toml(value)}")
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
            tables.extend(f"[[{key}]]\n{write_toml(entry)}" for entry in value)
        else:
            scalars.append(f"{key} = {_toml_value(value)}\n")
    return "\n".join(["".join(scalars), *tables] if scalars else tables)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml_value(entry) for entry in value)}]"
    # JSON escapes are valid in TOML basic strings, but for DEL, which JSON leaves as it is.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007F")


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Deep merge, later values win; `[[task]]` tables merge by their number."""
    for key, value in values.items():
        if key == "task" and isinstance(value, list):
            known = {entry.get("number"): entry for entry in into.setdefault("task", [])}
            for entry in value:
                if isinstance(entry, dict) and entry.get("number") in known:
                    known[entry["number"]].update(entry)
                else:
                    into["task"].append(dict(entry) if isinstance(entry, dict) else entry)
        elif isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _clear_tasks(values: dict[str, Any], name: str) -> None:
    """Remove the values that tasks have of a setting, if the name is one of SHARED or that of a method's option."""
    table, _, option = name.rpartition(".")
    of_method = table and table.split(".")[0] not in RunConfig.model_fields and option not in TaskConfig.model_fields
    if name in SHARED or of_method:
        for section in (values.get("first"), values.get("later"), *values.get("task", [])):
            if isinstance(section, dict):
                section.pop(option, None)


def _nested(name: str, value: Any) -> dict[str, Any]:
    head, *rest = name.split(".")
    if head == "task":
        if len(rest) != 2 or not rest[0].isdigit():
            raise ConfigError(f"{name}: expected task.NUMBER.NAME, for example task.2.lr")
        return {"task": [{"number": int(rest[0]), rest[1]: value}]}
    return {head: _nested(".".join(rest), value) if rest else value}


def _parsed(name: str, value: Any) -> Any:
    if not isinstance(value, str) or name in _TEXT:
        return value
    text = f"[{value.strip('[] ')}]" if name in _LISTS else value
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return value
    return parsed["value"] if set(parsed) == {"value"} else value


FLAGS = tuple(flags())
SHARED = tuple(flag.name.removeprefix("first.") for flag in FLAGS if flag.name.startswith("first."))  # settings of tasks
_PLAIN = {"order", "method", "device"}  # texts that may look like TOML values
_TEXT = frozenset(flag.name for flag in FLAGS if flag.type is Path or flag.choices or flag.name in _PLAIN)
_LISTS = frozenset(flag.name for flag in FLAGS if flag.type == list[int])  # may also be written 1,4


def _explain(error: ValidationError, source: str) -> str:
    """One line an error: where, what was got, what was expected, the nearest known name."""
    lines = []
    for entry in error.errors():
        where = ".".join(str(part) for part in entry["loc"])
        where = re.sub(r"\.(\d+)", lambda index: f"[{int(index[1]) + 1}]", where)  # entries of lists, from 1
        if entry["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(entry["loc"][-1]), _known(entry["loc"][:-1]), n=1, cutoff=0.5)
            lines.append(f"{where}: unknown key" + (f", did you mean {near[0]!r}?" if near else ""))
        elif entry["type"] == "missing":
            lines.append(f"{where}: missing, expected a value")
        elif entry["type"] == "value_error":
            lines.append(entry["msg"].removeprefix("Value error, "))
        else:
            lines.append(f"{where}: got {entry['input']!r}, expected: {entry['msg'].removeprefix('Input should be ')}")
    return "\n".join(f"{source}: {line}" for line in lines)


def _known(location: tuple[int | str, ...]) -> list[str]:
    return list(ModelConfig.model_fields) if location == ("model",) else [*RunConfig.model_fields, *METHODS]
