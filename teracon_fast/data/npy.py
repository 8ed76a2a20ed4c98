"""Appending to .npy files, for arrays larger than memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


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
        self._write_header()
        self.header_bytes = self.file.tell()

    def _write_header(self) -> None:
        # numpy leaves room in it for the first axis to grow, so that `close` can overwrite it.
        about = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.rows, *self.row_shape)}
        np.lib.format.write_array_header_1_0(self.file, about)

    def append(self, values: npt.NDArray[Any]) -> None:
        """Append rows [n, *row_shape]."""
        assert values.shape[1:] == self.row_shape
        self.file.write(np.ascontiguousarray(values, dtype=self.dtype).data)
        self.rows += len(values)

    def close(self) -> None:
        """Write the final header and flush to disk."""
        self.file.seek(0)
        self._write_header()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def remap(array: NpyWriter, table: npt.NDArray[np.int32], values_per_block: int = 1 << 22) -> None:
    """Replace every value v of an open int32 file by `table[v]`, block by block, in place."""
    file = array.file
    total = array.rows * int(np.prod(array.row_shape, dtype=np.int64))
    for start in range(0, total, values_per_block):
        count = min(values_per_block, total - start)
        file.seek(array.header_bytes + 4 * start)
        codes = np.frombuffer(file.read(4 * count), dtype=np.int32)
        file.seek(array.header_bytes + 4 * start)
        file.write(table[codes].data)
