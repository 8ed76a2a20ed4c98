"""Prefetching: the items of an iterable, computed ahead of time in a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from teracon_fast.errors import ConfigError

T = TypeVar("T")


def prefetch(source: Iterable[T], depth: int = 2) -> Generator[T, None, None]:
    """The items of `source`, in order, while a thread computes the next ones.

    An exception raised by `source` is raised here, after the items before it, with the thread's traceback. The thread ends with
    the iteration; wrap a loop that may be left early in `contextlib.closing(prefetch(...))`, which stops the thread after its
    current item and joins it.

    Args:
        source: iterated in the thread only. A generator is closed at the end.
        depth: maximum number of items that wait, at least 1.

    Raises:
        ConfigError: depth below 1, at the first item.
    """
    if depth < 1:
        raise ConfigError(f"prefetch: got depth {depth}, expected at least 1")
    iterator, end = iter(source), object()
    pool = ThreadPoolExecutor(1, thread_name_prefix="teracon-prefetch")
    try:
        waiting = deque(pool.submit(next, iterator, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, iterator, end))
            yield item  # type: ignore[misc]
            del item
    finally:
        pool.shutdown(cancel_futures=True)
        if isinstance(iterator, Generator):
            iterator.close()
