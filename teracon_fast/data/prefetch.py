"""Prefetching: the items of an iterable, computed ahead of time in a thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterable
from typing import Generic, TypeVar

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
    work = _Work(source, depth)
    # A daemon: the process can exit even if a disk hangs.
    thread = threading.Thread(target=work.run, name="teracon-prefetch", daemon=True)
    try:
        thread.start()
        yield from work.items()
    finally:
        work.stop()
        if thread.is_alive():
            thread.join()


class _Work(Generic[T]):
    """State shared by the two threads, guarded by `_changed`."""

    def __init__(self, source: Iterable[T], depth: int) -> None:
        self._source, self._depth = source, depth
        self._changed = threading.Condition()
        self._ready: deque[T] = deque()
        self._error: BaseException | None = None
        self._ended = self._stopped = False

    def run(self) -> None:
        """Producer thread: compute items while there is room for them."""
        try:
            iterator = iter(self._source)
            try:
                # Wait for room first: otherwise `depth` + 1 items would exist.
                while self._room():
                    try:
                        item = next(iterator)
                    except StopIteration:
                        break
                    with self._changed:
                        self._ready.append(item)
                        self._changed.notify_all()
                    del item
            finally:
                if isinstance(iterator, Generator):
                    iterator.close()
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _room(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._ready) < self._depth)
            return not self._stopped

    def items(self) -> Generator[T, None, None]:
        """Consumer: yield the items, then raise the producer's exception, if any."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ready or self._ended)
                if not self._ready:
                    break
                item = self._ready.popleft()
                self._changed.notify_all()
            yield item
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Stop the producer and drop the waiting items."""
        with self._changed:
            self._stopped = True
            self._ready.clear()
            self._error = None  # its traceback refers to this object: a cycle that would keep batches alive
            self._changed.notify_all()
