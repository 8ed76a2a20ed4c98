"""A task that was stopped in the middle goes on from there, by every method, to the same bits."""

from __future__ import annotations

import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from teracon_fast.data import TaskSequence
from teracon_fast.errors import CheckpointError, ConfigError
from teracon_fast.methods import HAT, METHODS, Method, SinMo, Sizes, unfinished
from teracon_fast.methods.sequence import Epoch, Learnt, Settings, learn_sequence
from teracon_fast.train.checkpoint import Keeper, Unfinished
from teracon_fast.train.folder import RunStopped
from teracon_fast.train.loop import Position

SHORT = Settings(lr=5e-3, batch_size=64, epochs=2)


def short(task: int) -> Settings:
    return SHORT


class Interruptions:
    """Asks to stop at every n-th poll."""

    def __init__(self, every: int) -> None:
        self.every, self.polls, self.stops = every, 0, 0

    def poll(self) -> None:
        self.polls += 1
        if self.polls % self.every == 0:
            self.stops += 1
            raise RunStopped(signal.SIGTERM)


def strip(learnt: Learnt) -> tuple[object, ...]:
    """All but the times."""
    epochs = [[{**asdict(epoch), "seconds": 0.0} for epoch in of_task] for of_task in learnt.epochs]
    return learnt.results, learnt.tests, epochs


def assert_same(found: Learnt, method: Method, expected: Learnt, straight: Method) -> None:
    assert strip(found) == strip(expected)
    state = method.state_dict()
    assert list(state) == list(straight.state_dict())
    for name, value in straight.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("name", METHODS)
def test_stopped_again_and_again(name: str, tiny: TaskSequence, sizes: Sizes, tmp_path: Path) -> None:
    straight = METHODS[name](sizes)
    expected = learn_sequence(straight, tiny, short, 3)
    asked, seen = Interruptions(5), set[tuple[int, str, int]]()
    while True:
        method = METHODS[name](sizes)
        torch.rand(asked.stops)  # the global generator stands elsewhere
        try:
            found = learn_sequence(
                method, tiny, short, 3, folder=tmp_path, poll=asked.poll,
                observe=lambda task, epoch: seen.add((task, epoch.phase, epoch.epoch)),
            )  # fmt: skip
        except RunStopped as stopped:
            assert " in task " in str(stopped) and (tmp_path / "task.pt").is_file()
            continue
        break
    assert asked.stops >= 4
    assert_same(found, method, expected, straight)
    assert len(seen) == sum(map(len, expected.epochs)), "no epoch is trained twice, none left out"
    assert not (tmp_path / "task.pt").exists()


def test_a_killed_process_goes_on_from_the_last_save(
    tiny: TaskSequence, sizes: Sizes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved after every step; killed in the middle of an epoch, before anything could be saved."""

    class Killed(Exception):
        pass

    steps, plain = [0], SinMo.after_step

    def killing(self: SinMo) -> None:
        steps[0] += 1
        if steps[0] == 12:
            raise Killed
        plain(self)

    straight = SinMo(sizes)
    expected = learn_sequence(straight, tiny, short, 3)
    with monkeypatch.context() as patch:
        patch.setattr(SinMo, "after_step", killing)
        with pytest.raises(Killed):
            patch.setattr(Keeper, "due", True)
            learn_sequence(SinMo(sizes), tiny, short, 3, folder=tmp_path)
        method, before = SinMo(sizes), steps[0]
        found = learn_sequence(method, tiny, short, 3, folder=tmp_path)
    assert_same(found, method, expected, straight)
    per_epoch = sum(-(-round(0.8 * len(task.samples)) // 64) for task in tiny.tasks)
    assert steps[0] - before == 2 * per_epoch - 11, "the eleven steps before are not done again"


def test_without_time_passed_nothing_is_written(tiny: TaskSequence, sizes: Sizes, tmp_path: Path) -> None:
    def look(task: int, epoch: Epoch) -> None:
        assert not (tmp_path / "task.pt").exists()

    learn_sequence(SinMo(sizes), tiny, short, num_tasks=1, folder=tmp_path, observe=look, save_seconds=1e9)


def stopped(method: Method, tiny: TaskSequence, folder: Path, at: int) -> None:
    with pytest.raises(RunStopped):
        learn_sequence(method, tiny, short, 3, folder=folder, poll=Interruptions(at).poll)


def test_a_task_that_was_learnt_otherwise_and_a_damaged_file_are_refused(
    tiny: TaskSequence, sizes: Sizes, tmp_path: Path
) -> None:
    stopped(HAT(sizes, weight=0.5), tiny, tmp_path, 2)
    file = tmp_path / "task.pt"
    with pytest.raises(ConfigError, match=r"task\.pt: task 1 was learnt with method .*0\.5.*expected .*0\.75"):
        learn_sequence(HAT(sizes), tiny, short, 3, folder=tmp_path)
    with pytest.raises(ConfigError, match="task 1 was learnt with seed 3, expected 4"):
        learn_sequence(HAT(sizes, weight=0.5), tiny, short, 4, folder=tmp_path)
    saved: dict[str, Any] = torch.load(file, weights_only=True)
    torch.save({key: value for key, value in saved.items() if key != "optimizer"}, file)
    with pytest.raises(CheckpointError, match=r"task\.pt: not a task in training.*delete it"):
        learn_sequence(HAT(sizes, weight=0.5), tiny, short, 3, folder=tmp_path)
    part = {name: value for name, value in saved["state"].items() if "ln1" not in name}
    torch.save({**saved, "state": part}, file)
    with pytest.raises(CheckpointError, match=r"(?s)task\.pt: does not fit hat: .*ln1"):
        learn_sequence(HAT(sizes, weight=0.5), tiny, short, 3, folder=tmp_path)
    file.write_bytes(b"part of a file")
    with pytest.raises(CheckpointError, match=r"task\.pt"):
        learn_sequence(HAT(sizes, weight=0.5), tiny, short, 3, folder=tmp_path)


def test_the_file_of_an_earlier_task_is_left_alone(tiny: TaskSequence, sizes: Sizes, tmp_path: Path) -> None:
    """As a process leaves it that is killed between the two writes at a task's end."""
    stopped(SinMo(sizes), tiny, tmp_path, 2)
    old = (tmp_path / "task.pt").read_bytes()
    learn_sequence(SinMo(sizes), tiny, short, 3, num_tasks=1, folder=tmp_path)
    (tmp_path / "task.pt").write_bytes(old)
    straight, method = SinMo(sizes), SinMo(sizes)
    expected = learn_sequence(straight, tiny, short, 3)
    assert_same(learn_sequence(method, tiny, short, 3, folder=tmp_path), method, expected, straight)


def test_frozen_parameters_keep_no_gradient(sizes: Sizes) -> None:
    method = METHODS["peterrec"](sizes)
    method.start(0, sizes.num_items)
    method.begin_phase("train")
    for parameter in method.parameters():
        parameter.grad = torch.ones_like(parameter)
    method.start(1, 4)
    method.begin_phase("train")
    assert all(parameter.grad is None for parameter in method.parameters())


def test_what_is_kept_is_plain(sizes: Sizes, tiny: TaskSequence, tmp_path: Path) -> None:
    """Read without unpickling code, and with what the class says."""
    stopped(METHODS["teracon"](sizes), tiny, tmp_path, 30)
    saved = torch.load(tmp_path / "task.pt", weights_only=True)
    assert set(saved) == {"version", "plans", *Unfinished.__dataclass_fields__}
    assert set(saved["training"]) == {"rho", "draws"}


def test_writing_takes_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = [100.0]
    monkeypatch.setattr(unfinished.time, "monotonic", lambda: clock[0])

    def slow(file: Path, state: object) -> None:
        clock[0] += 9

    monkeypatch.setattr(unfinished, "save_state", slow)
    keeper = Keeper(tmp_path / "task.pt", [{}], 60.0, lambda: None)
    moments = [(159.0, False), (160.0, True)]
    for clock[0], due in moments:
        assert keeper.due is due
    keeper.save(0, Unfinished("train", Position(), {}, {}, {}, {}, []))
    for clock[0], due in [(169.0 + 60, False), (169.0 + 179, False), (169.0 + 180, True)]:
        assert keeper.due is due
