"""Configuration: presets of Table 10, TOML in and out, merging, and errors that name the nearest known key."""

from __future__ import annotations

import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teracon_fast.config import PRESETS, RunConfig, flags, load_config, write_toml
from teracon_fast.data.order import NOISE
from teracon_fast.errors import ConfigError
from teracon_fast.methods import METHODS, options_of

PLACES = {"data": "prepared", "run": "runs/one"}

# Paper, Table 10, task by task: learning rate, batch size, alpha.
TABLE_10 = {
    "ttl": [(0.01, 32, None)] + [(0.0001, 1024, 0.7)] * 5,
    "ml": [(0.001, 32, None), (0.0001, 1024, 0.7), (0.0005, 1024, 0.9)],
    "naver": [
        (0.001, 64, None),
        (0.0001, 1024, 0.9),
        (0.0001, 1024, 0.9),
        (0.0005, 1024, 0.7),
        (0.0005, 1024, 0.7),
        (0.0005, 1024, 0.9),
    ],
}


@pytest.mark.parametrize("preset", TABLE_10)
def test_presets_hold_table_10(preset: str) -> None:
    config = load_config(preset, overrides=PLACES)
    assert config.model.channels == 256 and config.model.dilations == (1, 4) * 4 and config.model.kernel_size == 3
    for number, (lr, batch_size, alpha) in enumerate(TABLE_10[preset], 1):
        task = config.for_task(number)
        assert (task.lr, task.batch_size) == (lr, batch_size), number
        options = config.task_options(number)
        assert alpha is None or options["alpha"] == alpha, number
        assert (options["c"], options["s_max"]) == (6.0, 50.0)
    ratios = {"ttl": [0.7, 0.8, 0.9, 0.8, 0.9, 0.9], "ml": [0.7, 0.8, 0.7]}.get(preset)
    conure = config.model_copy(update={"method": "conure"})
    assert ratios is None or [conure.task_options(number + 1)["pruning"] for number in range(len(ratios))] == ratios


def test_defaults_are_the_published_program() -> None:
    config = load_config(overrides=PLACES)
    first, later = config.for_task(1), config.for_task(2)
    assert (first.lr, first.batch_size, first.epochs, first.patience, first.select) == (1e-3, 32, 10, 5, "hit@1")
    assert (later.lr, later.batch_size, later.epochs, later.patience) == (1e-4, 1024, 100, 5)
    assert (config.method, config.parity, config.task_options(2)["alpha"]) == ("teracon", "official", 0.7)
    settings = config.new_method(9).settings()
    assert (settings["mask"], settings["student_mask"], settings["sampling"]) == ("relation", "past", "adaptive")


@pytest.mark.parametrize("preset", PRESETS)
def test_toml_out_is_toml_in(preset: str, tmp_path: Path) -> None:
    config = load_config(preset, overrides={**PLACES, "task.2.alpha": 0.3, "num_tasks": 4, "run": 'odd "name"\\\x7f ü'})
    (tmp_path / "config.toml").write_text(config.to_toml(), "utf-8")
    assert load_config(path=tmp_path / "config.toml") == config


@given(
    st.dictionaries(
        st.text(string.ascii_lowercase, min_size=1),
        st.one_of(
            st.text(st.characters(exclude_categories=["Cs"])),
            st.integers(-(2**63), 2**63 - 1),
            st.floats(allow_nan=False),
            st.booleans(),
            st.lists(st.integers(-9, 9)),
            st.dictionaries(st.text(string.ascii_lowercase, min_size=1), st.integers(-9, 9)),
            st.lists(
                st.dictionaries(st.text(string.ascii_lowercase, min_size=1), st.booleans(), min_size=1), min_size=1
            ),
        ),
    )
)
def test_written_toml_is_read_back(values: dict[str, Any]) -> None:
    import tomllib

    assert tomllib.loads(write_toml(values)) == values


def test_a_value_of_later_tasks_leaves_their_others_at_their_own_defaults() -> None:
    """Not at those of task 1."""
    later = load_config(overrides={"data": "a", "run": "b", "later.epochs": 3}).later
    assert (later.lr, later.batch_size, later.epochs) == (1e-4, 1024, 3)
    assert load_config("ttl", overrides={"data": "a", "run": "b"}).later.epochs == 100


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(
        'run = "file"\n[later]\nalpha = 0.5\n[[task]]\nnumber = 4\nlr = 0.25\n[[task]]\nnumber = 2\nepochs = 7\n'
    )
    config = load_config("naver", file, {"data": "d", "run": "flag", "task.4.alpha": "0.125", "first.lr": "1e-2"})
    assert (str(config.run), config.for_task(1).lr) == ("flag", 0.01)
    assert config.for_task(2).epochs == 7 and config.task_options(2)["alpha"] == 0.5, "the file's [later] beats the preset's"
    assert config.for_task(4).lr == 0.25 and config.task_options(4)["alpha"] == 0.125, "[[task]] tables merge by number"
    assert config.for_task(5).lr == 0.0005, "the preset's other tables stay"


def test_text_values_are_not_read_as_toml() -> None:
    config = load_config(overrides={"data": "2020", "run": "true", "device": "cpu", "model.dilations": "[1, 2]"})
    assert (str(config.data), str(config.run), config.model.dilations) == ("2020", "true", (1, 2))


def test_none_means_not_given() -> None:
    assert load_config(overrides={**PLACES, "seed": None, "num_tasks": None}).seed == 0


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"first.learning_rate": 1}, "first.learning_rate: unknown key"),
        ({"first.batchsize": 1}, "first.batchsize: unknown key, did you mean 'batch_size'?"),
        ({"modle": 1}, "modle: unknown key, did you mean 'model'?"),
        ({"task.2.alfa": 1}, "task 2.alfa: unknown key, did you mean 'alpha'?"),
        ({"task.2.lrr": 1}, "task 2.lrr: unknown key, did you mean 'lr'?"),
        ({"teracon.maks": "none"}, "teracon.maks: unknown key, did you mean 'mask'?"),
        ({"hat.depth": 1}, "hat.depth: unknown key"),
        ({"first.mask": "none"}, "first.mask: unknown key"),
        ({"method": "sinmoo"}, "method: got 'sinmoo', expected one of sinmo, fine_all, peterrec, mtl"),
        ({"model.chanels": 1}, "model.chanels: unknown key, did you mean 'channels'?"),
        ({"first.lr": -1}, "first.lr: got -1, expected: greater than 0"),
        ({"first.lr": "nan"}, "first.lr: got nan, expected: a finite number"),
        ({"task.2.alpha": "much"}, "task 2.alpha: got 'much', expected a number"),
        ({"hat.train_items": 3}, "hat.train_items: got 3, expected true or false"),
        ({"conure.pruning": "half"}, "conure.pruning: got 'half', expected float | tuple[float, ...]"),
        ({"noise_at": 1}, "noise_at: got 1, expected: greater than or equal to 2"),
        ({"model.dilations": "[1, 0]"}, "model.dilations[2]: got 0, expected: greater than or equal to 1"),
        ({"model.dilations": []}, "model.dilations: got []"),
        ({"teracon.mask": "soft"}, "teracon.mask: got 'soft', expected one of 'relation', 'positive_only', 'none'"),
        ({"precision": "fp8"}, "precision: got 'fp8'"),
        ({"later.select": "mrr@20"}, "later.select: got 'mrr@20', expected: 'hit@1' or 'mrr@5'"),
        ({"seed": -1}, "seed: got -1"),
        ({"first": 3}, "first: got 3"),
        ({"task.x.lr": 1}, "task.x.lr: expected task.NUMBER.NAME"),
        ({"task": 1}, "task: expected task.NUMBER.NAME"),
        ({"task.0.lr": 1}, "task[1].number: got 0"),
    ],
)
def test_bad_values_are_named(overrides: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(overrides={**PLACES, **overrides})
    assert expected in str(error.value)


def test_every_mistake_is_listed_with_its_file(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text("seed = 1.5\n[first]\nepochs = 0\n")
    with pytest.raises(ConfigError) as error:
        load_config(path=file)
    lines = str(error.value).splitlines()
    assert len(lines) == 4 and all(line.startswith(f"{file}: ") for line in lines)
    assert {line.split(": ")[1] for line in lines} == {"seed", "first.epochs", "data", "run"}


def test_two_tables_of_one_task_in_one_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text('data = "d"\nrun = "r"\n' + "[[task]]\nnumber = 2\nlr = 0.1\n" * 2)
    with pytest.raises(ConfigError, match=r"two \[\[task\]\] tables with number = 2"):
        load_config(path=file)


@pytest.mark.parametrize(
    ("content", "expected"), [(None, "cannot read"), (b"a = ", "not valid TOML"), (b"\xff", "not valid TOML")]
)
def test_unreadable_files_are_named(tmp_path: Path, content: bytes | None, expected: str) -> None:
    file = tmp_path / "bad.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_config(path=file)
    assert str(file) in str(error.value) and expected in str(error.value)


def test_unknown_preset_is_refused() -> None:
    with pytest.raises(ConfigError, match="preset: got 'tll', expected one of ttl, ml, naver, demo"):
        load_config("tll", overrides=PLACES)


def test_flags_cover_every_value_and_can_be_given() -> None:
    found = {flag.name: flag for flag in flags()}
    flat = load_config(overrides=PLACES).model_dump()
    sections = ("model", "first", "later")
    names = {name for name in flat if name not in (*sections, "task", "options")}
    names |= {f"{section}.{name}" for section in sections for name in flat[section] if name != "options"}
    options = {f"{method}.{name}": option for method in METHODS for name, option in options_of(METHODS[method]).items()}
    per_task = {option.name for option in options.values() if option.per_task}
    assert per_task == {"alpha", "c", "s_max", "pruning"}
    names |= set(options) | {f"{section}.{name}" for section in ("first", "later") for name in per_task}
    assert set(found) == names
    assert all(flag.help for flag in found.values())
    for name, option in options.items():
        assert (found[name].help, found[name].default) == (option.help, option.default)
    assert found["later.batch_size"].default == 1024 and found["first.batch_size"].default == 32
    assert found["teracon.mask"].choices == ("relation", "positive_only", "none") and found["first.lr"].type is float
    assert found["num_tasks"].type is int and found["model.dilations"].type == list[int] and found["run"].type is Path
    assert found["hat.train_items"].type is bool and found["hat.weight"].type is float and found["conure.pruning"].type is str
    plain = load_config(overrides=PLACES)
    given = {name: str(list(f.default) if isinstance(f.default, tuple) else f.default).replace("True", "true")
             .replace("False", "false") for name, f in found.items() if f.default is not None}  # fmt: skip
    config = load_config(overrides={**PLACES, **given})
    assert config.model_copy(update={"options": {}}) == plain
    assert config.options == {
        method: {name: option.default for name, option in options_of(kind).items()} for method, kind in METHODS.items()
        if options_of(kind)
    }  # fmt: skip


def test_an_option_of_a_task_wins_over_the_methods_table_and_its_default() -> None:
    overrides = {"method": "conure", "conure.pruning": [0.1, 0.2], "task.4.pruning": 0.4, "hat.s_max": 9.0}
    config = load_config(overrides={**PLACES, **overrides})
    assert [config.task_options(number)["pruning"] for number in (1, 2, 3, 4, 5)] == [0.1, 0.2, 0.2, 0.4, 0.2]
    assert config.task_options(NOISE)["pruning"] == 0.2
    hat = config.model_copy(update={"method": "hat"})
    assert hat.task_options(1) == {"s_max": 9.0}, "options of other methods are not asked for"


def test_orders_with_a_noisy_task() -> None:
    config = load_config(overrides={**PLACES, "order": "1,3,2", "noise_at": 4})
    assert config.task_order(3) == (1, 3, 2, NOISE)
    assert config.for_task(NOISE) == config.for_task(9)
    with pytest.raises(ConfigError, match="noise-at: got 4, expected 2 to 3"):
        load_config(overrides={**PLACES, "order": "1,2", "noise_at": 4}).task_order(2)


PLUGIN = """
from typing import Annotated

from teracon_fast.methods import METHODS, Option, SinMo, Sizes


class Mine(SinMo):
    name = "mine"

    def __init__(self, sizes: Sizes, width: Annotated[int, Option("how wide", per_task=True)] = 3, depth=(1, 2)) -> None:
        super().__init__(sizes)
        self.width, self.depth = width, depth


METHODS["mine"] = Mine
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "mine.py").write_text(PLUGIN)
    yield tmp_path / "mine.py"
    METHODS.pop("mine", None)


def test_a_plugin_declares_options_too(plugin: Path, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(
        f'data = "d"\nrun = "r"\nmethod = "mine"\nplugins = ["{plugin}"]\n[mine]\nwidth = 5\ndepth = "any"\n[later]\nwidth = 7\n'
    )
    config = load_config(path=tmp_path / "own.toml")
    assert config.options == {"mine": {"width": 5, "depth": "any"}}
    assert [config.task_options(number) for number in (1, 2)] == [{"width": 5}, {"width": 7}]
    assert config.new_method(9).settings()["depth"] == "any"
    (tmp_path / "again.toml").write_text(config.to_toml())
    assert load_config(path=tmp_path / "again.toml") == config
    with pytest.raises(ConfigError, match="mine.width: got 'wide', expected an integer"):
        load_config(path=tmp_path / "own.toml", overrides={"mine.width": "wide"})
    with pytest.raises(ConfigError, match="mine.widht: unknown key, did you mean 'width'"):
        load_config(path=tmp_path / "own.toml", overrides={"mine.widht": 1})


@pytest.mark.parametrize(("text", "message"), [
    ("import nothing_of_this_name", r"broken\.py, line 1: ModuleNotFoundError"),
    ("from teracon_fast.methods import METHODS\nMETHODS['broken'] = int", "METHODS\\['broken'\\]: got <class 'int'>"),
    (None, "broken.py, expected a Python file"),
])  # fmt: skip
def test_a_plugin_that_fails_is_named(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "broken.py").write_text(text)
    try:
        with pytest.raises(ConfigError, match=message):
            load_config(overrides={**PLACES, "plugins": [str(tmp_path / "broken.py")], "method": "broken"})
    finally:
        METHODS.pop("broken", None)


def test_configurations_cannot_be_changed() -> None:
    config = load_config(overrides=PLACES)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]
    assert isinstance(config, RunConfig)
