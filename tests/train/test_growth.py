"""A catalogue that grows: prepared again, the run grown, trained on, killed and resumed, and used."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet
from tiny_run import Recorder, StopAt, assert_same_run, events, tiny_config, weights

from teracon_fast.data import DatasetWriter, Dictionary, TaskSequence, open_dataset
from teracon_fast.data.seeds import derived_seed
from teracon_fast.data.user_input import Inputs
from teracon_fast.errors import ConfigError
from teracon_fast.infer.measure import measure
from teracon_fast.infer.open import open_run
from teracon_fast.infer.predictor import embed, predict, recommend
from teracon_fast.methods import Teracon
from teracon_fast.train.checkpoint import RunState, read_task_header
from teracon_fast.train.evaluation import evaluate
from teracon_fast.train.folder import RunStopped, trained_labels
from teracon_fast.train.growth import grow
from teracon_fast.train.run import task_split, train

LENGTH, USERS = 8, 120
OLD = np.arange(200, 230)
NEW = np.array([150, 260, 261, 199])  # two of them sort before the old ones
CLICKS = {False: np.arange(300, 324), True: np.append(np.arange(300, 324), [290, 400])}


def write(folder: Path, larger: bool, extend: Path | None = None, tasks: int = 2, rows: int = USERS) -> TaskSequence:
    """Next item, a click of 24 labels (26), a segment of 3 labels (4); the larger one has four more items."""
    random = np.random.default_rng(int(larger))
    items = np.concatenate([OLD, NEW]) if larger else OLD
    sequences = items[random.integers(0, len(items), (rows, LENGTH))]
    sequences[: len(items), -1] = items
    sequences[np.arange(LENGTH) < random.integers(0, LENGTH - 3, rows)[:, None]] = 0
    users, segments = np.arange(rows), np.array(["c", "b", "a", "0new"] if larger else ["c", "b", "a"])
    with DatasetWriter(folder, "shop", LENGTH, extend=extend) as writer:
        writer.add_task("next", "next_item", sequences, groups=users)
        for name, labels in (("click", CLICKS[larger]), ("segment", segments), ("city", np.array(["x", "y"])))[: tasks - 1]:
            writer.add_task(name, "label", sequences, labels=labels[users % len(labels)], groups=users)
    return open_dataset(folder)


def config(data: Path, run: Path, **changes: Any) -> Any:
    return tiny_config(data, run, split_by="user", first__epochs=2, **changes)


class Folders:
    """A run of three tasks, and the same run grown for a larger data set with a fourth task, both made once."""

    def __init__(self, home: Path) -> None:
        self.old, self.run, self.new, self.grown = (home / name for name in ("old", "run", "new", "grown"))
        self.home = home
        write(self.old, larger=False, tasks=3)
        train(config(self.old, self.run))
        self.before = contents(self.run)
        write(self.new, larger=True, extend=self.run, tasks=4)
        self.seen = Recorder()
        self.growth = grow(self.run, self.new, self.grown, self.seen)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("growth"))


@pytest.fixture(scope="module")
def finished(folders: Folders) -> Path:
    """The grown run with its fourth task trained."""
    run = folders.home / "finished"
    shutil.copytree(folders.grown, run)
    assert len(train(config(folders.new, run)).R) == 4
    return run


def test_old_ids_keep_their_indices_and_new_ones_follow(folders: Folders) -> None:
    old, new = open_dataset(folders.old), open_dataset(folders.new)
    assert old.item_ids().tolist() == ["0", *map(str, OLD)]
    assert new.item_ids().tolist() == [*old.item_ids(), "150", "199", "260", "261"]
    assert new.tasks[1].label_ids().tolist() == [*map(str, range(300, 324)), "290", "400"]
    assert new.tasks[2].label_ids().tolist() == ["a", "b", "c", "0new"]
    assert new.source["extends"] == str(folders.run)
    row = new.tasks[0].sequences[len(OLD)]
    assert row[-1] == 31 and new.item_ids()[row[-1]] == "150", "the samples use the extended indices"


def test_grown_weights_keep_old_rows_and_share_new_ones(folders: Folders) -> None:
    news = []
    for task in (1, 2, 3):
        before, after = weights(folders.run, task), weights(folders.grown, task)
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert torch.equal(after[name][: len(value)], value), name
            assert len(after[name]) == len(value) or name.startswith(("model.embeding", "model.task_classifier")), name
        method = open_run(folders.grown, task, "cpu").method
        assert method.sizes.num_items == 35 and method.labels == [35, 26, 4][:task]
        news.append((after["model.embeding.weight"][31:], after["model.task_classifier.0.weight"][31:]))
        assert read_task_header(folders.grown, task).notes == read_task_header(folders.run, task).notes
    assert all(torch.equal(a, b) for pair in news[1:] for a, b in zip(pair, news[0], strict=True))
    assert folders.growth.items == (31, 35) and folders.growth.labels == {1: (31, 35), 2: (24, 26), 3: (3, 4)}
    assert trained_labels(folders.grown) == {1: 31, 2: 24, 3: 3} and trained_labels(folders.run) == {}
    assert contents(folders.run) == folders.before, "the run that grows stays as it is"


def test_results_are_measured_again_on_the_larger_data(folders: Folders) -> None:
    data, results = open_dataset(folders.new), folders.growth.results
    ends = events(folders.grown, "task_end")
    assert results.tasks == ["next", "click", "segment"] and [len(row) for row in results.R] == [1, 2, 3]
    for j in range(3):
        method = open_run(folders.grown, j + 1, "cpu").method
        for i in range(j + 1):
            test = task_split(config(folders.new, folders.grown), data.tasks[i]).test
            metrics = evaluate(method, data.tasks[i], i, test, 64)
            assert results.R[j][i] == metrics[results.metric[i]]
            assert ends[j]["test"][str(i + 1)] == metrics
    assert json.loads((folders.grown / "results.json").read_text())["R"] == results.R
    [grown] = events(folders.grown, "grown")
    assert (grown["run"], grown["items"], grown["labels"]["2"]) == ("run", [31, 35], [24, 26])
    (end,) = events(folders.grown, "run_end")
    assert end["R"] == results.R and set(end["cost"]) == {"parameters", "kept_mib", "peak_mib", "device"}
    assert len(events(folders.grown, "step")) == len(events(folders.run, "step")) > 0
    assert {(task, split) for task, split, *_ in folders.seen.evaluated} == {(n, "test") for n in (1, 2, 3)}
    assert not folders.seen.messages


def test_teacher_and_student_have_the_same_new_rows(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Teracon] = []

    def look(trainer: Any, saved: Any) -> None:
        begun.append(trainer.method)
        raise InterruptedError

    shutil.copytree(folders.grown, tmp_path / "run")
    monkeypatch.setattr("teracon_fast.train.loop.Trainer.train", look)
    with pytest.raises(InterruptedError):
        train(config(folders.new, tmp_path / "run"))
    teacher, student = begun[0].teacher, begun[0].model
    assert teacher is not None
    assert teacher.labels == [35, 26, 4] and student.labels == [35, 26, 4, 2]
    for name, value in teacher.state_dict().items():
        assert ".mlp" in name or torch.equal(student.state_dict()[name], value), name
    method = open_run(folders.run, 3, "cpu").method
    assert isinstance(method, Teracon)
    generator = torch.Generator().manual_seed(derived_seed(0, 3, "grown"))
    fresh = method.model.grown(35, [35, 26, 4], generator)
    assert torch.equal(teacher.embeding.weight, fresh.embeding.weight)


@pytest.mark.parametrize("count", [2, 3])
def test_a_grown_run_goes_on_to_the_same_bits(folders: Folders, finished: Path, tmp_path: Path, count: int) -> None:
    run = tmp_path / "run"
    shutil.copytree(folders.grown, run)
    stops = StopAt(lambda kind, number: kind == "step" and number >= count, signal.SIGTERM)
    with pytest.raises(RunStopped, match="in task 4"):
        train(config(folders.new, run), stops)
    seen = Recorder()
    train(config(folders.new, run), seen)
    assert any("resuming task 4" in text for text in seen.messages) and len(stops.steps) == count
    assert_same_run(run, finished, 4)
    assert (run / "results.json").read_bytes() == (finished / "results.json").read_bytes()
    before, after = weights(folders.grown, 3), weights(run, 4)
    assert not torch.equal(after["model.embeding.weight"][31:], before["model.embeding.weight"][31:]), "new items learn in task 4"
    assert trained_labels(run) == {1: 31, 2: 24, 3: 3}


def csv(path: Path, rows: list[list[int]]) -> Path:
    path.write_text("\n".join(",".join(map(str, row)) for row in rows) + "\n")
    return path


def test_inference_knows_new_items_and_leaves_out_untrained_labels(finished: Path, folders: Folders, tmp_path: Path) -> None:
    run = open_run(finished, device="cpu")
    assert [task.trained for task in run.tasks] == [31, 24, 3, 2] and len(run.tasks[0].labels) == 35
    source, output = csv(tmp_path / "u.csv", [[200, 150, 261], [199], [205, 206]]), tmp_path / "out.parquet"

    def inputs() -> Inputs:
        return Inputs(source, run.items, run.length)

    embed(run, inputs(), output, [1, 4])
    x = torch.zeros(3, LENGTH, dtype=torch.int64)
    x[0, -3:], x[1, -1], x[2, -2:] = torch.tensor([1, 31, 34]), 32, torch.tensor([6, 7])
    expected = {task: run.method.encode(x, task - 1).numpy() for task in (1, 4)}
    for task, value in expected.items():
        got = np.asarray(parquet.read_table(output)[f"task_{task}"].to_pylist(), dtype=np.float32)
        np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-6)
    recommend(run, inputs(), output, 1, 31, exclude_seen=True)
    items = parquet.read_table(output)["items"].to_pylist()
    assert [set(row) for row in items] == [set(map(str, OLD)) - gone for gone in ({"200"}, set(), {"205", "206"})]
    recommend(run, inputs(), output, 2, 24)
    assert all(set(row) == set(map(str, range(300, 324))) for row in parquet.read_table(output)["items"].to_pylist())
    with pytest.raises(ConfigError, match="top-k: got 25, expected 1 to 24"):
        recommend(run, inputs(), output, 2, 25)
    predict(run, inputs(), output, 3)
    table = parquet.read_table(output)
    assert table.column_names == ["line", "label", "probability", "p_a", "p_b", "p_c"]
    np.testing.assert_allclose(sum(table[name].to_numpy() for name in table.column_names[3:]), 1, rtol=1e-5)
    final = json.loads((finished / "results.json").read_text())["final"]
    assert {str(number): metrics for number, metrics in measure(run).items()} == final


def test_a_dictionary_that_is_not_the_models_is_refused(folders: Folders, tmp_path: Path) -> None:
    shutil.copytree(folders.grown, tmp_path / "run")
    shutil.copy(folders.old / "items.parquet", tmp_path / "run" / "items.parquet")
    with pytest.raises(ConfigError, match=r"items\.parquet: has 31 ids, expected 35 as in the run's weights"):
        open_run(tmp_path / "run", device="cpu")


def test_a_run_grows_again(finished: Path, folders: Folders, tmp_path: Path) -> None:
    """Labels of the first growth stay untrained, labels of a task trained in between count as trained."""
    with DatasetWriter(tmp_path / "newer", "shop", LENGTH, extend=folders.new) as writer:
        sequences = np.append(OLD, [500, 500])[np.random.default_rng(3).integers(0, 32, (60, LENGTH))]
        writer.add_task("next", "next_item", sequences)
        for name, labels in (("click", [300, 301]), ("segment", ["a", "b"]), ("city", ["x", "z"])):
            writer.add_task(name, "label", sequences, labels=np.array(labels)[np.arange(60) % 2])
    found = grow(finished, tmp_path / "newer", tmp_path / "grown")
    assert found.items == (35, 36) and found.labels == {1: (35, 36), 2: (26, 26), 3: (4, 4), 4: (2, 3)}
    assert trained_labels(tmp_path / "grown") == {1: 31, 2: 24, 3: 3, 4: 2}
    assert len(events(tmp_path / "grown", "grown")) == 2
    # The labels of both growths are fitted, and of the items, of which task 4 has trained the earlier ones, the new one.
    grow(finished, tmp_path / "newer", tmp_path / "fitted", epochs=1)
    assert trained_labels(tmp_path / "fitted") == {2: 24, 3: 3, 4: 2}
    assert_moved(tmp_path, first_item=35, first_label=31)
    grow(finished, folders.new, tmp_path / "none", epochs=1)  # no new item, but labels that are untrained
    before, after = weights(finished, 4), weights(tmp_path / "none", 4)
    names = "embeding.weight", "task_classifier.0.bias"
    kept = {name: torch.equal(after[f"model.{name}"], before[f"model.{name}"]) for name in names}
    assert kept == {"embeding.weight": True, "task_classifier.0.bias": False}
    assert trained_labels(tmp_path / "none") == {2: 24, 3: 3}


def assert_moved(home: Path, first_item: int, first_label: int) -> None:
    """Of fitted against grown, exactly the rows from the first ones on."""
    before, after = weights(home / "grown", 4), weights(home / "fitted", 4)
    head = "model.task_classifier.0"
    firsts = {"model.embeding.weight": first_item, f"{head}.weight": first_label, f"{head}.bias": first_label}
    for name, value in before.items():
        moved = (after[name] != value).reshape(len(value), -1).any(1)
        assert moved.nonzero().flatten().tolist() == list(range(firsts.get(name, len(value)), len(value))), name


def test_fresh_training_forgets_the_growth(folders: Folders, tmp_path: Path) -> None:
    shutil.copytree(folders.grown, tmp_path / "run")
    train(config(folders.new, tmp_path / "run", num_tasks=1), fresh=True)
    assert trained_labels(tmp_path / "run") == {} and open_run(tmp_path / "run", device="cpu").tasks[0].trained == 35


def test_a_run_of_one_task_split_by_sample(folders: Folders, tmp_path: Path) -> None:
    train(tiny_config(folders.old, tmp_path / "run", num_tasks=1, first__epochs=1))
    seen = Recorder()
    grow(tmp_path / "run", folders.new, tmp_path / "grown", seen)
    assert any("may have been trained on" in text for text in seen.messages)
    after = train(tiny_config(folders.new, tmp_path / "grown", num_tasks=2, first__epochs=1))
    assert len(after.R) == 2 and open_run(tmp_path / "grown", 2, "cpu").method.labels == [35, 26]


def walking(folder: Path, items: int, extend: Path | None = None) -> TaskSequence:
    """A next-item task that can be learned: item after item, in a circle; and two segments."""
    random = np.random.default_rng(items)
    sequences = (random.integers(0, items, (240, 1)) + np.arange(LENGTH)) % items + 1
    with DatasetWriter(folder, "walks", LENGTH, extend=extend) as writer:
        writer.add_task("next", "next_item", sequences)
        writer.add_task("segment", "label", sequences, labels=sequences[:, -1] % 2)
    return open_dataset(folder)


def test_fitting_new_rows_learns_new_items_and_changes_nothing_else(tmp_path: Path) -> None:
    settings = {"num_tasks": 2, "split_by": "user", "first__epochs": 10, "first__batch_size": 16, "model__channels": 32}
    walking(tmp_path / "old", 24)
    train(tiny_config(tmp_path / "old", tmp_path / "run", **settings))
    walking(tmp_path / "new", 30, extend=tmp_path / "run")
    seen, again = Recorder(), Recorder()
    plain = grow(tmp_path / "run", tmp_path / "new", tmp_path / "plain")
    fitted = grow(tmp_path / "run", tmp_path / "new", tmp_path / "fitted", seen, epochs=15)
    assert len(fitted.losses) == 15 and fitted.losses[-1] < 0.7 * fitted.losses[0]
    [event] = events(tmp_path / "fitted", "grown")
    assert event["fit_losses"] == fitted.losses and plain.losses == []
    assert sum("new rows, epoch" in text for text in seen.messages) == 15
    assert len(seen.steps) == 15 * seen.steps[0].num_batches
    # The last task's network is what the rows are fitted to; nobody else's rows, and no weight, has moved.
    assert fitted.results.R[1][0] > plain.results.R[1][0] + 0.05
    for task in (1, 2):
        before, after, initial = (weights(tmp_path / name, task) for name in ("run", "fitted", "plain"))
        for name, value in before.items():
            assert torch.equal(after[name][: len(value)], value), name
        for name in ("model.embeding.weight", "model.task_classifier.0.weight", "model.task_classifier.0.bias"):
            assert torch.equal(after[name][25:], weights(tmp_path / "fitted", 1)[name][25:])
            assert not bool((after[name][25:] == initial[name][25:]).any()), name
    assert trained_labels(tmp_path / "plain") == {1: 25} and trained_labels(tmp_path / "fitted") == {}
    run = open_run(tmp_path / "fitted", device="cpu")
    source, output = csv(tmp_path / "u.csv", [list(range(start, start + 7)) for start in range(19, 24)]), tmp_path / "out.parquet"
    recommend(run, Inputs(source, run.items, run.length), output, 1, 5)
    found = parquet.read_table(output)["items"].to_pylist()
    assert sum(str(start + 7) in row for start, row in zip(range(19, 24), found, strict=True)) >= 4, found
    csv(source, [list(range(start, start + 7)) for start in range(1, 17)])
    recommend(run, Inputs(source, run.items, run.length), output, 1, 3)
    found = parquet.read_table(output)["items"].to_pylist()
    assert all(int(item) <= 24 for row in found for item in row), "where an old item follows, no new one is in the way"
    grow(tmp_path / "run", tmp_path / "new", tmp_path / "again", again, epochs=15)
    assert_same_run(tmp_path / "again", tmp_path / "fitted", 2)


def test_a_fit_needs_sequences_with_new_items(folders: Folders, tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "same", "shop", LENGTH, extend=folders.run) as writer:
        sequences = OLD[np.random.default_rng(3).integers(0, 30, (60, LENGTH))]
        writer.add_task("next", "next_item", sequences)
        for name, label in (("click", 300), ("segment", "a")):
            writer.add_task(name, "label", sequences, labels=np.array([label] * 60))
    with pytest.raises(ConfigError, match="got no training sequence with a new item"):
        grow(folders.run, tmp_path / "same", tmp_path / "out", epochs=1)
    found = grow(folders.run, tmp_path / "same", tmp_path / "out")
    assert found.items == (31, 31) and trained_labels(tmp_path / "out") == {}, "more events of the same catalogue"
    assert weights(tmp_path / "out", 3).keys() == weights(folders.run, 3).keys()


def rewritten(folders: Folders, target: Path, name: str, change: Any) -> Path:
    shutil.copytree(folders.new, target)
    ids = Dictionary.load(target / name).ids.tolist()
    Dictionary(change(ids)).save(target / name)
    return target


def test_data_that_do_not_extend_the_run_are_refused(folders: Folders, tmp_path: Path) -> None:
    write(tmp_path / "anew", larger=True, tasks=4)
    with pytest.raises(ConfigError, match=r"item with index 1 is '150', expected '200' .* prepare the data with --extend"):
        grow(folders.run, tmp_path / "anew", tmp_path / "out")
    swapped = rewritten(folders, tmp_path / "swapped", "task3/labels.parquet", lambda ids: [*ids[:1], *ids[2:0:-1], ids[3]])
    with pytest.raises(ConfigError, match=r"label of task 3 \(segment\), with index 1 is 'c', expected 'b'"):
        grow(folders.run, swapped, tmp_path / "out")
    with pytest.raises(ConfigError, match="item with index 31 is none, expected '150'"):
        grow(folders.grown, folders.old, tmp_path / "out")
    write(tmp_path / "fewer", larger=True, extend=folders.run, tasks=2)
    with pytest.raises(ConfigError, match=r"got the tasks \['next', 'click'\], expected \['next', 'click', 'segment'\]"):
        grow(folders.run, tmp_path / "fewer", tmp_path / "out")
    with DatasetWriter(tmp_path / "short", "x", extend=folders.run) as writer:
        writer.add_task("next", "next_item", np.array([[200, 201]]))
    with pytest.raises(ConfigError, match="got sequences of length 2, expected 8"):
        grow(folders.run, tmp_path / "short", tmp_path / "out")
    with pytest.raises(ConfigError, match="grown: exists already"):
        grow(folders.run, folders.new, folders.grown)
    with pytest.raises(ConfigError, match=r"old: has no config\.toml"):
        grow(folders.old, folders.new, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    with pytest.raises(ConfigError, match=r"(?s)data.num_items: got 35, expected 31.*by way of `teracon grow`"):
        train(config(folders.new, folders.run))


def test_a_task_in_training_is_refused_and_a_failure_leaves_nothing(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = StopAt(lambda kind, number: kind == "step" and number >= 2, signal.SIGTERM)
    with pytest.raises(RunStopped):
        train(config(folders.old, tmp_path / "run"), stops)
    with pytest.raises(ConfigError, match="task 1 is in training, expected a run between two tasks"):
        grow(tmp_path / "run", folders.new, tmp_path / "out")

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunState, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        grow(folders.run, folders.new, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_from_the_command_line(folders: Folders, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from teracon_fast.cli.app import app

    output = tmp_path / "grown"
    result = CliRunner().invoke(app, ["grow", str(folders.run), "--data", str(folders.new), "-o", str(output)])
    assert result.exit_code == 0, result.output
    assert "items, with the pad: 31 -> 35" in result.stdout and "labels of task 2 (click): 24 -> 26" in result.stdout
    line = next(line for line in result.stdout.splitlines() if "teracon train" in line)
    arguments = [*line.partition("teracon ")[2].split(), "--no-report", "--num-tasks", "3"]
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0 and "this run is finished" in again.stdout
    assert weights(output, 3).keys() == weights(folders.grown, 3).keys()
