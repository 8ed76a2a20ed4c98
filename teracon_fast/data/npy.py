"""Appending to .npy files, for arrays larger than memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_HEADER_BYTES = 128


class NpyWriter:
    """A C-ordered .npy file that grows along its first axis.

    Args:
        path: file to create.
        dtype: dtype of the array.
        row_shape: shape of one row; () for a 1-D array.
    """

    def __init__(self, path: str | Path, dtype: npt.DTypeLike, row_shape: tuple[int, ...] = ()) -> None:
        self.path, self.dtype, self.row_shape, self.rows = Path(path), np.dtype(dtype), row_shape, 0
        self.file = open(path, "w+b")  # noqa: SIM115 - open until close()
        self.file.write(self._header())

    def _header(self) -> bytes:
        # Of fixed size, so that `close` can overwrite it with the final number of rows.
        about = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.rows, *self.row_shape)}
        size = _HEADER_BYTES - 10
        return b"\x93NUMPY\x01\x00" + size.to_bytes(2, "little") + repr(about).encode().ljust(size - 1) + b"\n"

    def append(self, values: npt.NDArray[Any]) -> None:
        """Append rows [n, *row_shape]."""
        assert values.shape[1:] == self.row_shape
        self.file.write(np.ascontiguousarray(values, dtype=self.dtype).data)
        self.rows += len(values)

    def close(self) -> None:
        """Write the final header and flush to disk."""
        self.file.seek(0)
        self.file.write(self._header())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def remap(array: NpyWriter, table: npt.NDArray[np.int32], values_per_block: int = 1 << 22) -> None:
    """Replace every value v of an open int32 file by `table[v]`, block by block, in place."""
    file = array.file
    total = array.rows * int(np.prod(array.row_shape, dtype=np.int64))
    for start in range(0, total, values_per_block):
        count = min(values_per_block, total - start)
        file.seek(_HEADER_BYTES + 4 * start)
        codes = np.frombuffer(file.read(4 * count), dtype=np.int32)
        file.seek(_HEADER_BYTES + 4 * start)
        file.write(table[codes].data)
