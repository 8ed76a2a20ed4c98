"""Items made ahead are the same items, errors come where they belong, and no thread outlives its loop."""

from __future__ import annotations

import gc
import threading
import traceback
import weakref
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_split_and_batches import task_of

from teracon_fast.data import epoch_batches, fetch, prefetch
from teracon_fast.errors import ConfigError


class Broken(Exception):
    """An error of the source."""


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("teracon-prefetch")]


@settings(max_examples=60, deadline=None)
@given(
    users=st.integers(1, 40), size=st.integers(1, 9), depth=st.integers(1, 4), seed=st.integers(0, 5), data=st.data()
)
def test_batches_from_any_one_on_are_those_of_fetch(users: int, size: int, depth: int, seed: int, data) -> None:
    task = task_of(list(range(users)))
    batches = epoch_batches(range(users), size, seed, 0)
    first = data.draw(st.integers(0, len(batches)))
    got = list(prefetch((fetch(task, batches[k]) for k in range(first, len(batches))), depth))
    expected = [fetch(task, batch) for batch in batches[first:]]
    assert [(x.tolist(), y.tolist()) for x, y in got] == [(x.tolist(), y.tolist()) for x, y in expected]
    assert not threads()


@settings(max_examples=60, deadline=None)
@given(good=st.integers(0, 8), depth=st.integers(1, 4))
def test_an_error_comes_after_the_items_before_it_and_names_its_origin(good: int, depth: int) -> None:
    def the_source() -> Iterator[int]:
        yield from range(good)
        raise Broken("at its place")

    got = []
    with pytest.raises(Broken, match="at its place") as caught:
        for item in prefetch(the_source(), depth):
            got.append(item)
    assert got == list(range(good))
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "the_source"
    assert not threads()


def test_an_error_of_beginning_the_iteration_surfaces_too() -> None:
    with pytest.raises(TypeError, match="not iterable"):
        list(prefetch(3))  # type: ignore[arg-type]
    assert not threads()


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_thread_works_ahead_by_as_many_items_as_asked_for(depth: int) -> None:
    made, enough, beyond = [0], threading.Event(), threading.Event()

    def source() -> Iterator[int]:
        for number in range(20):
            made[0] += 1
            if made[0] == 1 + depth:
                enough.set()
            if made[0] == 2 + depth:
                beyond.set()
            yield number

    with closing(prefetch(source(), depth)) as items:
        assert next(items) == 0
        assert enough.wait(60), "the consumer holds one item, and `depth` of them wait"
        assert not beyond.wait(0.05), "there is no room for another one"
        assert next(items) == 1
        assert beyond.wait(60), "room was made"
    assert not threads()


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
@pytest.mark.parametrize("taken", [1, 3])
def test_a_loop_left_early_stops_the_thread_and_closes_the_source(error: type[BaseException], taken: int) -> None:
    made, closed = [0], threading.Event()

    def source() -> Iterator[int]:
        try:
            while True:
                made[0] += 1
                yield made[0]
        finally:
            closed.set()

    with pytest.raises(error), closing(prefetch(source())) as items:
        for item in items:
            if item == taken:
                raise error
    assert not threads() and closed.is_set()
    assert taken <= made[0] <= taken + 2


def test_closing_waits_for_the_item_being_made() -> None:
    entered, leave, finished = threading.Event(), threading.Event(), threading.Event()

    def source() -> Iterator[int]:
        yield 0
        entered.set()
        leave.wait(60)
        finished.set()
        yield 1

    with closing(prefetch(source())) as items:
        next(items)
        assert entered.wait(60)
        threading.Timer(0.05, leave.set).start()
    assert finished.is_set() and not threads()


def test_an_iteration_that_nobody_holds_any_more_ends_its_thread() -> None:
    items = prefetch(iter(range(100)))
    assert next(items) == 0 and len(threads()) == 1
    del items
    gc.collect()
    assert not threads()


def test_nothing_starts_before_the_first_item_is_asked_for() -> None:
    items = prefetch(iter(range(3)))
    assert not threads()
    items.close()
    with pytest.raises(ConfigError, match="got depth 0, expected at least 1"):
        next(prefetch([1], depth=0))


def test_raised_errors_hold_no_batches() -> None:
    """Their traceback reaches the thread's frames; what those hold must not stay alive in a circle."""

    class Batch:
        pass

    alive: weakref.WeakSet[Batch] = weakref.WeakSet()

    def source() -> Iterator[Batch]:
        for _ in range(3):
            batch = Batch()
            alive.add(batch)
            yield batch
        raise Broken

    gc.disable()
    try:
        with pytest.raises(Broken):
            for item in prefetch(source()):
                assert item in alive
                del item
        assert not alive
    finally:
        gc.enable()
