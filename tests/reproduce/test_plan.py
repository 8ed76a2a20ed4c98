"""What an experiment trains: configurations of runs, their folders, and what is refused. Nothing is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from teracon_fast.cli.app import app
from teracon_fast.data import DatasetWriter, TaskSequence
from teracon_fast.data.order import NOISE
from teracon_fast.errors import ConfigError
from teracon_fast.methods import METHODS, SinMo
from teracon_fast.reproduce import Choices, make_plan, reproduce
from teracon_fast.reproduce.plan import _new_run

RUNNER = CliRunner()


def names(plan: Any) -> list[str]:
    return [run.run.name for run in plan.runs]


def test_runs_of_a_table(choices: Callable[..., Choices], tmp_path: Path) -> None:
    plan = make_plan("table4", choices(methods=("fine_all", "sinmo"), seeds=(0, 3)))
    assert [(row.method, row.order) for row in plan.rows] == [("fine_all", (1, NOISE, 2, 3)), ("sinmo", (1, NOISE, 2, 3))]
    noisy, plain = plan.rows[0].runs[1], plan.rows[0].plain[1]
    assert (noisy.method, noisy.seed, noisy.noise_at, noisy.order, noisy.num_tasks) == ("fine_all", 3, 2, "original", None)
    assert plain.noise_at is None and plain.run.parent == tmp_path / "out" / "runs"
    assert noisy.run.name.startswith("fine_all-1.n.2.3-seed3-") and plain.run.name.startswith("fine_all-1.2.3-seed3-")
    assert plan.rows[1].single == plan.rows[1].plain and len(plan.runs) == 8, "SinMo as the baseline of both is trained once"


def test_a_figure_ends_with_the_task_that_is_held_back(choices: Callable[..., Choices], tiny: TaskSequence) -> None:
    plan = make_plan("figure2", choices(methods=("hat",), held_back=3, order="reversed", noise_at=2))
    (run,) = plan.runs
    assert (run.order, run.num_tasks, run.noise_at, run.test_every_epoch) == ("1,3,2", 3, 2, (3,))
    assert run.task_order(len(tiny.tasks))[: run.num_tasks] == plan.rows[0].order == (1, NOISE, 3)
    (run,) = make_plan("figure3", choices(methods=("hat",))).runs
    assert (run.num_tasks, run.test_every_epoch) == (None, (1, 2, 3))


def test_tables_share_runs_and_other_settings_have_other_folders(choices: Callable[..., Choices]) -> None:
    table2 = make_plan("table2", choices(methods=("fine_all",)))
    assert names(table2)[0] in names(make_plan("table3", choices(methods=("fine_all",)))), "the original order"
    assert names(table2)[0] in names(make_plan("table2", choices(methods=("fine_all",), order="1, 2,3")))
    for same in ({"threads": 3}, {"device": "cuda:5"}, {"backend": "torch"}, {"algorithm": "direct"}, {"log_every": 1}):
        assert names(make_plan("table2", choices(methods=("fine_all",), overrides=same))) == names(table2)
    for other in ({"later.lr": 0.5}, {"split_by": "user"}, {"model.channels": 9}, {"precision": "bf16"}, {"parity": "paper"}):
        assert not {*names(make_plan("table2", choices(methods=("fine_all",), overrides=other)))} & {*names(table2)}


def test_other_data_of_the_same_shape_have_other_folders(choices: Callable[..., Choices], tiny: TaskSequence) -> None:
    config = make_plan("table2", choices(methods=("sinmo",))).config.model_copy(update={"method": "sinmo"})

    def folder(dataset: TaskSequence) -> str:
        return _new_run(config, dataset, (1, 2, 3), 0, ()).run.name

    samples, first = np.array(tiny.tasks[1].samples), tiny.tasks[0]
    samples[0, 1] = (samples[0, 1] + 1) % 30
    sequences, groups = np.array(first.sequences), np.array(first.groups)
    sequences[0, -2] = 1 + sequences[0, -2] % 30
    groups[0] += 1000
    others = [
        replace(tiny, tasks=[first, replace(tiny.tasks[1], samples=samples), tiny.tasks[2]]),
        replace(tiny, tasks=[replace(first, sequences=sequences), *tiny.tasks[1:]]),
        replace(tiny, tasks=[replace(first, groups=groups), *tiny.tasks[1:]]),
    ]
    assert len({folder(tiny), *map(folder, others)}) == 4 and folder(tiny) == folder(replace(tiny))


OWN = """
from teracon_fast.methods import METHODS, SinMo

class Own(SinMo):
    name = "own"

    def __init__(self, sizes, rate: float = 1.0):
        super().__init__(sizes)
        self._rate = rate  # no public attribute

METHODS["own"] = Own
"""


def test_other_code_or_options_of_a_plugin_have_other_folders(
    choices: Callable[..., Choices], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "own", SinMo)  # removed with the test
    found = []
    for name, text, rate in (("a", OWN, 1.0), ("b", OWN, 1.0), ("c", OWN, 2.0), ("d", OWN + "# edited", 1.0)):
        file = tmp_path / f"{name}.py"
        file.write_text(text, "utf-8")
        plan = make_plan("table2", choices(methods=("own",), plugins=(file,), overrides={"own.rate": rate}))
        assert plan.runs[0].plugins == (file,)
        found.append(names(plan)[0])
    assert found[0] == found[1], "the same code in another file"
    assert len(set(found)) == 3


def test_variants_and_options_reach_the_methods(choices: Callable[..., Choices]) -> None:
    def options(name: str, option: str, **changes: Any) -> list[Any]:
        return [run.new_method(31).settings()[option] for run in make_plan(name, choices(**changes)).runs]

    assert options("table5", "mask") == ["none", "positive_only", "relation"]
    assert options("table6", "sampling", overrides={"teracon.mask": "none"}) == ["minimum", "adaptive", "all"]
    assert options("table6", "mask", overrides={"teracon.mask": "none"}) == ["none"] * 3
    (run,) = make_plan("table2", choices(preset="ml", order="reversed", methods=("teracon",))).runs
    assert [run.task_options(number)["alpha"] for number in (3, 2)] == [0.9, 0.7], "a setting belongs to its task"
    assert [run.for_task(number).lr for number in (1, 3, 2, NOISE)] == [1e-3, 5e-4, 1e-4, 1e-4]
    (run,) = make_plan("table2", choices(preset="ml", methods=("teracon",), overrides={"teracon.alpha": 0.5})).runs
    assert [run.task_options(number)["alpha"] for number in (2, 3)] == [0.5, 0.5], "given for the method: for every task"
    mine = {"conure.block": "pre-activation", "hat.weight": 0.5}
    (run,) = make_plan("table2", choices(methods=("conure",), overrides=mine)).runs
    assert run.options == {"conure": {"block": "pre-activation"}}


def test_a_task_too_small_to_split_is_refused(choices: Callable[..., Choices], tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "small", name="small", length=4) as writer:
        items = np.arange(1, 81)[:, None] % 7 + np.arange(1, 5)
        writer.add_task("next", "next_item", items, groups=np.arange(80))
        writer.add_task("few", "label", items[:2], labels=np.arange(2))
    with pytest.raises(ConfigError, match="few.*: got 2 samples"):
        make_plan("table2", choices(data=tmp_path / "small", methods=("sinmo",)))


def test_pages_of_other_orders_have_other_names(choices: Callable[..., Choices]) -> None:
    def name(experiment: str, **changes: Any) -> str:
        return make_plan(experiment, choices(methods=("teracon",), **changes)).file_name

    assert name("table6") == name("table6", order="original") == "table6"
    assert name("table6", order="reversed") == "table6_reversed", "the paper's Table 9"
    assert name("table2", order="1, 3,2", noise_at=2) == "table2_1-3-2_noise2"
    assert name("figure2", held_back=2) == "figure2_task2"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("table9", {}, "got 'table9', expected one of table2"),
        ("table2", {"methods": ("sinmo", "lstm")}, "got 'lstm', expected one of sinmo"),
        ("table2", {"methods": ("sinmo", "hat", "sinmo")}, "methods: got sinmo, hat, sinmo, expected each once"),
        ("table2", {"methods": ()}, "methods: got none"),
        ("table2", {"seeds": (0, 0)}, "seeds: got \\[0, 0\\]"),
        ("table2", {"seeds": ()}, "seeds"),
        ("table2", {"seeds": (2**63,)}, "seeds"),
        ("table2", {"order": "2,1,3"}, "order: got '2,1,3'"),
        ("table2", {"noise_at": 1}, "noise-at: got 1"),
        ("table4", {"noise_at": 0}, "noise-at: got 0"),
        ("figure2", {"noise_at": 4}, "noise-at: got 4, expected 2 to 3: the held-back task stays last"),
        ("figure2", {"held_back": 0}, "held-back: got task 0, expected 2 to 3"),
        ("figure2", {"held_back": 1}, "held-back: got task 1, expected 2 to 3"),
        ("table2", {"held_back": 3}, "held-back: got task 3 for table2"),
        ("table5", {"methods": ("hat",)}, "hat.mask: unknown key"),
        ("table2", {"methods": ("sinmo",), "overrides": {"hat.wait": 1}}, "hat.wait: unknown key, did you mean 'weight'"),
        ("table2", {"overrides": {"hat.weight": "abc"}}, "hat.weight: got 'abc', expected a number"),
        ("table2", {"methods": ("hat",), "overrides": {"hat.weight": -1}}, "hat: weight is -1"),
        ("table2", {"methods": ("hat",), "overrides": {"task.3.s_max": 0.5}}, "hat: s_max is 0.5, expected at least 1"),
        ("table2", {"overrides": {"seed": 1}}, "got seed 1, expected none: the experiment sets it"),
        ("table2", {"overrides": {"num_tasks": 2}}, "got num_tasks 2"),
        ("table2", {"overrides": {"order": "reversed"}}, "got order 'reversed'"),
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
        (["--set", "conure"], "--set: got 'conure', expected"),
        (["--set", "conure.p=1", "--methods", "conure"], "conure.p: unknown key"),
        (["--format", "bmp"], "'bmp'"),
    ):
        result = RUNNER.invoke(app, [*base, *more])
        assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1
