"""Runs of every method: what the log holds, what the files hold, bf16, the order of tasks, the noisy task, options."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_data import write_tiny
from tiny_run import events, tiny_config, weights

from teracon_fast.config import RunConfig
from teracon_fast.data import TaskSequence
from teracon_fast.data.order import NOISE_NAME
from teracon_fast.errors import CheckpointError, ConfigError
from teracon_fast.infer.open import open_run
from teracon_fast.methods import METHODS, Method, options_of
from teracon_fast.model.checkpoints import read_tensors
from teracon_fast.train.checkpoint import read_task_header, task_file
from teracon_fast.train.folder import fingerprint, resolved, training_data
from teracon_fast.train.run import train

TASKS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TaskSequence:
    return write_tiny(tmp_path_factory.mktemp("data") / "tiny", tasks=TASKS, rows=120)


class Runs:
    """A run of each method, trained when it is first asked for."""

    def __init__(self, data: TaskSequence, home: Path) -> None:
        self.data, self.home = data, home

    def config(self, method: str, **changes: Any) -> RunConfig:
        return tiny_config(self.data.path, self.home / method, method=method, first__epochs=2, **changes)

    def of(self, method: str) -> Path:
        if not (self.home / method / "results.json").exists():
            train(self.config(method))
        return self.home / method


@pytest.fixture(scope="module")
def runs(data: TaskSequence, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(data, tmp_path_factory.mktemp("runs"))


# What the log holds of each method: of a step of task 3, of an epoch of task 3, of its end.
LOGGED: dict[str, tuple[dict[str, int], dict[str, int], set[str]]] = {
    # name -> length of the list, 0 for a number
    "sinmo": ({}, {}, set()),
    "fine_all": ({}, {}, set()),
    "peterrec": ({}, {}, set()),
    "mtl": ({"first_task_loss": 0}, {}, set()),
    "piggyback": ({}, {"sparsity": 3}, set()),
    "hat": ({"scale": 0, "attention_loss": 0}, {"open_mask_share": 3, "free_channels": 0}, set()),
    "conure": ({}, {"free_weights": 0}, set()),
    "teracon": ({"scale": 0, "retention_loss": 0, "rho": 2}, {"open_mask_share": 3}, {"similarity"}),
    "parameter_masks": ({"scale": 0, "retention_loss": 0, "rho": 2}, {"open_mask_share": 3}, {"similarity"}),
}
STEP = {"event", "time", "task", "epoch", "batch", "step", "loss", "class_loss", "hit@1", "users_per_s"}


@pytest.mark.parametrize("method", METHODS)
def test_the_log_holds_what_the_method_has_to_tell(method: str, runs: Runs) -> None:
    run = runs.of(method)
    of_step, of_epoch, of_task = LOGGED[method]
    for event in (event for event in events(run, "step") if event["task"] == 3):
        assert set(event) == STEP | set(of_step)
        for name, length in of_step.items():
            assert len(event[name]) == length if length else math.isfinite(event[name]), name
    valid = [event for event in events(run, "valid") if event["task"] == 3]
    assert {event["phase"] for event in valid} == ({"train", "retrain"} if method == "conure" else {"train"})
    for event in valid:
        assert set(event["method"]) == set(of_epoch) and "hit@1" in event["metrics"] or "accuracy" in event["metrics"]
        for name, length in of_epoch.items():
            shares = event["method"][name] if length else [event["method"][name]]
            assert len(shares) == max(length, 1) and all(0 <= share <= 1 for share in shares), name
        means = {name for name in of_step if name.endswith("_loss")} | {"class_loss"}
        assert means == {name for name in event if name.endswith("_loss")}
    for event in events(run, "task_end"):
        assert of_task == set(event) - {"event", "time", "task", "epochs", "best_epoch", "seconds", "test"}
    if method == "conure":
        free = [event["method"]["free_weights"] for event in events(run, "valid") if event["phase"] == "retrain"]
        assert free[0] == pytest.approx(0.7, abs=0.01) and free[-1] == pytest.approx(0.7 * 0.8 * 0.9 * 0.8, abs=0.01)


# Files


@pytest.mark.parametrize("method", METHODS)
def test_a_file_holds_what_its_task_changed_and_all_of_them_the_method(method: str, runs: Runs) -> None:
    run, before = runs.of(method), dict[str, torch.Tensor]()
    for task in range(1, TASKS + 1):
        header, own = read_task_header(run, task), read_tensors(task_file(run, task))
        state = weights(run, task)
        assert (header.method, header.task, len(header.labels)) == (method, task, task)
        assert set(header.tensors) == set(state)
        same = {name for name, value in state.items() if name in before and torch.equal(value, before[name])}
        assert set(own) == set(state) - same
        assert all(torch.equal(own[name], state[name]) for name in own)
        before = state
    if method in ("sinmo", "fine_all"):
        networks = [[name.split(".")[1] for name in read_tensors(task_file(run, task))] for task in range(1, TASKS + 1)]
        assert [set(numbers) for numbers in networks] == [{str(task)} for task in range(TASKS)], "one network a file"
    if method in ("peterrec", "piggyback", "conure"):
        assert not any("embeding" in name for name in read_tensors(task_file(run, TASKS)))


def test_a_damaged_file_is_refused_by_its_name(runs: Runs) -> None:
    run = runs.of("conure")
    file = task_file(run, 2)
    whole = file.read_bytes()
    try:
        for place in (len(whole) - 3, len(whole) // 2, 40):
            damaged = bytearray(whole)
            damaged[place] ^= 1
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=r"task2\.safetensors"):
                open_run(run, after=TASKS, device="cpu")
        file.unlink()
        with pytest.raises(CheckpointError, match=r"task2\.safetensors"):
            open_run(run, after=TASKS, device="cpu")
        open_run(run, after=1, device="cpu")
    finally:
        file.write_bytes(whole)


# bf16, order, noise


@pytest.mark.parametrize("method", METHODS)
def test_bf16(method: str, runs: Runs, tmp_path: Path) -> None:
    """Training in bf16 comes to nearly the losses of fp32; evaluation and weights stay fp32."""
    short = {"num_tasks": 2}
    config = runs.config(method, **short, precision="bf16").model_copy(update={"run": tmp_path / "bf16"})
    train(config)
    fp32 = [event["class_loss"] for event in events(runs.of(method), "step") if event["task"] <= 2]
    bf16 = [event["class_loss"] for event in events(tmp_path / "bf16", "step")]
    assert fp32 != bf16 and bf16 == pytest.approx(fp32, rel=0.05)
    assert {value.dtype for value in weights(tmp_path / "bf16", 2).values()} <= {torch.float32, torch.int8, torch.uint8}


@pytest.mark.parametrize("method", ["teracon", "conure"])
def test_another_order_with_a_noisy_task(method: str, data: TaskSequence, runs: Runs, tmp_path: Path) -> None:
    """The data's task 4 comes second, after it noise; settings of a task follow the task, seeds its place."""
    config = tiny_config(
        data.path, tmp_path / "run", method=method, order="reversed", noise_at=3, test_every_epoch=[2], first__epochs=2,
        task__4__lr=0.02, task__4__epochs=1, num_tasks=4,
    )  # fmt: skip
    results = train(config)
    assert results.tasks == ["next", "task 4", NOISE_NAME, "task 3"]
    assert config.task_order(4) == (1, 4, 0, 3, 2)
    about = json.loads((tmp_path / "run" / "dataset.json").read_text())
    assert [task["name"] for task in about["tasks"]] == ["next", "task 4", NOISE_NAME, "task 3", "task 2"]
    assert (tmp_path / "run/task2/labels.parquet").read_bytes() == (data.path / "task4/labels.parquet").read_bytes()
    valid = events(tmp_path / "run", "valid")
    assert [("test" in event) for event in valid] == [event["task"] == 2 for event in valid]
    epochs = [len([event for event in valid if (event["task"], event["phase"]) == (task, "train")]) for task in (1, 2, 3)]
    assert epochs == [2, 1, 2]
    assert read_task_header(tmp_path / "run", 3).labels == [data.num_items, data.tasks[3].num_labels, 50]
    first = [event for event in events(tmp_path / "run", "step") if event["task"] == 1]
    plain = [event for event in events(runs.of(method), "step") if event["task"] == 1]
    assert [event["loss"] for event in first] == [event["loss"] for event in plain], "task 1 is the same task in any order"


# Options


def other_value(option: Any) -> Any:
    """A value of an option that is not its default."""
    others = {"pruning": 0.5, "task_embedding_range": (0.0, 1.0), "reduction": 2}
    if option.name in others:
        return others[option.name]
    if isinstance(option.default, bool):
        return not option.default
    if isinstance(option.default, str):
        return next(choice for choice in option.type.__args__ if choice != option.default)
    return option.default * 2 if option.default * 2 < 1 or option.default >= 1 else option.default / 2


@pytest.mark.parametrize("method", METHODS)
def test_options_decide_the_fingerprint_each_under_its_name(method: str, data: TaskSequence, tmp_path: Path) -> None:
    """So that a change of any of them is refused by its name."""
    declared = options_of(METHODS[method])

    def recorded(options: dict[str, Any]) -> dict[str, Any]:
        config = resolved(tiny_config(data.path, tmp_path, method=method, **{method: options}))
        return fingerprint(config, *training_data(config), tasks=2)["result"]

    plain = recorded({})
    for name, option in declared.items():
        value = other_value(option)
        changed = recorded({name: value})
        differ = {key for key in plain if plain[key] != changed[key]}
        assert differ == ({f"task.1.{name}", f"task.2.{name}"} if option.per_task else {f"{method}.{name}"})
        assert changed[next(iter(differ))] == (list(value) if isinstance(value, tuple) else value)
    assert {key.split(".")[-1] for key in plain if key.startswith(f"{method}.") or key.startswith("task.2.")} >= set(declared)
    with pytest.raises(ConfigError, match=f"{method}.depht: unknown key"):
        tiny_config(data.path, tmp_path, **{method: {"depht": 1}})


@pytest.mark.parametrize(("method", "name", "value"), [
    ("teracon", "alpha", -1.0), ("hat", "weight", -0.5), ("conure", "pruning", 1.0), ("piggyback", "mask_lr", 0.0),
    ("peterrec", "reduction", 99), ("parameter_masks", "c", 0.0),
])  # fmt: skip
def test_options_out_of_range_are_refused_before_anything_is_written(
    method: str, name: str, value: float, data: TaskSequence, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"{method}.*{name} is {value}"):
        train(tiny_config(data.path, tmp_path / "run", method=method, **{method: {name: value}}))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_options_of_a_task_are_its_own_in_training(data: TaskSequence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, float, float]] = []
    plain = Method.begin_phase

    def look(method: Any, phase: str) -> Any:
        seen.append((method.task + 1, method.alpha, method.s_max))
        return plain(method, phase)

    monkeypatch.setattr(Method, "begin_phase", look)
    options = {"later__alpha": 0.5, "task__3__alpha": 0.25, "teracon__s_max": 40.0, "first__s_max": 30.0}
    train(tiny_config(data.path, tmp_path / "run", num_tasks=3, first__epochs=1, later__epochs=1, **options))
    assert seen == [(1, 0.7, 30.0), (2, 0.5, 40.0), (3, 0.25, 40.0)]
    assert [read_task_header(tmp_path / "run", task).notes["options"]["alpha"] for task in (1, 2, 3)] == [0.7, 0.5, 0.25]
