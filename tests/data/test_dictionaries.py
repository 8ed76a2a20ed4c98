"""Dictionaries: order, pad, round trip through Parquet, the published dictionary without evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from teracon_fast.data.dictionaries import Dictionary, DictionaryBuilder, factorize, read_published_index
from teracon_fast.errors import DataError

small = st.integers(0, 50)
any_int = st.one_of(small, st.integers(-(2**63), 2**63 - 1))
words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5)
blocks_of = {"small": small, "any": any_int, "words": words}


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(blocks_of)), pad=st.booleans())
def test_builder_numbers_ids_ascending_and_keeps_the_pad_first(data, kind: str, pad: bool) -> None:
    dtype = object if kind == "words" else np.int64
    blocks = data.draw(st.lists(st.lists(blocks_of[kind], max_size=9), min_size=1, max_size=4))
    builder = DictionaryBuilder(pad)
    codes = [builder.add(np.array(block, dtype=dtype)) for block in blocks]
    dictionary, index_of_code = builder.finish()
    distinct = {value for block in blocks for value in block}
    zero = "0" if kind == "words" else 0
    expected = ([zero] if pad else []) + sorted(distinct - ({zero} if pad else set()))
    if kind == "words" and all(word.isascii() and word.isdigit() and str(int(word)) == word for word in expected):
        expected.sort(key=int)
    assert dictionary.ids.tolist() == [str(value) for value in expected]
    for block, code in zip(blocks, codes, strict=True):
        values = np.array(block, dtype=dtype)
        np.testing.assert_array_equal(index_of_code[code], [expected.index(value) for value in block])
        np.testing.assert_array_equal(dictionary.encode(values), index_of_code[code])
        np.testing.assert_array_equal(dictionary.encode(values.astype(str).astype(object)), index_of_code[code])


@settings(max_examples=100, deadline=None)
@given(known=st.sets(any_int, max_size=20), asked=st.lists(any_int, max_size=20))
def test_unseen_ids_are_minus_one(known: set[int], asked: list[int]) -> None:
    order = sorted(known)
    dictionary = Dictionary(map(str, order))
    expected = [order.index(value) if value in known else -1 for value in asked]
    np.testing.assert_array_equal(dictionary.encode(np.array(asked, dtype=np.int64)), np.array(expected, np.int32))
    np.testing.assert_array_equal(dictionary.encode(np.array(list(map(str, asked)), dtype=object)), expected)


def test_encode_keeps_the_shape_and_takes_any_integer_dtype() -> None:
    dictionary = Dictionary(["0", "5", "200"])
    for dtype in (np.uint8, np.int16, np.uint64):
        codes = dictionary.encode(np.array([[5, 200], [0, 7]], dtype=dtype))
        assert codes.dtype == np.int32 and codes.tolist() == [[1, 2], [0, -1]]
    assert dictionary.encode(np.zeros((0, 3), dtype=np.int64)).shape == (0, 3)


def test_ids_that_are_not_plain_numbers_sort_as_text_and_stay_apart() -> None:
    builder = DictionaryBuilder(pad=True)
    builder.add(np.array(["10", "9", "07", "7"], dtype=object))
    assert builder.finish()[0].ids.tolist() == ["0", "07", "10", "7", "9"]


@pytest.mark.parametrize("values", [np.array([1.5]), np.array(["a", None], dtype=object), np.array([3, "a"], dtype=object),
                                    np.array([2**63], dtype=np.uint64)])  # fmt: skip
def test_other_ids_are_refused(values) -> None:
    with pytest.raises(TypeError):
        factorize(values)
    with pytest.raises(TypeError):
        DictionaryBuilder(pad=False).add(values)


def test_numbers_after_strings_are_refused() -> None:
    builder = DictionaryBuilder(pad=False)
    builder.add(np.array(["1"], dtype=object))
    with pytest.raises(TypeError, match="integers after strings"):
        builder.add(np.array([1]))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(words, unique=True, max_size=20))
def test_parquet_round_trip(tmp_path: Path, ids: list[str]) -> None:
    Dictionary(ids).save(tmp_path / "d.parquet")
    assert Dictionary.load(tmp_path / "d.parquet").ids.tolist() == ids


def test_load_refuses_what_is_not_a_dictionary(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    tables = [
        ({"id": ["a"]}, "not a dictionary|columns"),
        ({"id": [1], "index": [0]}, "types"),
        ({"id": ["a", "a"], "index": [0, 1]}, "twice"),
        ({"id": ["a", "b"], "index": [1, 0]}, "in order"),
        ({"id": ["a", None], "index": [0, 1]}, "empty"),
    ]
    for columns, reason in tables:
        pq.write_table(pa.table(columns), path)
        with pytest.raises(DataError, match=reason):
            Dictionary.load(path)
    whole = tmp_path / "whole.parquet"
    Dictionary(["0", "7"]).save(whole)
    path.write_bytes(whole.read_bytes()[:-9])
    for bad in (path, tmp_path / "absent.parquet"):
        with pytest.raises(DataError, match="not a dictionary"):
            Dictionary.load(bad)


def test_published_dictionary_is_read(tmp_path: Path) -> None:
    path = tmp_path / "index.csv"
    path.write_text(str({"0": 0, "3": 1, "12": 2}))
    assert read_published_index(path).ids.tolist() == ["0", "3", "12"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("__import__('os').system('echo harm')", "expected a printed dictionary"),
        ("{'0': 0, '3': __import__('os')}", "expected a printed dictionary"),
        ("{'0': 0, '3': 1", "expected a printed dictionary"),
        ("{}", "expected a printed dictionary"),
        ("", "expected a printed dictionary"),
        ("{'0': 0, '3': 0, '5': 1}", "'0' and '3' share index 0"),
        ("{'0': 0, '3': 2}", "no id has index 1"),
        ("{'3': 0, '0': 1}", "expected the pad"),
        ("{'0': 0, '3': 1, '3': 2}", "twice"),
    ],
)
def test_published_dictionary_is_never_evaluated(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "index.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=reason):
        read_published_index(path)


def test_published_dictionary_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "index.csv"
    path.write_bytes(b"\xff\x00")
    for bad in (path, tmp_path / "absent"):
        with pytest.raises(DataError, match="cannot be read"):
            read_published_index(bad)
