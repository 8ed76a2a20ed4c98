"""Windows against plain loops, and the options that a preparer shows to the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teracon_fast.data.prepare import PREPARERS
from teracon_fast.data.prepare.windows import Windows, choose_windows, cut, group_by_user, latest
from teracon_fast.errors import ConfigError

relaxed = settings(deadline=None, max_examples=60)


@relaxed
@given(st.lists(st.tuples(st.integers(-3, 5), st.integers(0, 4)), min_size=1, max_size=40))
def test_group_by_user_is_a_stable_sort(events: list[tuple[int, int]]) -> None:
    user, time = (np.array(column, dtype=np.int64) for column in zip(*events, strict=True))
    histories = group_by_user(user, time)
    assert histories.order.tolist() == sorted(range(len(events)), key=lambda k: events[k])
    assert histories.users.tolist() == sorted(set(user.tolist()))
    for number, one in enumerate(histories.users):
        mine = histories.order[histories.starts[number] : histories.starts[number + 1]]
        assert (user[mine] == one).all() and len(mine) == (user == one).sum() == histories.counts[number]


@relaxed
@given(
    st.lists(st.integers(1, 17), min_size=1, max_size=6),
    st.integers(1, 6),
    st.one_of(st.none(), st.integers(1, 7)),
    st.one_of(st.none(), st.integers(1, 4)),
    st.integers(1, 4),
)
def test_windows_match_a_plain_loop(
    counts: list[int], length: int, stride: int | None, most: int | None, fewest: int
) -> None:
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    items = np.arange(1, starts[-1] + 1)
    windows = choose_windows(starts, length, stride=stride, max_windows=most, min_items=fewest)
    expected = []
    for owner, count in enumerate(counts):
        history = items[starts[owner] : starts[owner + 1]].tolist()
        ends = list(range(count, 0, -(stride or length)))[:most]
        rows = [history[max(end - length, 0) : end] for end in reversed(ends)]
        expected += [(owner, [0] * (length - len(row)) + row) for row in rows if len(row) >= fewest]
    got = cut(items, windows, length)
    assert list(zip(windows.owner.tolist(), got.tolist(), strict=True)) == expected
    assert windows.lengths.tolist() == [sum(item > 0 for item in row) for _, row in expected]


def test_cut_over_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teracon_fast.data.prepare.windows._CHUNK", 3)
    starts = np.arange(0, 41, 4, dtype=np.int64)
    items = np.arange(100, 140)
    windows = choose_windows(starts, 5)
    assert cut(items, windows, 5).tolist() == [[0, *range(first, first + 4)] for first in range(100, 140, 4)]


def test_latest_and_take() -> None:
    owner = np.array([0, 0, 0, 2, 5, 5], dtype=np.int64)
    assert latest(owner, 2).tolist() == [False, True, True, True, True, True]
    assert latest(owner, 1).tolist() == [False, False, True, True, False, True]
    kept = Windows(owner, owner * 10, owner * 10 + 3).take(latest(owner, 1))
    assert kept.owner.tolist() == [0, 2, 5] and kept.end.tolist() == [3, 23, 53] and len(kept) == 3


@pytest.mark.parametrize("name", PREPARERS)
def test_every_option_has_a_help_text(name: str) -> None:
    preparer = PREPARERS[name]
    assert preparer.help and not preparer.help.startswith(" ")
    assert all(len(option.help) > 10 for option in preparer.options)
    assert {"length", "overwrite"} <= {option.name for option in preparer.options}


@pytest.mark.parametrize(
    ("name", "option", "text", "value"),
    [
        ("movielens", "half_star", "drop", "drop"),
        ("completejourney", "profiles", "age, income,", ("age", "income")),
        ("events", "user", "who", "who"),
        ("ttl", "unseen", "pad", "pad"),
    ],
)
def test_options_from_text(name: str, option: str, text: str, value: object) -> None:
    options = {known.name: known for known in PREPARERS[name].options}
    assert options[option].parse(text) == value


def test_wrong_choice() -> None:
    options = {known.name: known for known in PREPARERS["movielens"].options}
    with pytest.raises(ConfigError) as caught:
        options["half_star"].parse("keep")
    assert str(caught.value) == "--half-star: got 'keep'; expected one of input, drop"


def test_only_completejourney_brings_its_own_data() -> None:
    assert [name for name, preparer in PREPARERS.items() if not preparer.needs_source] == ["completejourney"]
    for name in ("movielens", "ttl", "events"):
        with pytest.raises(ConfigError, match=f"preparer {name}: got no SOURCE"):
            PREPARERS[name](None, Path("never"))
