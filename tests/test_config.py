"""Configuration: presets of Table 10, TOML in and out, merging, and errors that name the nearest known key."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teracon_fast.config import PRESETS, RunConfig, load_config, options, write_toml
from teracon_fast.errors import ConfigError

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
        assert alpha is None or task.alpha == alpha, number
        assert (task.c, task.s_max) == (6.0, 50.0)


def test_defaults_are_the_published_program() -> None:
    config = load_config(overrides=PLACES)
    first, later = config.for_task(1), config.for_task(2)
    assert (first.lr, first.batch_size, first.epochs, first.patience, first.select) == (1e-3, 32, 10, 5, "hit@1")
    assert (later.lr, later.batch_size, later.epochs, later.patience, later.alpha) == (1e-4, 1024, 100, 5, 0.7)
    assert (config.mask, config.student_mask, config.sampling, config.parity) == (
        "relation",
        "past",
        "adaptive",
        "official",
    )


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
    assert (config.for_task(2).epochs, config.for_task(2).alpha) == (7, 0.5), "the file's [later] beats the preset's"
    fourth = config.for_task(4)
    assert (fourth.lr, fourth.alpha) == (0.25, 0.125), "[[task]] tables merge by number"
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
        ({"maks": 1}, "maks: unknown key, did you mean 'mask'?"),
        ({"task.2.alfa": 1}, "task[1].alfa: unknown key, did you mean 'alpha'?"),
        ({"model.chanels": 1}, "model.chanels: unknown key, did you mean 'channels'?"),
        ({"first.lr": -1}, "first.lr: got -1, expected: greater than 0"),
        ({"first.lr": "nan"}, "first.lr: got nan, expected: a finite number"),
        ({"task.2.alpha": -1}, "task[1].alpha: got -1, expected: greater than or equal to 0"),
        ({"model.dilations": "[1, 0]"}, "model.dilations[2]: got 0, expected: greater than or equal to 1"),
        ({"model.dilations": []}, "model.dilations: got []"),
        ({"mask": "soft"}, "mask: got 'soft', expected: 'relation', 'positive_only' or 'none'"),
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


def test_options_cover_every_value_and_can_be_given() -> None:
    found = {option.name: option for option in options()}
    flat = load_config(overrides=PLACES).model_dump()
    names = {name for name in flat if name not in ("model", "first", "later", "task")}
    names |= {f"{section}.{name}" for section in ("model", "first", "later") for name in flat[section]}
    assert set(found) == names
    assert all(option.help for option in found.values())
    assert found["later.batch_size"].default == 1024 and found["first.batch_size"].default == 32
    assert found["mask"].choices == ("relation", "positive_only", "none") and found["first.lr"].type is float
    assert found["num_tasks"].type is int and found["model.dilations"].type == list[int] and found["run"].type is Path
    given = {name: str(list(o.default) if isinstance(o.default, tuple) else o.default).replace("True", "true")
             for name, o in found.items() if o.default is not None}  # fmt: skip
    assert load_config(overrides={**PLACES, **given}) == load_config(overrides=PLACES)


def test_configurations_cannot_be_changed() -> None:
    config = load_config(overrides=PLACES)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]
    assert isinstance(config, RunConfig)
