"""Event logs -> left-padded windows: order events by user and time, choose windows, gather their items. Vectorized over users
and windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]

_CHUNK = 65_536  # windows gathered at once: about 50 MB of indices in `cut` at length 100


@dataclass(frozen=True)
class Histories:
    """Events ordered by (user, time), and where each user's begin.

    Attributes:
        order: int64 [E], positions in the original log; events at equal times keep its order.
        users: int64 [U], user ids, ascending.
        starts: int64 [U + 1]; events of `users[k]` are `order[starts[k]:starts[k + 1]]`.
    """

    order: Int64
    users: Int64
    starts: Int64

    @property
    def counts(self) -> Int64:
        """int64 [U], number of events of each user."""
        return np.diff(self.starts)


@dataclass(frozen=True)
class Windows:
    """Half-open ranges of the ordered events, sorted by user, then time.

    Attributes:
        owner: int64 [N], position of the window's user in `Histories.users`.
        begin: int64 [N], first event.
        end: int64 [N], one past the last event.
    """

    owner: Int64
    begin: Int64
    end: Int64

    def __len__(self) -> int:
        return len(self.owner)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """int32 [N], number of real items in each window."""
        return (self.end - self.begin).astype(np.int32)

    def take(self, keep: NDArray[Any]) -> Windows:
        """The windows selected by a boolean mask or by indices."""
        return Windows(self.owner[keep], self.begin[keep], self.end[keep])


def group_by_user(user: Int64, time: NDArray[Any]) -> Histories:
    """Order a log by user, then time.

    Args:
        user: int64 [E].
        time: [E], any ordered numeric dtype.
    """
    order = np.lexsort((time, user)).astype(np.int64, copy=False)  # stable: ties keep the order of the log
    users, starts = np.unique(user[order], return_index=True)
    return Histories(order, users, np.append(starts, len(user)).astype(np.int64))


def choose_windows(
    starts: Int64, length: int, *, stride: int | None = None, max_windows: int | None = None, min_items: int = 1
) -> Windows:
    """Windows that end at a user's last event, `stride` before it, 2 * `stride` before it, and so on.

    A window has `length` events, or fewer if it reaches the user's first event; it is then left-padded.

    Args:
        starts: int64 [U + 1], see `Histories`.
        length: items in a full window.
        stride: events between the ends of two windows; None: `length`, so that windows do not overlap.
        max_windows: number of windows per user, the latest ones; None: all.
        min_items: skip windows with fewer real items.
    """
    stride = length if stride is None else stride
    counts = np.diff(starts)
    per_user = -(-counts // stride)
    if max_windows is not None:
        per_user = np.minimum(per_user, max_windows)
    owner = np.repeat(np.arange(len(counts), dtype=np.int64), per_user)
    first = np.cumsum(per_user) - per_user
    back = per_user[owner] - 1 - (np.arange(len(owner), dtype=np.int64) - first[owner])  # 0 for the latest window
    end = starts[owner + 1] - back * stride
    begin = np.maximum(end - length, starts[owner])
    windows = Windows(owner, begin, end)
    return windows.take(windows.lengths >= min_items)


def cut(items: NDArray[Any], windows: Windows, length: int) -> NDArray[np.int32]:
    """int32 [N, length]: the items of each window, padded on the left with 0.

    Args:
        items: integer [E] in the order of `Histories.order`; 0 is the pad, so not an item.
        windows: N windows of at most `length` items.
        length: L.
    """
    rows = np.zeros((len(windows), length), dtype=np.int32)
    offsets = np.arange(-length, 0, dtype=np.int64)
    for first in range(0, len(windows), _CHUNK):
        part = slice(first, first + _CHUNK)
        positions = windows.end[part, None] + offsets
        real = positions >= windows.begin[part, None]
        rows[part][real] = items[positions[real]]
    return rows


def latest(owner: Int64, count: int) -> NDArray[np.bool_]:
    """bool [N]: the last `count` entries of each owner. owner: ascending."""
    end = np.searchsorted(owner, owner, side="right")
    return end - np.arange(len(owner)) <= count
