"""Dictionaries: raw id <-> dense index, kept as Parquet (columns id: string, index: int64), never as evaluated code.

Order: ascending numerically when every id is a whole number, else as strings. In an item dictionary index 0 is always the pad
"0", whether or not "0" occurs; the published program gives index 0 to the smallest item as well when "0" never occurs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from teracon_fast.data.blocks import RawIds
from teracon_fast.errors import DataError
from teracon_fast.files import atomic_write

PAD = "0"
_TABLE_IDS = 1 << 26  # ids below this are looked up in a table of at most 256 MiB; others are hashed, block by block
_PUBLISHED = re.compile(r"\{'[0-9]+': [0-9]+(, '[0-9]+': [0-9]+)*\}")


def pyarrow() -> ModuleType:
    """pyarrow, imported at first use: `import teracon_fast` must not need it."""
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError("reading and writing data sets needs pyarrow: pip install 'teracon_fast[train]'") from error
    return pyarrow


def as_int64(values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Integers of any dtype as contiguous int64.

    Raises:
        TypeError: an unsigned number that does not fit.
    """
    if values.dtype == np.uint64 and values.size and values.max() > np.iinfo(np.int64).max:
        raise TypeError(f"id {values.max()} does not fit a signed 64-bit integer")
    return np.ascontiguousarray(values, dtype=np.int64)


def factorize(values: RawIds) -> tuple[npt.NDArray[np.int32], RawIds]:
    """Codes and distinct values: `uniques[codes] == values`.

    Args:
        values: integers or strings, any shape.

    Returns:
        codes int32 of the shape of `values`, and uniques, 1-D in order of first occurrence: int64, or objects of type str.

    Raises:
        TypeError: the values are neither integers nor strings.
    """
    pa = pyarrow()
    flat = values.reshape(-1)
    if flat.dtype.kind in "iu":
        column = pa.array(as_int64(flat))
    elif flat.dtype.kind in "UOT":
        try:
            column = pa.array(flat.tolist(), pa.string())
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise TypeError(f"got ids that are not all strings ({error}); expected integers or strings") from error
        if column.null_count:
            raise TypeError("got an empty (null) id; expected integers or strings")
    else:
        raise TypeError(f"got ids of dtype {values.dtype}; expected integers or strings")
    encoded = column.dictionary_encode()
    uniques = encoded.dictionary.to_numpy(zero_copy_only=False)
    return encoded.indices.to_numpy(zero_copy_only=False).reshape(values.shape), uniques


def as_numbers(ids: list[str]) -> npt.NDArray[np.int64] | None:
    """The ids as int64 when each one is a whole number written in its only way ("7", not "07" or "+7"), else None."""
    pa = pyarrow()
    column = pa.array(ids, pa.string())
    try:
        numbers = column.cast(pa.int64())
    except pa.ArrowInvalid:
        return None
    return numbers.to_numpy() if numbers.cast(pa.string()).equals(column) else None


class _Codes:
    """int64 ids -> int32 codes, -1 for ids without a code: a table for small ids, else sorted keys.

    The table needs one read per value and no hashing, and covers nearly all real data.
    """

    def __init__(self) -> None:
        self.table: npt.NDArray[np.int32] | None = np.full(1024, -1, dtype=np.int32)
        self.keys: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.codes: npt.NDArray[np.int32] = np.zeros(0, dtype=np.int32)

    def add(self, keys: npt.NDArray[np.int64]) -> None:
        """Give new, distinct ids the next codes, in the order given."""
        codes = np.arange(len(self.keys), len(self.keys) + len(keys), dtype=np.int32)
        order = np.argsort(keys)
        at = np.searchsorted(self.keys, keys[order])
        self.keys, self.codes = np.insert(self.keys, at, keys[order]), np.insert(self.codes, at, codes[order])
        if not len(keys) or self.table is None:
            return
        if self.keys[0] < 0 or self.keys[-1] >= _TABLE_IDS:
            self.table = None
            return
        if self.keys[-1] >= len(self.table):
            self.table = np.full(1 << int(self.keys[-1]).bit_length(), -1, dtype=np.int32)
            self.table[self.keys] = self.codes
        self.table[keys] = codes

    def find(self, values: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Codes of the shape of `values`."""
        if self.table is not None:
            # As unsigned numbers negative ids are large, too.
            known = values.view(np.uint64) < len(self.table)
            if known.all():
                return self.table[values]
            return np.where(known, self.table[np.where(known, values, 0)], np.int32(-1))
        codes, uniques = factorize(values)
        order = np.argsort(uniques)
        position = np.minimum(np.searchsorted(self.keys, uniques[order]), len(self.keys) - 1)
        found = np.empty(len(uniques), dtype=np.int32)
        found[order] = np.where(self.keys[position] == uniques[order], self.codes[position], -1)
        return found[codes]


class Dictionary:
    """Raw ids and their dense indices.

    Args:
        ids: raw ids in the order of their indices, each once.

    Attributes:
        ids: [n] array of str (dtype object); `ids[index]` is the raw id.

    Raises:
        ValueError: an id occurs twice.
    """

    def __init__(self, ids: Iterable[str]) -> None:
        listed = list(ids)
        self.ids: npt.NDArray[np.object_] = np.array(listed, dtype=object)
        self._numbers: _Codes | None = None
        numbers = as_numbers(listed)
        if numbers is not None:
            self._numbers = _Codes()
            self._numbers.add(numbers)
        distinct = len(self._lookup) if self._numbers is None else len(np.unique(self._numbers.keys))
        if distinct != len(listed):
            raise ValueError("an id occurs twice in a dictionary; expected each id once")

    @cached_property
    def _lookup(self) -> dict[str, int]:
        return {raw: index for index, raw in enumerate(self.ids.tolist())}

    def __len__(self) -> int:
        return len(self.ids)

    def encode(self, values: RawIds) -> npt.NDArray[np.int32]:
        """Dense indices, int32 of the shape of `values` (integers or strings); -1 where the id is not in the dictionary.

        Raises:
            TypeError: the values are neither integers nor strings.
        """
        if self._numbers is not None and values.dtype.kind in "iu":
            return self._numbers.find(as_int64(values))
        codes, uniques = factorize(values)
        return np.array([self._lookup.get(str(raw), -1) for raw in uniques.tolist()], dtype=np.int32)[codes]

    def save(self, path: str | Path) -> None:
        """Write as Parquet, whole or not at all."""
        pa = pyarrow()
        from pyarrow import parquet

        table = pa.table(
            {"id": pa.array(self.ids.tolist(), pa.string()), "index": np.arange(len(self.ids), dtype=np.int64)}
        )
        with atomic_write(path) as file:
            parquet.write_table(table, file)

    @classmethod
    def load(cls, path: str | Path) -> Dictionary:
        """Read what `save` wrote.

        Raises:
            DataError: not a Parquet file, other columns, indices other than 0 to n-1 in order, an id twice.
        """
        pa = pyarrow()
        from pyarrow import parquet

        try:
            table = parquet.read_table(path, columns=["id", "index"], memory_map=False)
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise DataError(path, f"not a dictionary in Parquet: {error}") from error
        names = table.column_names
        if names != ["id", "index"] or table["id"].type != pa.string() or table["index"].type != pa.int64():
            raise DataError(path, f"got columns {names} of types {[str(t) for t in table.schema.types]}; "
                            "expected id: string, index: int64")  # fmt: skip
        index = table["index"].to_numpy()
        if table["id"].null_count or not np.array_equal(index, np.arange(len(index))):
            raise DataError(path, f"got empty ids, or indices other than 0 to {len(index) - 1} in order")
        try:
            return cls(table["id"].to_pylist())
        except ValueError as error:
            raise DataError(path, str(error)) from error


def read_published_index(path: str | Path) -> Dictionary:
    """The item dictionary that the published program writes beside its checkpoints (`index.csv`: one printed Python dict).

    The text must have exactly the printed form `{'0': 0, '17': 1, ...}`; nothing is evaluated.

    Raises:
        DataError: another form, an index missing or given to two ids (the published program does that when no pad occurs in its
            file: such a dictionary cannot be inverted), or index 0 not the pad.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(path, f"cannot be read as text: {error}") from error
    if not _PUBLISHED.fullmatch(text):
        raise DataError(path, f"got {text[:40]!r}...; expected a printed dictionary such as {{'0': 0, '17': 1}}")
    pairs = sorted(json.loads(text.replace("'", '"'), object_pairs_hook=list), key=lambda pair: pair[1])
    for expected, (raw, index) in enumerate(pairs):
        if index < expected:
            raise DataError(
                path, f"ids {pairs[expected - 1][0]!r} and {raw!r} share index {index}; expected one id each"
            )
        if index > expected:
            raise DataError(path, f"no id has index {expected}; expected indices from 0 without gap")
    if pairs[0][0] != PAD:
        raise DataError(path, f"index 0 is id {pairs[0][0]!r}; expected the pad '0'")
    try:
        return Dictionary(raw for raw, _ in pairs)
    except ValueError as error:
        raise DataError(path, str(error)) from error


class DictionaryBuilder:
    """Collects distinct ids block by block, and numbers them at the end.

    `add` gives provisional codes in order of first occurrence; `finish` gives the dictionary and the table from provisional
    code to dense index.

    Args:
        pad: the id "0" takes code and index 0, whether or not it occurs.
    """

    def __init__(self, pad: bool) -> None:
        self._pad = pad
        self._numbers = _Codes()
        self._strings: dict[str, int] = {PAD: 0} if pad else {}
        self._kind = ""
        if pad:
            self._numbers.add(np.zeros(1, dtype=np.int64))

    def add(self, values: RawIds) -> npt.NDArray[np.int32]:
        """Provisional codes, int32 of the shape of `values`.

        Raises:
            TypeError: neither integers nor strings, or integers in one block and strings in another.
        """
        kind = "integers" if values.dtype.kind in "iu" else "strings"
        if self._kind not in ("", kind):
            raise TypeError(f"got ids that are {kind} after {self._kind}; expected one kind for the whole task")
        self._kind = kind
        if kind == "strings":
            codes, uniques = factorize(values)
            known = self._strings
            return np.array([known.setdefault(raw, len(known)) for raw in uniques.tolist()], dtype=np.int32)[codes]
        numbers = as_int64(values)
        codes = self._numbers.find(numbers)
        fresh = codes < 0
        if fresh.any():
            ordered = np.sort(numbers[fresh])
            self._numbers.add(ordered[np.append(True, ordered[1:] != ordered[:-1])])
            codes[fresh] = self._numbers.find(numbers[fresh])
        return codes

    def finish(self) -> tuple[Dictionary, npt.NDArray[np.int32]]:
        """The dictionary, and int32 `index_of_code` with the dense index of every provisional code."""
        if self._kind == "strings":
            raw = list(self._strings)
            numbers = as_numbers(raw)
            key = raw.__getitem__ if numbers is None else numbers.__getitem__
            first = int(self._pad)
            codes = np.array([*range(first), *sorted(range(first, len(raw)), key=key)], dtype=np.int32)
            ids = [raw[code] for code in codes]
        else:
            keys, codes = self._numbers.keys, self._numbers.codes
            if self._pad:
                # Negative ids sort before 0, but the pad stays first.
                order = np.argsort(keys != 0, kind="stable")
                keys, codes = keys[order], codes[order]
            ids = [str(key) for key in keys.tolist()]
        index_of_code = np.empty(len(codes), dtype=np.int32)
        index_of_code[codes] = np.arange(len(codes), dtype=np.int32)
        return Dictionary(ids), index_of_code
