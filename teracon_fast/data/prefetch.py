"""Items of an iterable, made in a thread before they are asked for."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterable
from typing import Generic, TypeVar

from teracon_fast.errors import ConfigError

T = TypeVar("T")


def prefetch(source: Iterable[T], depth: int = 2) -> Generator[T, None, None]:
    """The items of `source`, the same in the same order, while a thread already makes the next ones.

    What making an item raises is raised here, after the items before it, with the traceback of the thread. The thread ends
    with the iteration; a loop that may be left earlier is put in `contextlib.closing(prefetch(...))`, which stops the thread
    after the item that it is making and waits for it.

    Args:
        source: iterated in the thread only. A generator is closed at the end.
        depth: most items that wait at any time, at least 1.

    Raises:
        ConfigError: depth below 1, at the first item.
    """
    if depth < 1:
        raise ConfigError(f"prefetch: got depth {depth}, expected at least 1")
    work = _Work(source, depth)
    # A daemon: a process that is told to exit does not wait for a disk that hangs.
    thread = threading.Thread(target=work.run, name="teracon-prefetch", daemon=True)
    try:
        thread.start()
        yield from work.items()
    finally:
        work.stop()
        if thread.is_alive():
            thread.join()


class _Work(Generic[T]):
    """What the two threads share. Everything that both touch is touched under `changed`."""

    def __init__(self, source: Iterable[T], depth: int) -> None:
        self._source, self._depth = source, depth
        self._changed = threading.Condition()
        self._ready: deque[T] = deque()
        self._error: BaseException | None = None
        self._ended = self._stopped = False

    def run(self) -> None:
        """The thread: make items while there is room for them."""
        try:
            iterator = iter(self._source)
            try:
                # Room first: an item made without it would be one more than `depth`.
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
        """The consumer's side."""
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
        """Make nothing more, and let go of what is left."""
        with self._changed:
            self._stopped = True
            self._ready.clear()
            self._error = None  # its traceback leads here: a circle that would keep batches alive
            self._changed.notify_all()
