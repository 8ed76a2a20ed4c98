"""The tables of a packed pass: which rows every convolution reads, see `teracon_fast.packing`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from teracon_fast import packing
from teracon_fast.ops import backends


def pack(
    lengths: npt.NDArray[np.int64], requests: Sequence[packing.Streams], geometry: packing.Geometry,
    device: torch.device | None = None, backend: str = "auto", padded: bool = False,
) -> packing.PackedBatch:  # fmt: skip
    """Build the tables of one packed pass. Never waits for the device.

    Args:
        lengths: int64 `[B]`, real length of every row of `x` (see `packing.real_lengths`), at most `geometry.length`.
        requests: one entry per (mask, set of users); request `i` uses mask `i` of each site.
        geometry: from `packing.geometry(...)`.
        device: where the tables are needed; None for the host.
        backend: "triton" builds them on the device, every other one on the host. The numbers are the same.
        padded: whether tables have the sizes of the batch's bucket, see `packing.buckets.pad`.

    Raises:
        ShapeError: for lengths, users or drop_last outside their range.
        BackendError: when an explicitly requested backend is not available for this device.
    """
    device = torch.device("cpu") if device is None else device
    tables = backends.implementation("pack", backend, device).tables
    return tables(packing.plan(lengths, requests, geometry), device, padded)  # type: ignore[no-any-return]
