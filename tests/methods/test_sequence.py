"""The driver of a task sequence, with simple methods."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_data import write_tiny
from torch import Tensor

from teracon_fast.data import Batch, TaskSequence, split_task
from teracon_fast.errors import CheckpointError, ConfigError
from teracon_fast.methods import HAT, METHODS, MTL, Method, Place, SinMo, Sizes
from teracon_fast.methods import sequence as driver
from teracon_fast.methods.sequence import Epoch, Learnt, Settings, evaluate_method, learn_sequence, learn_task
from teracon_fast.train.loop import DivergedError
from teracon_fast.train.metrics import headline

SETTINGS = Settings(lr=5e-3, batch_size=32, epochs=8, patience=3)
SHORT = Settings(lr=5e-3, batch_size=64, epochs=2)


class Killed(Exception):
    """In place of a kill signal."""


def short(task: int) -> Settings:
    return SHORT


def strip(learnt: Learnt) -> tuple[object, ...]:
    """All but the times."""
    epochs = [[(e.phase, e.epoch, e.loss, e.valid, e.best) for e in of_task] for of_task in learnt.epochs]
    return learnt.results, learnt.tests, epochs


def test_two_tasks_are_learnt(tiny: TaskSequence, sizes: Sizes) -> None:
    splits = [split_task(data) for data in tiny.tasks]
    method = SinMo(sizes)
    first = learn_task(method, tiny, splits, 0, SETTINGS)
    before = evaluate_method(method, tiny.tasks[0], 0, splits[0].test)
    second = learn_task(method, tiny, splits, 1, SETTINGS)
    for epochs in (first, second):
        assert epochs[-1].loss < epochs[0].loss
    assert evaluate_method(method, tiny.tasks[0], 0, splits[0].test) == before
    assert before["mrr@5"] > 0.3, "better than chance"
    assert evaluate_method(method, tiny.tasks[1], 1, splits[1].test)["mrr@5"] > 0.3


@pytest.mark.parametrize("name", METHODS)
def test_six_tasks_by_every_method(name: str, tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "six", tasks=6, rows=80, length=6)
    method = METHODS[name](Sizes(data.num_items, channels=8, dilations=(1,)))
    learnt = learn_sequence(method, data, short)
    assert method.labels == [task.num_labels for task in data.tasks]
    assert [len(row) for row in learnt.results.R] == [1, 2, 3, 4, 5, 6]
    for task, tests in enumerate(learnt.tests[-1]):
        samples = split_task(data.tasks[task]).test
        assert evaluate_method(method, data.tasks[task], task, samples) == tests
    if name in ("sinmo", "fine_all", "mtl", "peterrec", "piggyback", "conure"):
        assert all(value in (0.0, None) for value in learnt.results.bwt), "such a method forgets nothing"


def test_r_holds_the_headline_metric_after_each_task(tiny: TaskSequence, sizes: Sizes) -> None:
    learnt = learn_sequence(SinMo(sizes), tiny, short)
    for j, row in enumerate(learnt.results.R):
        assert row == [learnt.tests[j][i][headline(tiny.tasks[i].num_labels)] for i in range(j + 1)]


def test_an_epoch_without_a_better_one_runs_the_patience_out_and_the_best_weights_come_back(
    tiny: TaskSequence, sizes: Sizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.2, 0.4, 0.4, 0.3, 0.9])
    states: list[dict[str, Tensor]] = []

    def scripted(method: Method, *_: object) -> dict[str, float]:
        states.append({name: value.clone() for name, value in method.state_dict().items()})
        return {"hit@1": next(scores)}

    monkeypatch.setattr(driver, "evaluate_method", scripted)
    method = SinMo(sizes)
    settings = Settings(lr=5e-3, batch_size=64, epochs=9, patience=2)
    epochs = learn_task(method, tiny, [split_task(data) for data in tiny.tasks], 0, settings)
    assert [epoch.best for epoch in epochs] == [True, True, False, False]
    for name, value in method.state_dict().items():
        assert torch.equal(value, states[1][name]), name
    assert not torch.equal(states[1]["heads.0.weight"], states[3]["heads.0.weight"])


def test_the_mean_loss_counts_every_sample(tiny: TaskSequence, sizes: Sizes) -> None:
    """With a rate too small to move anything it is the loss over the training samples, the last batch partial."""
    splits = [split_task(data) for data in tiny.tasks]
    method = SinMo(sizes)
    settings = Settings(lr=1e-30, batch_size=50, epochs=1)
    epoch = learn_task(method, tiny, splits, 0, settings)[0]
    assert len(splits[0].train) % 50
    rows = tiny.tasks[0].samples[splits[0].train][:, 0]
    x = torch.from_numpy(np.array(tiny.tasks[0].sequences[rows], dtype=np.int64))
    whole = method.loss(Batch(x, x[:, -1], (x != 0).sum(1).numpy()), Place(0, 1.0), {})
    assert epoch.loss == pytest.approx(float(whole.detach()), rel=1e-5)


@pytest.mark.parametrize("kind", [SinMo, MTL, HAT])
@pytest.mark.parametrize("stop", [(0, 1), (1, 0), (2, 1)])
def test_a_stopped_sequence_goes_on_to_the_same_bits(
    kind: type[Method], stop: tuple[int, int], tiny: TaskSequence, sizes: Sizes, tmp_path: Path
) -> None:
    """It goes on after the last finished task; nothing of that is trained again."""
    straight = kind(sizes)
    expected = learn_sequence(straight, tiny, short, seed=3)
    folder = tmp_path / "run"

    def until(task: int, epoch: Epoch) -> None:
        if (task, epoch.epoch) == stop:
            raise Killed

    with pytest.raises(Killed):
        learn_sequence(kind(sizes), tiny, short, 3, folder=folder, observe=until)
    begun: list[int] = []
    method = kind(sizes)
    found = learn_sequence(method, tiny, short, 3, folder=folder, observe=lambda task, _: begun.append(task))
    assert sorted(set(begun)) == list(range(stop[0], 3))
    assert strip(found) == strip(expected)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, method.state_dict()[name]), name


def test_a_finished_sequence_is_read_and_more_tasks_are_learnt(tiny: TaskSequence, sizes: Sizes, tmp_path: Path) -> None:
    seen: list[int] = []
    two = learn_sequence(SinMo(sizes), tiny, short, num_tasks=2, folder=tmp_path)
    again = learn_sequence(SinMo(sizes), tiny, short, num_tasks=2, folder=tmp_path, observe=lambda task, _: seen.append(task))
    assert not seen and again == two
    three = learn_sequence(SinMo(sizes), tiny, short, folder=tmp_path, observe=lambda task, _: seen.append(task))
    assert set(seen) == {2} and three.tests[:2] == two.tests


def test_the_folder_of_another_sequence_is_refused(tiny: TaskSequence, sizes: Sizes, tmp_path: Path) -> None:
    learn_sequence(HAT(sizes, weight=0.5), tiny, short, num_tasks=1, folder=tmp_path)
    for method, settings, seed, where in (
        (SinMo(sizes), SHORT, 0, "method"),
        (HAT(sizes), SHORT, 0, "method.*0.5.*0.75"),
        (HAT(sizes, weight=0.5), Settings(lr=5e-3, batch_size=16, epochs=2), 0, "settings.*64.*16"),
        (HAT(sizes, weight=0.5), SHORT, 1, "seed 0, expected 1"),
    ):
        with pytest.raises(ConfigError, match=where):
            learn_sequence(method, tiny, lambda task, chosen=settings: chosen, seed, num_tasks=1, folder=tmp_path)
    (tmp_path / "sequence.pt").write_bytes(b"part of a file")
    with pytest.raises(CheckpointError, match="sequence.pt"):
        learn_sequence(HAT(sizes, weight=0.5), tiny, short, folder=tmp_path)


def test_seeds(tiny: TaskSequence, sizes: Sizes) -> None:
    """One seed gives one result, whatever the global generator; another seed another."""
    found = []
    for seed in (1, 1, 2):
        torch.rand(seed + len(found))
        method = SinMo(sizes)
        found.append((learn_sequence(method, tiny, short, seed, num_tasks=2), method.state_dict()))
    assert strip(found[0][0]) == strip(found[1][0]) != strip(found[2][0])
    for name, value in found[0][1].items():
        assert torch.equal(value, found[1][1][name])


def test_companions_come_from_their_own_training_samples(
    tiny: TaskSequence, sizes: Sizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the size asked for, epoch after epoch, all of them."""
    seen: list[Batch] = []
    plain = MTL.loss

    def watched(self: MTL, batch: Batch, place: Place, companions: Mapping[int, Batch]) -> Tensor:
        if self.task:
            assert set(companions) == {0}
            seen.append(companions[0])
        return plain(self, batch, place, companions)

    monkeypatch.setattr(MTL, "loss", watched)
    method, splits = MTL(sizes), [split_task(data) for data in tiny.tasks]
    learn_task(method, tiny, splits, 0, SHORT)
    learn_task(method, tiny, splits, 1, Settings(batch_size=32, epochs=2, companion_batch_size=20))
    train = tiny.tasks[0].samples[splits[0].train][:, 0]
    wanted = {tuple(row) for row in tiny.tasks[0].sequences[train].tolist()}
    assert {tuple(row) for batch in seen for row in batch.x.tolist()} == wanted
    partial = len(train) % 20 or 20
    per_epoch = math.ceil(len(train) / 20)
    assert [len(batch.x) for batch in seen[: per_epoch + 1]] == [20] * (per_epoch - 1) + [partial, 20]
    assert len(seen) > 2 * per_epoch
    assert not torch.equal(seen[0].x, seen[per_epoch].x), "in another order in each epoch"


def test_a_loss_that_is_not_finite_stops_the_training(tiny: TaskSequence, sizes: Sizes) -> None:
    class Broken(SinMo):
        def loss(self, batch: Batch, place: Place, companions: Mapping[int, Batch]) -> Tensor:
            return super().loss(batch, place, companions) * (math.nan if place.batch == 1 else 1.0)

    with pytest.raises(DivergedError, match="task 1, epoch 0, batch 1"):
        learn_task(Broken(sizes), tiny, [split_task(data) for data in tiny.tasks], 0, SETTINGS)


def test_bad_input_is_refused(tiny: TaskSequence, sizes: Sizes) -> None:
    for settings in ({"epochs": 0}, {"batch_size": 0}, {"patience": 0}, {"lr": 0.0}, {"companion_batch_size": 0}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            Settings(**settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="num_tasks is 4, expected 1 to 3"):
        learn_sequence(SinMo(sizes), tiny, num_tasks=4)
    method = SinMo(sizes)
    with pytest.raises(ConfigError, match="got task 1, expected 0"):
        method.start(1, 3)
    method.start(0, tiny.num_items)
    with pytest.raises(ConfigError, match="has started task 0"):
        learn_sequence(method, tiny)
    with pytest.raises(ConfigError, match="task 1 has 0 labels"):
        method.start(1, 0)
    with pytest.raises(ConfigError, match="got phase 'prune'"):
        method.begin_phase("prune")
    with pytest.raises(ConfigError, match="got task 1, expected 0..0"):
        method.encode(torch.zeros(1, 8, dtype=torch.int64), 1)


def test_settings_of_a_method_are_its_own_and_its_sizes(sizes: Sizes) -> None:
    method = HAT(sizes, protection="as_published", s_max=40.0)
    before = method.settings()
    assert before["name"] == "hat" and before["protection"] == "as_published" and before["s_max"] == 40.0
    assert before["channels"] == 16 and before["dilations"] == (1, 2)
    method.start(0, 5)
    method.begin_phase("train")
    method.eval()
    assert method.settings() == before
