"""Growth of a run of any method that has one item embedding for all tasks; the others refuse."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import StopAt, assert_same_run, tiny_config, weights

from teracon_fast.data import DatasetWriter
from teracon_fast.errors import ConfigError
from teracon_fast.infer.measure import measure
from teracon_fast.infer.open import open_run
from teracon_fast.methods import METHODS, Method, Sizes
from teracon_fast.train.folder import RunStopped, trained_labels
from teracon_fast.train.growth import fit_new_rows, grow
from teracon_fast.train.log import Observer
from teracon_fast.train.run import train

GROWABLE = ("teracon", "parameter_masks", "hat", "conure", "peterrec", "piggyback")
LENGTH, OLD, NEW = 8, 20, 24  # items


def write(folder: Path, items: int, tasks: int, extend: Path | None = None) -> Path:
    """Item after item, in a circle; the label of the last one; the color of the user, of which the larger data has one more."""
    random = np.random.default_rng(items)
    sequences = (random.integers(0, items, (120, 1)) + np.arange(LENGTH)) % items + 1
    colors = np.array(["red", "blue", "green"][: 2 + (items > OLD)])
    with DatasetWriter(folder, "walks", LENGTH, extend=extend) as writer:
        writer.add_task("next", "next_item", sequences, groups=np.arange(120))
        for name, labels in (("again", sequences[:, -1] + 100), ("color", colors[np.arange(120) % len(colors)]),
                             ("half", sequences[:, -1] % 2))[: tasks - 1]:  # fmt: skip
            writer.add_task(name, "label", sequences, labels=labels, groups=np.arange(120))
    return folder


def config(home: Path, data: str, run: str, **changes: Any) -> Any:
    return tiny_config(home / data, home / run, split_by="user", model__channels=8, later__batch_size=32, **changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("data")
    write(home / "old", OLD, 3)
    write(home / "new", NEW, 4, extend=home / "old")
    return home


@pytest.fixture(scope="module", params=GROWABLE)
def home(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three tasks, grown without and with fitting."""
    home = tmp_path_factory.mktemp(request.param)
    for name in ("old", "new"):
        (home / name).symlink_to(data / name)
    train(config(home, "old", "run", method=request.param))
    grow(home / "run", home / "new", home / "grown")
    grow(home / "run", home / "new", home / "fitted", epochs=3)
    return home


def of_items(name: str) -> bool:
    return name.endswith(("embeding.weight", "heads.0.weight", "heads.0.bias", "classifier.0.weight", "classifier.0.bias"))


def test_old_rows_stay_and_new_ones_are_the_same_after_every_task(home: Path) -> None:
    news: dict[str, dict[str, torch.Tensor]] = {"grown": {}, "fitted": {}}
    for task in (1, 2, 3):
        before = weights(home / "run", task)
        for run, found in news.items():
            after = weights(home / run, task)
            assert after.keys() == before.keys()
            for name, value in before.items():
                assert torch.equal(after[name][: len(value)], value), name
                if len(after[name]) > len(value):
                    rows = after[name][len(value) :]
                    assert torch.equal(found.setdefault(name, rows), rows), name
    assert sum(map(of_items, news["grown"])) == 3 and len(news["grown"]) == 7  # and the heads of two more tasks
    assert open_run(home / "grown", device="cpu").method.labels == [NEW + 1, NEW, 3]
    for name, rows in news["grown"].items():
        assert bool((news["fitted"][name] != rows).any()) == of_items(name), name
    assert trained_labels(home / "grown") == {1: OLD + 1, 2: OLD, 3: 2} and trained_labels(home / "fitted") == {2: OLD, 3: 2}


def test_results_are_those_of_the_grown_weights(home: Path) -> None:
    for name in ("grown", "fitted"):
        final = json.loads((home / name / "results.json").read_text())["final"]
        assert {str(number): metrics for number, metrics in measure(open_run(home / name, device="cpu")).items()} == final
    losses = [json.loads(line)["fit_losses"] for line in (home / "fitted" / "metrics.jsonl").read_text().splitlines()
              if '"grown"' in line]  # fmt: skip
    assert len(losses[0]) == 3 and losses[0][-1] < losses[0][0]


def test_a_grown_run_trains_its_next_task_and_resumes_to_the_same_bits(home: Path) -> None:
    for name in ("whole", "stopped"):
        shutil.copytree(home / "grown", home / name)
    method = open_run(home / "run", device="cpu").config.method
    train(config(home, "new", "whole", method=method))
    stops = StopAt(lambda kind, number: kind == "step" and number >= 2, signal.SIGTERM)
    with pytest.raises(RunStopped, match="in task 4"):
        train(config(home, "new", "stopped", method=method), stops)
    train(config(home, "new", "stopped", method=method))
    assert_same_run(home / "stopped", home / "whole", 4)
    assert open_run(home / "whole", device="cpu").method.labels == [NEW + 1, NEW, 3, 2]


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(GROWABLE)))
def test_others_refuse(method: str, data: Path, tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).symlink_to(data / name)
    train(config(tmp_path, "old", "run", method=method, num_tasks=1, first__epochs=1))
    with pytest.raises(ConfigError, match=f"a run of {method} cannot grow: every task has item embeddings of its own"):
        grow(tmp_path / "run", tmp_path / "new", tmp_path / "grown")
    assert not (tmp_path / "grown").exists()
    with pytest.raises(ConfigError, match=f"{method} cannot grow"):
        open_run(tmp_path / "run", device="cpu").method.grown(NEW + 1, [NEW + 1])


def test_order_and_noise_stay(data: Path, tmp_path: Path) -> None:
    """The finished tasks keep their places; tasks that the larger data set adds come last."""
    for name in ("old", "new"):
        (tmp_path / name).symlink_to(data / name)
    train(config(tmp_path, "old", "run", method="peterrec", order="reversed", noise_at=2, first__epochs=1))
    found = grow(tmp_path / "run", tmp_path / "new", tmp_path / "grown")
    assert found.results.tasks == ["next", "noise", "color", "again"]
    assert found.labels == {1: (OLD + 1, NEW + 1), 2: (50, 50), 3: (2, 3), 4: (OLD, NEW)}
    run = open_run(tmp_path / "grown", device="cpu")
    assert (run.config.order, run.config.noise_at, run.order) == ("1,3,2,4", 2, (1, 0, 3, 2))
    assert {str(number): metrics for number, metrics in measure(run).items()} == found.results.final
    results = train(run.config)
    assert results.tasks == ["next", "noise", "color", "again", "half"]


def test_a_method_refuses_fewer_items_and_labels() -> None:
    method = METHODS["hat"](Sizes(10, 8, (1, 2)))
    generator = torch.Generator().manual_seed(0)
    method.start(0, 10, generator)
    method.start(1, 3, generator)
    assert method.grown(12, [12, 4], generator).labels == [12, 4]
    for items, labels in ((9, [9, 3]), (12, [12]), (12, [12, 2])):
        with pytest.raises(ConfigError) as refused:
            method.grown(items, labels, generator)
        got = f"hat: got {items} items and {labels} labels, expected one count per task"
        assert str(refused.value) == f"{got}, at least 10 items and [10, 3] labels"


def test_a_method_without_next_item_loss_cannot_be_fitted(data: Path) -> None:
    from teracon_fast.data import open_dataset

    class Plain(METHODS["peterrec"]):  # type: ignore[misc, valid-type]
        name = "plain"
        next_item_loss = Method.next_item_loss

    method = Plain(Sizes(NEW + 1, 8, (1, 2)))
    method.start(0, NEW + 1)
    task = open_dataset(data / "new").tasks[0]
    with pytest.raises(ConfigError, match="plain: has no next_item_loss"):
        fit_new_rows(method, task, np.arange(60), OLD + 1, OLD + 1, 1, 0.1, 32, 0, Observer())
