"""Settings of a training run: TOML in and out, validated by pydantic, presets of the paper's Table 10.

A configuration is merged from a preset, a TOML file and single values (`first.lr`, `task.2.alpha`), later ones winning.
Tasks count from 1. `[first]` holds the settings of T1, `[later]` those of T2..TM, and each `[[task]]` table with a
`number` changes some of them for one task. Needs the extra `train`.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from teracon_fast.errors import ConfigError

PRESETS = ("ttl", "ml", "naver", "demo")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


LearningRate = Annotated[float, Field(gt=0, description="learning rate of Adam")]
BatchSize = Annotated[int, Field(ge=1, description="samples a step")]
Epochs = Annotated[int, Field(ge=1, description="most passes over the training samples")]
Patience = Annotated[int, Field(ge=1, description="epochs without a better validation score before training stops")]
Alpha = Annotated[float, Field(ge=0, description="weight of the knowledge retention loss (Eq. 18); unused by T1")]
CosineScale = Annotated[float, Field(gt=0, description="c, scale of the cosine in rho (Eq. 15); unused by T1")]
LargestScale = Annotated[float, Field(ge=1, description="largest mask scale (Eq. 19), also the scale at inference")]
Select = Annotated[
    Literal["hit@1", "mrr@5"],
    Field(description="validation score that picks the best weights; tasks of at most 20 labels use accuracy"),
]


class TaskConfig(_Section):
    """How one task is trained. The defaults are those of T1 in the published program."""

    lr: LearningRate = 1e-3
    batch_size: BatchSize = 32
    epochs: Epochs = 10
    patience: Patience = 5
    alpha: Alpha = 0.7
    c: CosineScale = 6.0
    s_max: LargestScale = 50.0
    select: Select = "hit@1"


class LaterConfig(TaskConfig):
    """How T2..TM are trained. A value that is not given is that of the published program for them, whatever else is given."""

    lr: LearningRate = 1e-4
    batch_size: BatchSize = 1024
    epochs: Epochs = 100


class TaskOverride(_Section):
    """Settings of one task that differ from `[first]` or `[later]`."""

    number: Annotated[int, Field(ge=1, description="the task, from 1")]
    lr: LearningRate | None = None
    batch_size: BatchSize | None = None
    epochs: Epochs | None = None
    patience: Patience | None = None
    alpha: Alpha | None = None
    c: CosineScale | None = None
    s_max: LargestScale | None = None
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
    num_tasks: Annotated[int | None, Field(ge=1, description="train only the first so many tasks, else all")] = None
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
    mask: Annotated[
        Literal["relation", "positive_only", "none"],
        Field(description="task masks: relation-aware (Eq. 12), without negated embeddings, or Eq. 6"),
    ] = "relation"
    student_mask: Annotated[
        Literal["past", "current"],
        Field(description="mask of the student in the retention loss: the past task's (program) or the current one's"),
    ] = "past"
    sampling: Annotated[
        Literal["adaptive", "minimum", "all"],
        Field(description="users drawn for retention: by rho (Eq. 15), by the smallest rho for all, or everyone"),
    ] = "adaptive"
    parity: Annotated[
        Literal["official", "paper"], Field(description="annealing of s: the published program's or Eq. 19")
    ] = "official"
    evaluate_batch_size: Annotated[int, Field(ge=1, description="sequences encoded at a time in evaluation")] = 1024
    log_every: Annotated[int, Field(ge=1, description="steps between two logged losses")] = 20
    checkpoint_every_seconds: Annotated[float, Field(gt=0, description="seconds between resumable checkpoints")] = 120.0
    checkpoint_every_steps: Annotated[int | None, Field(ge=1, description="steps between resumable checkpoints")] = None
    tensorboard: Annotated[bool, Field(description="also write TensorBoard scalars, when it is installed")] = True
    model: ModelConfig = ModelConfig()
    first: TaskConfig = TaskConfig()
    later: LaterConfig = LaterConfig()
    task: tuple[TaskOverride, ...] = ()

    @model_validator(mode="after")
    def _one_table_a_task(self) -> RunConfig:
        numbers = [override.number for override in self.task]
        for number in numbers:
            if numbers.count(number) > 1:
                raise ValueError(f"task: got two [[task]] tables with number = {number}, expected one")
        return self

    def for_task(self, number: int) -> TaskConfig:
        """Settings of task `number` (from 1), its `[[task]]` table applied."""
        values = (self.first if number == 1 else self.later).model_dump()
        for override in self.task:
            if override.number == number:
                values.update(override.model_dump(exclude_none=True, exclude={"number"}))
        return TaskConfig.model_validate(values)

    def to_toml(self) -> str:
        """The configuration as TOML text; `load_config` of it gives an equal configuration."""
        return write_toml(self.model_dump(mode="json", exclude_none=True))


def load_config(
    preset: str | None = None, path: str | Path | None = None, overrides: Mapping[str, Any] | None = None
) -> RunConfig:
    """Merge a preset, a TOML file and single values into a configuration.

    Args:
        preset: one of PRESETS, or None for the published program's settings.
        path: TOML file.
        overrides: dotted names to values, e.g. {"first.lr": 0.01, "task.2.alpha": "0.9"}. A string is read as a TOML
            value where it is one ("0.9", "[1, 4]", "true") and else taken as it is. None values are left out.
    Raises:
        ConfigError: unknown preset, unreadable file, unknown key (naming the nearest known one), or a bad value.
    """
    values: dict[str, Any] = {}
    if preset is not None:
        _merge(values, read_preset(preset))
    if path is not None:
        _merge(values, read_toml(path))
    for name, value in (overrides or {}).items():
        if value is not None:
            _merge(values, _nested(name, _parsed(name, value)))
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, str(path) if path is not None else "configuration")) from None


def read_preset(name: str) -> dict[str, Any]:
    """Values of a shipped preset (a TOML file under teracon_fast/presets)."""
    if name not in PRESETS:
        raise ConfigError(f"preset: got {name!r}, expected one of {', '.join(PRESETS)}")
    return tomllib.loads((resources.files("teracon_fast") / "presets" / f"{name}.toml").read_text("utf-8"))


def read_toml(path: str | Path) -> dict[str, Any]:
    """Values of a TOML file; ConfigError names the file when it cannot be read."""
    try:
        return tomllib.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


@dataclass(frozen=True)
class Option:
    """One value of the configuration, as a command line needs to know it."""

    name: str  # dotted: "first.lr"
    type: Any  # int, float, bool, str, Path or list[int]
    choices: tuple[str, ...]  # of a str; empty when it is free
    default: Any  # None: not set, or required
    help: str


def options() -> Iterator[Option]:
    """Every value that `load_config(overrides=...)` takes, except those of single tasks (`task.N.name`)."""
    yield from _options(RunConfig, "", {})


def _options(section: type[BaseModel], prefix: str, defaults: Mapping[str, Any]) -> Iterator[Option]:
    for name, field in section.model_fields.items():
        default = defaults.get(name, None if field.is_required() else field.default)
        if isinstance(default, BaseModel):
            yield from _options(type(default), f"{prefix}{name}.", default.model_dump())
        elif name != "task":
            kind, choices = _plain_type(field.annotation)
            yield Option(prefix + name, kind, choices, default, field.description or "")


def _plain_type(annotation: Any) -> tuple[Any, tuple[str, ...]]:
    if get_origin(annotation) is Literal:
        return str, get_args(annotation)
    if get_origin(annotation) is tuple:
        return list[int], ()
    inner = [part for part in get_args(annotation) if part is not type(None)]
    return (inner[0] if inner else annotation), ()


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
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return value
    return parsed["value"] if set(parsed) == {"value"} else value


_TEXT = frozenset(option.name for option in options() if option.type in (str, Path))


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
    sections: dict[str, type[BaseModel]] = {"model": ModelConfig, "first": TaskConfig, "later": TaskConfig}
    if not location:
        return list(RunConfig.model_fields)
    section = TaskOverride if location[0] == "task" else sections.get(str(location[0]))
    return list(section.model_fields) if section else []
