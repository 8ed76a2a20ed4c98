"""Dictionaries: raw id <-> dense index, stored as Parquet (columns id: string, index: int64); nothing is evaluated on loading.

Ids are in ascending order: numeric if every id is a whole number, else lexicographic. In an item dictionary index 0 is always
the pad "0", whether or not "0" occurs; the published program also gives index 0 to the smallest item if "0" never occurs.

A dictionary that extends another keeps its indices; new ids follow in ascending order. An item dictionary may have K buckets, at
indices 1 to K, that rare items share by a hash of their raw ids.
"""

from __future__ import annotations

import hashlib
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
_TABLE_IDS = 1 << 26  # ids below this are looked up in a table of at most 256 MiB, larger ones are hashed block by block
_BUCKET = re.compile(r"<bucket 1 of ([1-9][0-9]{0,8})>")
_PUBLISHED = re.compile(r"\{'[0-9]+': [0-9]+(, '[0-9]+': [0-9]+)*\}")


def bucket_names(buckets: int) -> list[str]:
    """Ids of K buckets. Each names K, on which the items of a bucket depend."""
    return [f"<bucket {number} of {buckets}>" for number in range(1, buckets + 1)]


def bucket_number(raw: str, buckets: int) -> int:
    """Bucket of a raw item id, 1 to `buckets`: BLAKE2b of its UTF-8 text, so the same on every machine."""
    digest = hashlib.blake2b(raw.encode(), digest_size=8).digest()
    return 1 + int.from_bytes(digest, "little") % buckets


def pyarrow() -> ModuleType:
    """pyarrow, imported on first use: `import teracon_fast` must not need it."""
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError("reading and writing data sets needs pyarrow: pip install 'teracon_fast[train]'") from error
    return pyarrow


def as_int64(values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Integers of any dtype as contiguous int64; TypeError if one is unsigned and too large."""
    if values.dtype == np.uint64 and values.size and values.max() > np.iinfo(np.int64).max:
        raise TypeError(f"got id {values.max()}; expected a signed 64-bit integer")
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
            raise TypeError(f"got mixed ids ({error}); expected only integers or only strings") from error
        if column.null_count:
            raise TypeError("got an empty (null) id; expected integers or strings")
    else:
        raise TypeError(f"got ids of dtype {values.dtype}; expected integers or strings")
    encoded = column.dictionary_encode()
    uniques = encoded.dictionary.to_numpy(zero_copy_only=False)
    return encoded.indices.to_numpy(zero_copy_only=False).reshape(values.shape), uniques


def as_numbers(ids: list[str]) -> npt.NDArray[np.int64] | None:
    """The ids as int64 if each is a whole number in canonical form ("7", not "07" or "+7"), else None."""
    pa = pyarrow()
    column = pa.array(ids, pa.string())
    try:
        numbers = column.cast(pa.int64())
    except pa.ArrowInvalid:
        return None
    return numbers.to_numpy() if numbers.cast(pa.string()).equals(column) else None


class _Codes:
    """int64 ids -> int32 codes, -1 for unknown ids: a lookup table for small ids (nearly all real data, and 8 times faster), else
    a hash table made for each block.
    """

    def __init__(self) -> None:
        self.table: npt.NDArray[np.int32] | None = np.full(1024, -1, dtype=np.int32)
        self.keys: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.codes: npt.NDArray[np.int32] = np.zeros(0, dtype=np.int32)

    def add(self, keys: npt.NDArray[np.int64], codes: npt.NDArray[np.integer] | None = None) -> None:
        """Add new, distinct ids; without `codes`, they get consecutive ones from the number of ids so far."""
        codes = np.arange(len(self.keys), len(self.keys) + len(keys)) if codes is None else codes
        self.keys, self.codes = np.append(self.keys, keys), np.append(self.codes, codes.astype(np.int32))
        if not len(keys) or self.table is None:
            return
        if keys.min() < 0 or keys.max() >= _TABLE_IDS:
            self.table = None
            return
        if keys.max() >= len(self.table):
            self.table = np.full(1 << int(keys.max()).bit_length(), -1, dtype=np.int32)
            self.table[self.keys] = self.codes
        self.table[keys] = codes

    def find(self, values: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Codes of the shape of `values`."""
        if self.table is not None:
            # As unsigned numbers, negative ids are large too.
            known = values.view(np.uint64) < len(self.table)
            if known.all():
                return self.table[values]
            return np.where(known, self.table[np.where(known, values, 0)], np.int32(-1))
        from pyarrow import array, compute

        at = compute.index_in(array(values.reshape(-1)), value_set=array(self.keys)).fill_null(-1).to_numpy()
        return np.append(self.codes, np.int32(-1))[at].reshape(values.shape)


class Dictionary:
    """Raw ids and their dense indices.

    Args:
        ids: distinct raw ids in the order of their indices.

    Attributes:
        ids: [n] array of str (dtype object); `ids[index]` is the raw id.
        buckets: K, the number of ids that are buckets (indices 1 to K); usually 0.

    Raises:
        ValueError: an id occurs twice.
    """

    def __init__(self, ids: Iterable[str]) -> None:
        listed = list(ids)
        self.ids: npt.NDArray[np.object_] = np.array(listed, dtype=object)
        self.buckets = _count_buckets(listed)
        self._numbers: _Codes | None = None
        items = np.delete(np.arange(len(listed)), slice(1, 1 + self.buckets))  # without the buckets, whose ids are no numbers
        numbers = as_numbers(self.ids[items].tolist())
        if numbers is not None:
            self._numbers = _Codes()
            self._numbers.add(numbers, items)
        distinct = len(self._lookup) if self._numbers is None else len(np.unique(self._numbers.keys)) + self.buckets
        if distinct != len(listed):
            raise ValueError("got an id twice; expected distinct ids")

    @cached_property
    def _lookup(self) -> dict[str, int]:
        return {raw: index for index, raw in enumerate(self.ids.tolist())}

    def __len__(self) -> int:
        return len(self.ids)

    def encode(self, values: RawIds) -> npt.NDArray[np.int32]:
        """Dense indices, int32 of the shape of `values` (integers or strings); -1 for unknown ids.

        Raises:
            TypeError: the values are neither integers nor strings.
        """
        if self._numbers is not None and values.dtype.kind in "iu":
            return self._numbers.find(as_int64(values))
        codes, uniques = factorize(values)
        return np.array([self._lookup.get(str(raw), -1) for raw in uniques.tolist()], dtype=np.int32)[codes]

    def bucket_of(self, values: RawIds) -> npt.NDArray[np.int32]:
        """Index of the bucket of each raw id, known or not, int32 of the shape of `values`.

        Raises:
            TypeError: the values are neither integers nor strings.
            ValueError: the dictionary has no buckets.
        """
        if not self.buckets:
            raise ValueError("the item dictionary has no buckets")
        codes, uniques = factorize(values)
        found = [bucket_number(str(raw), self.buckets) for raw in uniques.tolist()]
        return np.array(found, dtype=np.int32)[codes]

    def save(self, path: str | Path) -> None:
        """Write as Parquet, atomically."""
        pa = pyarrow()
        from pyarrow import parquet

        table = pa.table({"id": pa.array(self.ids.tolist(), pa.string()), "index": np.arange(len(self.ids), dtype=np.int64)})
        with atomic_write(path) as file:
            parquet.write_table(table, file)

    @classmethod
    def load(cls, path: str | Path) -> Dictionary:
        """Read what `save` wrote.

        Raises:
            DataError: not a Parquet file, wrong columns, indices other than 0 to n-1 in order, an id twice.
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


def _count_buckets(ids: list[str]) -> int:
    """K if the ids after the pad are the names of K buckets, else 0."""
    match = _BUCKET.fullmatch(ids[1]) if len(ids) > 1 else None
    buckets = int(match[1]) if match else 0
    return buckets if match and ids[1 : 1 + buckets] == bucket_names(buckets) else 0


def read_published_index(path: str | Path) -> Dictionary:
    """The item dictionary that the published program writes with its checkpoints (`index.csv`: one printed Python dict).

    The text must have exactly the printed form `{'0': 0, '17': 1, ...}`; nothing is evaluated.

    Raises:
        DataError: another form, an index missing or shared by two ids (as the published program writes when no pad occurs in its
            file; such a dictionary cannot be inverted), or index 0 is not the pad.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(path, f"not readable as text: {error}") from error
    if not _PUBLISHED.fullmatch(text):
        raise DataError(path, f"got {text[:40]!r}...; expected a dictionary such as {{'0': 0, '17': 1}}")
    pairs = sorted(json.loads(text.replace("'", '"'), object_pairs_hook=list), key=lambda pair: pair[1])
    for expected, (raw, index) in enumerate(pairs):
        if index < expected:
            raise DataError(path, f"ids {pairs[expected - 1][0]!r} and {raw!r} share index {index}; expected distinct indices")
        if index > expected:
            raise DataError(path, f"no id has index {expected}; expected consecutive indices from 0")
    if pairs[0][0] != PAD:
        raise DataError(path, f"index 0 is id {pairs[0][0]!r}; expected the pad '0'")
    try:
        return Dictionary(raw for raw, _ in pairs)
    except ValueError as error:
        raise DataError(path, str(error)) from error


class DictionaryBuilder:
    """Collects distinct ids block by block and numbers them at the end.

    `add` returns provisional codes in order of first occurrence; `finish` returns the dictionary and the table from provisional
    codes to dense indices.

    Args:
        pad: the id "0" takes code and index 0, whether or not it occurs.
        known: a dictionary to extend: its ids keep their indices, new ones follow. With `pad`, its index 0 must be the pad.
        min_count: new ids that occur less often share the buckets of `known`, which must have some if this is above 1.

    Attributes:
        rare: after `finish`, the number of ids that share the buckets, and how often they occur in total.
    """

    def __init__(self, pad: bool, known: Dictionary | None = None, min_count: int = 1) -> None:
        if pad and known is not None and (not len(known) or known.ids[0] != PAD):
            raise ValueError("index 0 of the dictionary to extend is not the pad '0'")
        if min_count > 1 and (known is None or not known.buckets):
            raise ValueError(f"got min_count {min_count} without buckets")
        self._known, self._min_count = known, min_count
        self.rare = (0, 0)
        self._pad = pad and known is None
        self._numbers = _Codes()
        self._strings: dict[str, int] = {PAD: 0} if self._pad else {}
        self._kind = ""
        self._counts: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)  # of new ids, where min_count asks for them
        if self._pad:
            self._numbers.add(np.zeros(1, dtype=np.int64))

    def add(self, values: RawIds) -> npt.NDArray[np.int32]:
        """Provisional codes, int32 of the shape of `values`.

        Raises:
            TypeError: neither integers nor strings, or both in different blocks.
        """
        kind = "integers" if values.dtype.kind in "iu" else "strings"
        if self._kind not in ("", kind):
            raise TypeError(f"got {kind} after {self._kind}; expected ids of one type in the whole task")
        self._kind = kind
        if self._known is None:
            return self._add_new(values)
        codes = self._known.encode(values)
        fresh = codes < 0
        if fresh.any():
            new = self._add_new(values[fresh])
            codes[fresh] = new + len(self._known)
            if self._min_count > 1:
                seen = np.bincount(new, minlength=len(self._counts))
                seen[: len(self._counts)] += self._counts
                self._counts = seen
        return codes

    def _add_new(self, values: RawIds) -> npt.NDArray[np.int32]:
        """Codes from 0 of ids that are not in `known`."""
        if self._kind == "strings":
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
        """The dictionary, and int32 `index_of_code`, the dense index of each provisional code."""
        ids, codes = self._ascending()
        known = [] if self._known is None else self._known.ids.tolist()
        index_of_new = np.empty(len(codes), dtype=np.int32)
        if self._min_count > 1:
            assert self._known is not None
            rare = self._counts[codes] < self._min_count
            self.rare = int(rare.sum()), int(self._counts[codes[rare]].sum())
            index_of_new[codes[rare]] = self._known.bucket_of(ids[rare])
            ids, codes = ids[~rare], codes[~rare]
        index_of_new[codes] = np.arange(len(known), len(known) + len(codes), dtype=np.int32)
        return Dictionary([*known, *ids]), np.append(np.arange(len(known), dtype=np.int32), index_of_new)

    def _ascending(self) -> tuple[npt.NDArray[np.object_], npt.NDArray[np.int32]]:
        """The new ids (str) in the order of their indices, the pad first, and their codes from 0."""
        if self._kind == "strings":
            ids = list(self._strings)
            numbers = as_numbers(ids)
            key = ids.__getitem__ if numbers is None else numbers.__getitem__
            first = int(self._pad)
            codes = np.array([*range(first), *sorted(range(first, len(ids)), key=key)], dtype=np.int32)
            return np.array(ids, dtype=object)[codes], codes
        keys = self._numbers.keys
        order = np.lexsort((keys, keys != 0)) if self._pad else np.argsort(keys)
        return np.array([str(key) for key in keys[order].tolist()], dtype=object), self._numbers.codes[order]
