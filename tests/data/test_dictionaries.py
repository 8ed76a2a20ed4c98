"""Dictionaries: order, pad, round trip through Parquet, the published dictionary without evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from teracon_fast.data.dictionaries import (
    Dictionary,
    DictionaryBuilder,
    bucket_names,
    bucket_number,
    factorize,
    read_published_index,
)
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
        ("__import__('os').system('echo harm')", "expected a dictionary such as"),
        ("{'0': 0, '3': __import__('os')}", "expected a dictionary such as"),
        ("{'0': 0, '3': 1", "expected a dictionary such as"),
        ("{}", "expected a dictionary such as"),
        ("", "expected a dictionary such as"),
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
        with pytest.raises(DataError, match="not readable"):
            read_published_index(bad)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(blocks_of)), pad=st.booleans(), buckets=st.integers(0, 2))
def test_an_extended_dictionary_keeps_its_ids_and_appends_the_new_ones(data, kind: str, pad: bool, buckets: int) -> None:
    dtype = object if kind == "words" else np.int64
    buckets = buckets if pad else 0
    zero = "0" if kind == "words" else 0
    old = data.draw(st.lists(blocks_of[kind].filter(lambda value: value != zero), unique=True, max_size=6))  # in any order
    known = Dictionary([*(["0"] if pad else []), *bucket_names(buckets), *map(str, old)])
    assert known.buckets == buckets
    blocks = data.draw(st.lists(st.lists(blocks_of[kind], max_size=9), min_size=1, max_size=4))
    builder = DictionaryBuilder(pad, known)
    codes = [builder.add(np.array(block, dtype=dtype)) for block in blocks]
    dictionary, index_of_code = builder.finish()
    new = {value for block in blocks for value in block} - set(old) - ({zero} if pad else set())
    plain = kind == "words" and all(word.isascii() and word.isdigit() and str(int(word)) == word for word in new)
    order = sorted(new, key=int if plain else None)  # type: ignore[type-var]
    assert dictionary.ids.tolist() == [*known.ids, *map(str, order)] and dictionary.buckets == buckets
    place = {raw: index for index, raw in enumerate(dictionary.ids)}
    for block, code in zip(blocks, codes, strict=True):
        values = np.array(block, dtype=dtype)
        np.testing.assert_array_equal(index_of_code[code], [place[str(value)] for value in block])
        np.testing.assert_array_equal(dictionary.encode(values), index_of_code[code])


def test_numbers_may_extend_words_and_words_numbers() -> None:
    builder = DictionaryBuilder(True, Dictionary(["0", "b", "9", "10"]))
    codes = builder.add(np.array([[10, 7], [0, 2]]))
    found, index_of_code = builder.finish()
    assert found.ids.tolist() == ["0", "b", "9", "10", "2", "7"] and index_of_code[codes].tolist() == [[3, 5], [0, 4]]
    builder = DictionaryBuilder(True, Dictionary(["0", "9", "10"]))
    codes = builder.add(np.array(["10", "b", "0", "a"], dtype=object))
    found, index_of_code = builder.finish()
    assert found.ids.tolist() == ["0", "9", "10", "a", "b"] and index_of_code[codes].tolist() == [2, 4, 0, 3]
    with pytest.raises(ValueError, match="is not the pad"):
        DictionaryBuilder(True, Dictionary(["5", "0"]))
    with pytest.raises(ValueError, match="got min_count 2 without buckets"):
        DictionaryBuilder(True, Dictionary(["0", "5"]), min_count=2)


def test_buckets_are_the_same_on_every_machine() -> None:
    """Trained weights depend on these numbers: they must never change."""
    assert [bucket_number(raw, 8) for raw in ("7", "42", "a", "é", "10000000000000000")] == [8, 8, 1, 4, 1]
    assert [bucket_number(raw, 1000) for raw in ("7", "42")] == [256, 984]
    counts = np.bincount([bucket_number(str(number), 10) for number in range(10_000)], minlength=11)
    assert counts[0] == 0 and counts[1:].min() > 850 and counts.max() < 1150
    dictionary = Dictionary(["0", *bucket_names(8), "42", "300"])
    for values in (np.array([[7, 42]]), np.array([["7", "42"]], dtype=object)):
        assert dictionary.bucket_of(values).tolist() == [[8, 8]]
        assert dictionary.encode(values).tolist() == [[-1, 9]]
    with pytest.raises(ValueError, match="has no buckets"):
        Dictionary(["0", "42"]).bucket_of(np.array([7]))


def test_only_the_names_of_all_buckets_after_the_pad_are_buckets() -> None:
    assert Dictionary(["0", *bucket_names(3), "5"]).buckets == 3
    for ids in (["0"], ["0", "5"], ["0", "5", *bucket_names(1)], ["0", *bucket_names(3)[:2]], ["0", *bucket_names(3)[1:]]):
        assert Dictionary(ids).buckets == 0
    with pytest.raises(ValueError, match="twice"):
        Dictionary(["0", *bucket_names(2), "5", "5"])
    big = Dictionary(["0", *bucket_names(2), "5", str(1 << 40)])  # ids beyond the table of small ones
    assert big.encode(np.array([1 << 40, 0, 5, 6])).tolist() == [4, 0, 3, -1]


def test_rare_new_ids_share_buckets_and_known_ones_never_do(tmp_path: Path) -> None:
    known = Dictionary(["0", *bucket_names(2), "50"])
    builder = DictionaryBuilder(True, known, min_count=2)
    codes = [builder.add(np.array(block)) for block in ([[0, 7, 8], [9, 50, 3]], [[0, 9, 1], [3, 3, 11]])]
    found, index_of_code = builder.finish()
    assert found.ids.tolist() == [*known.ids, "3", "9"] and found.buckets == 2
    bucket = {raw: bucket_number(str(raw), 2) for raw in (7, 8, 1, 11)}
    assert set(bucket.values()) == {1, 2}
    assert index_of_code[codes[0]].tolist() == [[0, bucket[7], bucket[8]], [5, 3, 4]]
    assert index_of_code[codes[1]].tolist() == [[0, 5, bucket[1]], [4, 4, bucket[11]]]
    assert builder.rare == (4, 4)
    found.save(tmp_path / "items.parquet")
    assert Dictionary.load(tmp_path / "items.parquet").buckets == 2
