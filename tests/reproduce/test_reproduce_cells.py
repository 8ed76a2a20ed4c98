"""Whole experiments on a tiny data set: what is trained, what is not trained again, what fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from teracon_fast import reproduce as package
from teracon_fast.cli.app import app
from teracon_fast.data import DatasetWriter, TaskSequence
from teracon_fast.errors import ConfigError
from teracon_fast.methods import METHODS, SinMo, Sizes, Teracon
from teracon_fast.methods.sequence import learn_sequence
from teracon_fast.model.checkpoints import load_state
from teracon_fast.reproduce import Cell, Choices, make_plan, read_result, reproduce
from teracon_fast.reproduce import cells as cells_module
from teracon_fast.reproduce.plan import cell_folder, identity, load_plugin
from teracon_fast.train.folder import locked

RUNNER = CliRunner()
BROKEN = """
from teracon_fast.methods import METHODS, SinMo

class Broken(SinMo):
    name = "broken"

    def loss(self, batch, place, companions):
        raise RuntimeError("this method is broken")

METHODS["broken"] = Broken
"""


class Stopped(Exception):
    """In place of a kill signal."""


def without_times(file: Path) -> dict[str, Any]:
    saved = json.loads(file.read_text("utf-8"))
    return {"cell": saved["cell"], **{key: saved["result"][key] for key in ("R", "epochs", "parameters", "curves", "tasks")}}


def test_table_2_and_nothing_is_trained_twice(choices: Callable[..., Choices], tiny: TaskSequence) -> None:
    wanted = choices(methods=("sinmo", "fine_all"), seeds=(0, 1))
    seen: list[tuple[str, str, int]] = []
    first = reproduce("table2", wanted, report=lambda event, cell, text: seen.append((event, cell.method, cell.seed)))
    assert [(cell.method, cell.seed) for cell in first.ran] == [("sinmo", 0), ("sinmo", 1), ("fine_all", 0), ("fine_all", 1)]
    assert [event for event, *_ in seen if event != "epoch"] == ["start", "done"] * 4
    assert sum(event == "epoch" for event, *_ in seen) == 4 * 3, "one epoch a task"
    parts = ("", "_frequency", "_transfer", "_cost", "_R")
    assert [file.name for file in first.files] == ["table2.md", *(f"table2{part}.csv" for part in parts)]

    # What is printed is what the driver gives.
    setup, cell = first.plan.setup, first.plan.cells[1]
    straight = learn_sequence(setup.new_method(cell, tiny.num_items), tiny, lambda task: setup.task_settings(task + 1), seed=1)
    result = first.found[0].cells[1]
    assert result is not None and result.R == straight.results.R and result.tasks == straight.results.tasks
    per_network = 31 * 8 + 4 * (8 * 8 * 3 + 8) + 4 * 2 * 8  # embedding, convolutions, LayerNorms
    assert result.parameters == 3 * per_network + sum(9 * task.num_labels for task in tiny.tasks)
    assert result.kept_mib == pytest.approx(4 * result.parameters / 2**20) and result.peak_mib > 50
    page = first.files[0].read_text("utf-8")
    means = [np.mean([of_seed.R[-1][i] for of_seed in first.found[0].cells if of_seed]) for i in range(3)]
    assert all(f"{mean:.4f} ± " in page for mean in means)

    def texts() -> dict[str, str]:
        return {file.name: file.read_text("utf-8") for file in first.files}

    before = texts()
    assert reproduce("table2", wanted).ran == [] and texts() == before
    folder = first.plan.folder(cell)
    kept = without_times(folder / "result.json")
    (folder / "result.json").unlink()
    assert reproduce("table2", wanted).ran == [cell], "a deleted one is trained alone"
    assert without_times(folder / "result.json") == kept
    assert not (folder / "sequence.pt").exists()
    assert "task 3 of 3 (task 3), train, epoch 1" in (folder / "log.txt").read_text("utf-8")
    more = make_plan("table2", choices(methods=("sinmo", "fine_all"), overrides={"later.lr": 1e-3}))
    assert all(read_result(more.setup, cell, tiny) is None for cell in more.cells), "other settings are other cells"
    shared = make_plan("table3", choices(methods=("fine_all",), seeds=(0, 1)))
    have = [cell for cell in shared.cells if read_result(shared.setup, cell, tiny) is not None]
    assert len(have) == 4 and len(shared.cells) == 6, "the original order is there from table 2"


def test_a_stopped_cell_goes_on_to_the_same_curves(
    choices: Callable[..., Choices], tiny: TaskSequence, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Killed in the third task; the curves of the second, which is not trained again, are still there."""
    wanted = choices(methods=("fine_all",), overrides={"later.epochs": 2})
    plan = make_plan("figure3", wanted)
    (cell,) = plan.cells
    assert cell.watch == (0, 1, 2)
    noted: list[str] = []

    def note(text: str) -> None:
        noted.append(text)
        if "task 3" in text:
            raise Stopped

    with pytest.raises(Stopped):
        package.run_cell(plan.setup, cell, "cpu", 1, note)
    assert read_result(plan.setup, cell, tiny) is None and len(noted) == 4
    done = reproduce("figure3", wanted)
    log = (plan.folder(cell) / "log.txt").read_text("utf-8")
    assert log.count("goes on from where it was stopped") == 1 and log.index("task 3") < log.index("goes on")
    (result,) = done.found[0].cells
    straight = reproduce("figure3", choices(methods=("fine_all",), overrides={"later.epochs": 2}, output=tmp_path / "straight"))
    (expected,) = straight.found[0].cells
    assert result is not None and expected is not None
    assert result.curves == expected.curves and result.R == expected.R
    assert [len(result.curves[task]) for task in range(3)] == [1, 2, 2]
    assert max(result.curves[2]) == pytest.approx(result.R[2][2]) or result.R[2][2] in result.curves[2]
    assert done.files[-1].suffix == ".png" and done.files[-1].read_bytes().startswith(b"\x89PNG")


def test_a_noisy_task_is_learnt_among_the_others(choices: Callable[..., Choices]) -> None:
    done = reproduce("table4", choices(methods=("fine_all",)))
    assert [cell.order for cell in done.ran] == [(1, 2, 3), (1, 0, 2, 3)], "after half of the sequence"
    noisy, plain = done.found[0].cells[0], done.found[0].plain[0]
    assert noisy is not None and plain is not None and noisy.tasks == ["next", "noise", "task 2", "task 3"]
    assert noisy.R[0] == plain.R[0], "before it nothing differs"
    assert "T' noise" in done.files[0].read_text("utf-8")


def test_processes_plugins_and_a_failure(tiny: TaskSequence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at a time; the broken one is reported, the other is trained, and the exit code is 1."""
    plugin = tmp_path / "broken.py"
    plugin.write_text(BROKEN, "utf-8")
    monkeypatch.setitem(METHODS, "broken", SinMo)  # taken out again with the test
    out = tmp_path / "out"
    arguments = ["reproduce", "table2", "--data", str(tiny.path), "--output", str(out), "--quick", "--plugin", str(plugin)]
    arguments += ["--methods", "broken,sinmo", "--jobs", "2"]
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == 1, result.output
    assert "failed: broken, tasks 1,2,3, seed 0: RuntimeError: this method is broken" in result.stderr
    assert "2 runs: 1 trained now, 0 finished before, 1 failed" in result.stdout
    folders = {path.name.split("-")[0]: path for path in (out / "cells").iterdir()}
    assert "this method is broken" in (folders["broken"] / "error.txt").read_text("utf-8")
    assert "epoch 1" in (folders["sinmo"] / "log.txt").read_text("utf-8")
    assert "1 of 2 runs are not finished" in (out / "table2.md").read_text("utf-8")
    again = RUNNER.invoke(app, [*arguments[:-2], "--methods", "broken,sinmo"])
    assert again.exit_code == 1 and "0 trained now, 1 finished before, 1 failed" in again.stdout


def endless(tiny: TaskSequence, folder: Path, jobs: int) -> subprocess.Popen[str]:
    """Two cells whose first task does not end; comes back when each that is running has an epoch behind it."""
    settings = folder / "endless.toml"
    settings.write_text("[model]\nchannels = 8\n[first]\nepochs = 1000000\npatience = 1000000\n", "utf-8")
    command = [sys.executable, "-m", "teracon_fast", "reproduce", "table2", "--data", str(tiny.path), "--output", str(folder)]
    command += ["--methods", "sinmo,fine_all", "--config", str(settings), "--jobs", str(jobs)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    while len(list(folder.glob("cells/*/progress.json"))) < jobs:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    return process


@pytest.mark.parametrize(("jobs", "signum"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_stops_all_processes_and_the_same_line_goes_on(
    jobs: int, signum: signal.Signals, tiny: TaskSequence, tmp_path: Path
) -> None:
    process = endless(tiny, tmp_path, jobs)
    os.killpg(process.pid, signum)  # as a terminal does, and many a scheduler
    said = process.communicate()[0]
    assert process.returncode == 128 + signum and f"stopped by {signum.name}" in said and "Traceback" not in said
    folders = [path for path in (tmp_path / "cells").iterdir() if (path / "task.pt").is_file()]
    assert len(folders) == jobs and not list(tmp_path.glob("cells/*/error.txt"))
    for folder in folders:
        with locked(folder):  # nobody trains there any more
            position = load_state(folder / "task.pt")["position"]
        assert position["epoch"] >= 1 and position["step"] > 0


def test_a_child_ends_with_the_process_that_started_it(tiny: TaskSequence, tmp_path: Path) -> None:
    process = endless(tiny, tmp_path, 2)
    process.kill()
    process.wait()
    while len(list(tmp_path.glob("cells/*/task.pt"))) < 2:
        time.sleep(0.05)


def test_variants_and_settings_reach_the_methods(choices: Callable[..., Choices]) -> None:
    plan = make_plan("table5", choices(preset="ml"))
    methods = [plan.setup.new_method(cell, 31) for cell in plan.cells]
    assert [method.settings()["mask"] for method in methods] == ["none", "positive_only", "relation"]
    assert isinstance(methods[0], Teracon) and methods[0].alpha == (0.7, 0.9), "Table 10"
    assert [row.label for row in plan.rows][0] == "TERACON (w/o relation)"
    reverse = make_plan("table2", choices(preset="ml", order="reversed", methods=("teracon", "conure")))
    teracon, conure = (reverse.setup.new_method(cell, 31) for cell in reverse.rows[0].cells + reverse.rows[1].cells)
    assert isinstance(teracon, Teracon) and teracon.alpha == (0.9, 0.7), "settings belong to a task, not to its place"
    assert conure.settings()["pruning"] == (0.7, 0.7, 0.8)
    assert [reverse.setup.task_settings(number).lr for number in (1, 3, 2, 0)] == [1e-3, 5e-4, 1e-4, 1e-4]
    sampling = make_plan("table6", choices())
    methods = [sampling.setup.new_method(cell, 31) for cell in sampling.cells]
    assert [method.settings()["sampling"] for method in methods] == ["minimum", "adaptive", "all"]
    own = make_plan("table2", choices(methods=("conure",), options={"conure": {"block": "pre-activation", "pruning": 0.5}}))
    assert own.setup.new_method(own.cells[0], 31).settings()["pruning"] == 0.5
    held = make_plan("figure2", choices(methods=("hat",), held_back=2))
    assert held.cells == (Cell("hat", (), (1, 2), 0, (1,)),)


def test_other_data_of_the_same_shape_are_other_cells(choices: Callable[..., Choices], tiny: TaskSequence) -> None:
    plan = make_plan("table2", choices(methods=("sinmo",)))
    samples = np.array(tiny.tasks[1].samples)
    samples[0, 1] = (samples[0, 1] + 1) % 30
    other = replace(tiny, tasks=[tiny.tasks[0], replace(tiny.tasks[1], samples=samples), tiny.tasks[2]])
    cell = plan.cells[0]
    assert cell_folder(plan.setup, cell, tiny) == plan.folder(cell) != cell_folder(plan.setup, cell, other)
    first = tiny.tasks[0]
    sequences, groups = np.array(first.sequences), np.array(first.groups)
    sequences[0, -2] = 1 + sequences[0, -2] % 30
    groups[0] += 1000
    for changed in (replace(first, sequences=sequences), replace(first, groups=groups)):
        other = replace(tiny, tasks=[changed, *tiny.tasks[1:]])
        assert cell_folder(plan.setup, cell, other) != plan.folder(cell), "the same samples of other sequences or users"


OWN = """
from teracon_fast.methods import METHODS, SinMo

class Own(SinMo):
    name = "own"

    def __init__(self, sizes, rate: float = 1.0):
        super().__init__(sizes)
        self._rate = rate  # no public attribute

METHODS["own"] = Own
"""


def test_other_code_or_hidden_settings_of_a_plugin_are_other_cells(
    choices: Callable[..., Choices], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "own", SinMo)  # taken out again with the test
    folders = []
    for name, text, rate in (("a", OWN, 1.0), ("b", OWN, 1.0), ("c", OWN, 2.0), ("d", OWN + "# edited", 1.0)):
        file = tmp_path / f"{name}.py"
        file.write_text(text, "utf-8")
        plan = make_plan("table2", choices(methods=("own",), plugins=(file,), options={"own": {"rate": rate}}))
        folders.append(plan.folder(plan.cells[0]))
    assert folders[0] == folders[1], "the same code in another place"
    assert len(set(folders)) == 3
    builtin = make_plan("table2", choices(methods=("sinmo",)))
    assert "code" not in identity(builtin.setup, builtin.cells[0], builtin.dataset)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_module", "plugin: .*p.py, line 1: ModuleNotFoundError"),
        ("\n\nraise ValueError('too bad')", "p.py, line 3: ValueError: too bad"),
        ("def f(:", "p.py: SyntaxError"),
        ("from teracon_fast.methods import METHODS\nMETHODS['own'] = 3", "METHODS\\['own'\\]: got 3, expected a subclass"),
        (
            "from teracon_fast.methods import METHODS, Method\nclass Own(Method):\n name = 'own'\nMETHODS['own'] = Own",
            "without _groups, _start, encode, loss, expected a subclass",
        ),
        (
            "from teracon_fast.methods import METHODS, SinMo\nclass Own(SinMo):\n def __init__(self): ...\nMETHODS['own'] = Own",
            "own: its constructor refuses sizes",
        ),
    ],
)
def test_a_plugin_that_fails_is_named(
    text: str, message: str, choices: Callable[..., Choices], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "own", SinMo)
    (tmp_path / "p.py").write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=message):
        make_plan("table2", choices(methods=("own",), plugins=(tmp_path / "p.py",)))


@pytest.mark.parametrize(
    ("method", "name", "given", "message"),
    [
        ("hat", "weight", "abc", "hat.weight: got 'abc', expected float"),
        ("hat", "weight", float("nan"), "hat.weight: got nan"),
        ("hat", "weight", -1, "hat: weight is -1"),
        ("hat", "s_max", 0.5, "hat: s_max is 0.5, expected at least 1"),
        ("hat", "cosh_bound", 0, "hat: cosh_bound is 0"),
        ("hat", "train_items", "yes", "hat.train_items: got 'yes', expected bool"),
        ("hat", "sizes", 3, "hat has no setting 'sizes'"),
        ("peterrec", "reduction", 2.5, "peterrec.reduction: got 2.5, expected int"),
        ("teracon", "sampling", "most", "teracon.sampling: got 'most', expected Literal\\['adaptive', 'minimum', 'all'\\]"),
        ("teracon", "student_mask", "both", "teracon.student_mask: got 'both'"),
        ("teracon", "alpha", "x", "teracon.alpha: got 'x'"),
        ("teracon", "task_embedding_range", 3, "teracon.task_embedding_range: got 3"),
        ("piggyback", "threshold", True, "piggyback.threshold: got True"),
        ("conure", "pruning", (0.5, 0.5), "task 2 is one too many for the pruning ratios"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_trained(
    method: str, name: str, given: object, message: str, choices: Callable[..., Choices]
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan("table2", choices(methods=(method,), options={method: {name: given}}))


def test_a_task_too_small_to_split_is_refused_before_anything_is_trained(
    choices: Callable[..., Choices], tmp_path: Path
) -> None:
    with DatasetWriter(tmp_path / "small", name="small", length=4) as writer:
        items = np.arange(1, 81)[:, None] % 7 + np.arange(1, 5)
        writer.add_task("next", "next_item", items, groups=np.arange(80))
        writer.add_task("few", "label", items[:2], labels=np.arange(2))
    with pytest.raises(ConfigError, match="few.* has 2 samples"):
        reproduce("table2", choices(data=tmp_path / "small", methods=("sinmo",)))
    assert not (tmp_path / "out").exists()


def test_pages_of_other_orders_do_not_replace_each_other(choices: Callable[..., Choices]) -> None:
    def name(experiment: str, **changes: Any) -> str:
        return make_plan(experiment, choices(methods=("teracon",), **changes)).file_name

    assert name("table6") == name("table6", order="original") == "table6"
    assert name("table6", order="reversed") == "table6_reversed", "the paper's Table 9"
    assert name("table2", order="1, 3,2", noise_at=2) == "table2_1-3-2_noise2"
    assert name("figure2", held_back=2) == "figure2_task2"


def test_alpha_of_each_task(tiny: TaskSequence) -> None:
    method = Teracon(Sizes(tiny.num_items, channels=8, dilations=(1,)), alpha=(0.7, 0.9))
    found = []
    for task in range(4):
        method.start(task, tiny.num_items if task == 0 else 3)
        found.append(method.present_alpha)
    assert found[1:] == [0.7, 0.9, 0.9], "the last counts for those that follow"
    for alpha in ((), (0.5, -0.1), -1.0):
        with pytest.raises(ConfigError, match="alpha"):
            Teracon(Sizes(tiny.num_items), alpha=alpha)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("table9", {}, "got 'table9', expected one of table2"),
        ("table2", {"methods": ("sinmo", "lstm")}, "got method 'lstm', expected one of sinmo"),
        ("table2", {"seeds": (0, 0)}, "seeds: got \\[0, 0\\]"),
        ("table2", {"seeds": ()}, "seeds"),
        ("table2", {"order": "2,1,3"}, "order: got '2,1,3'"),
        ("table2", {"noise_at": 1}, "noise-at: got 1"),
        ("table2", {"noise_at": 0}, "noise-at: got 0"),
        ("table4", {"noise_at": 0}, "noise-at: got 0"),
        ("figure2", {"noise_at": 4}, "noise-at: got 4, expected 2 to 3: the held-back task stays last"),
        ("figure2", {"held_back": 0}, "held-back: got task 0, expected 2 to 3"),
        ("table2", {"held_back": 3}, "held-back: got task 3 for table2"),
        ("table2", {"methods": ("sinmo", "hat", "sinmo")}, "methods: got sinmo, hat, sinmo, expected each once"),
        ("table2", {"methods": ()}, "methods: got none"),
        ("table2", {"methods": ("sinmo",), "options": {"hat": {"wait": 1}}}, "hat has no setting 'wait'"),
        ("figure2", {"held_back": 1}, "held-back: got task 1, expected 2 to 3"),
        ("table5", {"methods": ("hat",)}, "hat has no setting 'mask'"),
        ("table2", {"overrides": {"precision": "bf16"}}, "expected 'fp32'"),
        ("table2", {"overrides": {"seed": 1}}, "got seed 1 and num_tasks None, expected neither"),
        ("table2", {"overrides": {"num_tasks": 2}}, "got seed 0 and num_tasks 2"),
        ("table2", {"plugins": (Path("nowhere.py"),)}, "nowhere.py, expected a Python file"),
        ("table2", {"overrides": {"model.channels": 0}}, "channels"),
    ],
)
def test_bad_choices_are_refused_before_anything_is_trained(
    name: str, changes: dict[str, Any], message: str, choices: Callable[..., Choices], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        reproduce(name, choices(**changes))
    assert not (tmp_path / "out").exists()


def test_command_line_refuses_in_one_line(tiny: TaskSequence, tmp_path: Path) -> None:
    base = ["reproduce", "table2", "--data", str(tiny.path), "--output", str(tmp_path / "out")]
    for more, message in (
        (["--seeds", "a"], "--seeds: got 'a'"),
        (["--set", "conure"], "--set: got 'conure', expected METHOD.NAME=VALUE"),
        (["--set", "conure.p=1", "--methods", "conure"], "conure has no setting 'p'"),
        (["--format", "bmp"], "picture format 'bmp'"),
    ):
        result = RUNNER.invoke(app, [*base, *more])
        assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_cell_in_training_and_a_damaged_result_are_refused(choices: Callable[..., Choices]) -> None:
    plan = make_plan("table2", choices(methods=("sinmo",)))
    folder = plan.folder(plan.cells[0])
    with locked(folder), pytest.raises(ConfigError, match="is training into"):
        package.run_cell(plan.setup, plan.cells[0], "cpu", 1)
    (folder / "result.json").write_text("{", "utf-8")
    with pytest.raises(ConfigError, match="result.json: not the result of a cell"):
        reproduce("table2", choices(methods=("sinmo",)))


def test_gpus_are_dealt_out_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [cells_module._device("auto", slot) for slot in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert cells_module._device("cuda:1", 0) == "cuda:1" and cells_module._device("cpu", 1) == "cpu"


def test_a_plugin_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "plugin.py"
    count = tmp_path / "count"
    file.write_text(f"open({str(count)!r}, 'a').write('x')", "utf-8")
    load_plugin(file)
    load_plugin(file)
    assert count.read_text("utf-8") == "x"
