"""Dictionaries: raw id <-> dense index, kept as Parquet (columns id: string, index: int64), never as evaluated code.

Order: ascending numerically when every id is a whole number, else as strings. In an item dictionary index 0 is always the pad
"0", whether or not "0" occurs; the published program gives index 0 to the smallest item as well when "0" never occurs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from teracon_fast.data.blocks import RawIds
from teracon_fast.errors import DataError
from teracon_fast.files import atomic_write

PAD = "0"
_WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,17}")
_PUBLISHED = re.compile(r"\{'[0-9]+': [0-9]+(, '[0-9]+': [0-9]+)*\}")


def pyarrow() -> ModuleType:
    """pyarrow, imported at first use: `import teracon_fast` must not need it."""
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError("reading and writing data sets needs pyarrow: pip install 'teracon_fast[train]'") from error
    return pyarrow


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
        if flat.dtype == np.uint64 and len(flat) and flat.max() > np.iinfo(np.int64).max:
            raise TypeError(f"id {flat.max()} does not fit a signed 64-bit integer")
        column = pa.array(flat.astype(np.int64, copy=False))
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


def as_numbers(ids: Iterable[str]) -> npt.NDArray[np.int64] | None:
    """The ids as int64 when each one is a whole number written in its only way ("7", not "07"), else None."""
    ids = list(ids)
    if all(_WHOLE_NUMBER.fullmatch(raw) for raw in ids):
        return np.array(ids, dtype=np.int64)
    return None


class Dictionary:
    """Raw ids and their dense indices.

    Args:
        ids: raw ids in the order of their indices, each once.

    Attributes:
        ids: [n] array of str (dtype object); `ids[index]` is the raw id.
    """

    def __init__(self, ids: Iterable[str]) -> None:
        listed = list(ids)
        self.ids: npt.NDArray[np.object_] = np.array(listed, dtype=object)
        if len(set(listed)) != len(listed):
            raise ValueError("an id occurs twice in a dictionary; expected each id once")
        self._keys = as_numbers(listed)
        self._index: npt.NDArray[np.int32] = np.arange(len(listed), dtype=np.int32)
        self._lookup: dict[str, int] = {}
        if self._keys is not None:
            self._index = np.argsort(self._keys).astype(np.int32)
            self._keys = self._keys[self._index]
        else:
            self._lookup = {raw: index for index, raw in enumerate(listed)}

    def __len__(self) -> int:
        return len(self.ids)

    def encode(self, values: RawIds) -> npt.NDArray[np.int32]:
        """Dense indices, int32 of the shape of `values` (integers or strings); -1 where the id is not in the dictionary."""
        codes, uniques = factorize(values)
        return self._find(uniques)[codes]

    def _find(self, uniques: RawIds) -> npt.NDArray[np.int32]:
        if self._keys is None:
            return np.array([self._lookup.get(str(raw), -1) for raw in uniques], dtype=np.int32)
        if uniques.dtype == object:
            whole = np.array([_WHOLE_NUMBER.fullmatch(raw) is not None for raw in uniques], dtype=bool)
            found = np.full(len(uniques), -1, dtype=np.int32)
            found[whole] = self._find(uniques[whole].astype(np.int64))
            return found
        if not len(self._keys):
            return np.full(len(uniques), -1, dtype=np.int32)
        position = np.minimum(np.searchsorted(self._keys, uniques), len(self._keys) - 1)
        return np.where(self._keys[position] == uniques, self._index[position], -1).astype(np.int32)

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
            DataError: not a Parquet file, other columns, indices that are not 0 to n-1 each once, an id twice.
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
        pairs = zip(table["id"].to_pylist(), table["index"].to_pylist(), strict=True)
        return _from_pairs(path, pairs)


def _from_pairs(path: str | Path, pairs: Iterable[tuple[Any, Any]]) -> Dictionary:
    by_index = sorted(pairs, key=lambda pair: -1 if pair[1] is None else pair[1])
    for expected, (raw, index) in enumerate(by_index):
        if raw is None or index is None:
            raise DataError(path, f"empty id or index: {raw!r}, {index!r}")
        if index != expected:
            what = (
                f"ids {by_index[expected - 1][0]!r} and {raw!r} share index {index}"
                if index < expected
                else f"no id has index {expected}"
            )
            raise DataError(path, f"{what}; expected the indices 0 to {len(by_index) - 1}, each once")
    try:
        return Dictionary(raw for raw, _ in by_index)
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
    pairs = json.loads(text.replace("'", '"'), object_pairs_hook=list)
    dictionary = _from_pairs(path, pairs)
    if dictionary.ids[0] != PAD:
        raise DataError(path, f"index 0 is id {dictionary.ids[0]!r}; expected the pad '0'")
    return dictionary


class DictionaryBuilder:
    """Collects distinct ids block by block, and numbers them at the end.

    `add` gives provisional codes in order of first occurrence; `finish` gives the dictionary and the table from provisional
    code to dense index.

    Args:
        pad: the id "0" takes code and index 0, whether or not it occurs.
    """

    def __init__(self, pad: bool) -> None:
        self._pad = pad
        self._keys: npt.NDArray[np.int64] = np.zeros(int(pad), dtype=np.int64)
        self._codes: npt.NDArray[np.int32] = np.zeros(int(pad), dtype=np.int32)
        self._strings: dict[str, int] = {PAD: 0} if pad else {}
        self._kind = ""

    def add(self, values: RawIds) -> npt.NDArray[np.int32]:
        """Provisional codes, int32 of the shape of `values`.

        Raises:
            TypeError: neither integers nor strings, or integers in one block and strings in another.
        """
        codes, uniques = factorize(values)
        kind = "strings" if uniques.dtype == object else "integers"
        if self._kind not in ("", kind):
            raise TypeError(
                f"got ids that are {kind} after ids that are {self._kind}; expected one kind for the whole task"
            )
        self._kind = kind
        provisional = self._add_strings(uniques) if kind == "strings" else self._add_numbers(uniques)
        return provisional[codes]

    def _add_strings(self, uniques: RawIds) -> npt.NDArray[np.int32]:
        known = self._strings
        return np.array([known.setdefault(raw, len(known)) for raw in uniques], dtype=np.int32)

    def _add_numbers(self, uniques: RawIds) -> npt.NDArray[np.int32]:
        position = np.searchsorted(self._keys, uniques)
        known = np.zeros(len(uniques), dtype=bool)
        if len(self._keys):
            known = self._keys[np.minimum(position, len(self._keys) - 1)] == uniques
        fresh = np.sort(uniques[~known])
        if len(fresh):
            at = np.searchsorted(self._keys, fresh)
            fresh_codes = np.arange(len(self._keys), len(self._keys) + len(fresh), dtype=np.int32)
            self._keys, self._codes = np.insert(self._keys, at, fresh), np.insert(self._codes, at, fresh_codes)
            position = np.searchsorted(self._keys, uniques)
        return self._codes[position]

    def finish(self) -> tuple[Dictionary, npt.NDArray[np.int32]]:
        """The dictionary, and int32 `index_of_code` with the dense index of every provisional code."""
        if self._kind != "strings":
            keys, codes = self._keys, self._codes
            if self._pad:
                # Negative ids sort before 0, but the pad stays first.
                first = np.argsort(keys != 0, kind="stable")
                keys, codes = keys[first], codes[first]
            ids = [str(key) for key in keys.tolist()]
        else:
            raw = list(self._strings)
            numbers = as_numbers(raw)
            start = int(self._pad)
            rest = range(start, len(raw))
            order = sorted(rest, key=raw.__getitem__ if numbers is None else numbers.__getitem__)
            codes = np.array([*range(start), *order], dtype=np.int32)
            ids = [raw[code] for code in codes]
        index_of_code = np.empty(len(codes), dtype=np.int32)
        index_of_code[codes] = np.arange(len(codes), dtype=np.int32)
        return Dictionary(ids), index_of_code
