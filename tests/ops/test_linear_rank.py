"""Ranking with linear heads: exact ranks and top-k, ties, shared rows, exclusions, scores that are not numbers."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import INSTRUCTION_SETS, passes_under
from torch import Tensor

from teracon_fast import env_report, ops
from teracon_fast.errors import ShapeError, TeraconError
from teracon_fast.ops.linear_rank.api import _linear_rank, _linear_topk
from teracon_fast.reference import target_rank, top_labels

# Plain PyTorch and the compiled kernels where they are; Triton's have test_triton_backend.py and tests/kernels.
BACKENDS = [name for name in env_report()["backends"]["linear_rank"] if name != "triton"]
COMPILED = pytest.mark.skipif("cpu" not in BACKENDS, reason="this installation has no compiled extension")


def whole_numbers(rows: int, labels: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """A head whose scores are small whole numbers: exact in every dtype, with many ties."""
    hidden, weight, bias = (torch.randint(-1, 2, shape).float() for shape in ((rows, 3), (labels, 3), (labels,)))
    return hidden.to(dtype), weight, bias


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "labels", "threads"), [(1, 1, 1), (40, 12, 2), (33, 300, 1), (97, 1001, 3)])
def test_rank_and_topk_equal_a_full_stable_sort_with_many_ties(
    backend: str, dtype: torch.dtype, rows: int, labels: int, threads: int
) -> None:
    hidden, weight, bias = whole_numbers(rows, labels, dtype)
    scores = F.linear(hidden.float(), weight, bias)
    targets, row_of = torch.randint(labels, (3 * rows,)), torch.randint(rows, (3 * rows,))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ranks = ops.linear_rank(hidden, weight, bias, targets, row_of, backend=backend)
        assert torch.equal(ranks, target_rank(scores[row_of], targets))
        ranks = ops.linear_rank(hidden, weight, bias, targets[:rows], backend=backend)
        assert torch.equal(ranks, target_rank(scores, targets[:rows]))
        for k in {1, min(5, labels), labels}:
            best, found = ops.linear_topk(hidden, weight, bias, k, backend=backend)
            expected = top_labels(scores, k)
            assert best.dtype == torch.float32 and torch.equal(best, expected[0]) and torch.equal(found, expected[1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("block_bytes", [1, 200])
def test_the_torch_backend_takes_some_rows_at_a_time(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, order = [], []
    for size in (1 << 20, block_bytes):
        monkeypatch.setattr(importlib.import_module("teracon_fast.ops.linear_rank.torch"), "_BLOCK_BYTES", size)
        torch.manual_seed(1)
        head, targets, row_of = whole_numbers(40, 12), torch.randint(12, (90,)), torch.randint(40, (90,))
        expected.append(ops.linear_rank(*head, targets, row_of, backend="torch"))
        order.append(ops.linear_topk(*head, 5, [torch.arange(i % 9) for i in range(40)], backend="torch")[1])
    assert torch.equal(*expected) and torch.equal(*order)


@COMPILED
def test_the_cpu_backend_holds_the_best_of_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    head, exclude = whole_numbers(40, 200), [torch.arange(i) for i in range(40)]
    whole = ops.linear_topk(*head, 5, exclude, backend="cpu")
    monkeypatch.setattr(importlib.import_module("teracon_fast.ops.linear_rank.cpu"), "_HELD_BYTES", 8 * 5 * 7)
    parts = ops.linear_topk(*head, 5, exclude, backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_excluded_labels_are_never_returned(backend: str) -> None:
    hidden, weight, bias = whole_numbers(60, 500)
    exclude = [torch.randint(500, (int(n),)) for n in torch.randint(0, 499, (60,))]  # unsorted, with repetitions
    best, found = ops.linear_topk(hidden, weight, bias, 20, exclude, backend=backend)
    expected = top_labels(F.linear(hidden, weight, bias), 20, exclude)
    assert torch.equal(best, expected[0]) and torch.equal(found, expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_labels_run_out(backend: str) -> None:
    hidden, weight, bias = torch.ones(2, 1), torch.arange(4.0)[:, None], torch.zeros(4)
    scores, labels = ops.linear_topk(hidden, weight, bias, 3, [torch.tensor([3]), torch.tensor([0, 1, 3])], backend=backend)
    assert labels.tolist() == [[2, 1, 0], [2, -1, -1]]
    assert scores[1, 1:].isneginf().all()
    bias[:2] = -torch.inf
    assert ops.linear_topk(hidden, weight, bias, 4, backend=backend)[1].tolist() == [[3, 2, -1, -1]] * 2
    assert ops.linear_topk(hidden[:0], weight, bias, 2, [], backend=backend)[1].shape == (0, 2)
    assert ops.linear_rank(hidden[:0], weight, bias, torch.empty(0, dtype=torch.int64), backend=backend).shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_that_are_not_numbers_are_not_ranked(backend: str) -> None:
    hidden, weight, bias = whole_numbers(40, 300)
    targets = torch.zeros(40, dtype=torch.int64)
    bias[7] = torch.inf  # infinite scores are ranked
    assert ops.linear_rank(hidden, weight, bias, targets, backend=backend).ge(1).all()
    for place in ((hidden, 33), (weight, 250), (bias, 299)):
        values = [v.clone() for v in (hidden, weight, bias)]
        values[[hidden is place[0], weight is place[0], bias is place[0]].index(True)][place[1]] = torch.nan
        for call in (lambda v: ops.linear_rank(*v, targets, backend=backend), lambda v: ops.linear_topk(*v, 3, backend=backend)):
            with pytest.raises(TeraconError, match="scores that are NaN"):
                call(values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_that_are_not_contiguous(backend: str) -> None:
    hidden, weight, bias = whole_numbers(40, 300)
    targets = torch.randint(300, (40,))
    strided = [torch.stack([v, -v], -1)[..., 0] for v in (hidden, weight, bias)]
    assert not any(v.is_contiguous() for v in strided)
    every_second = torch.stack([targets, targets * 0 - 1], -1)[:, 0]
    assert torch.equal(ops.linear_rank(*strided, every_second, backend=backend), ops.linear_rank(hidden, weight, bias, targets))
    assert torch.equal(ops.linear_topk(*strided, 4, backend=backend)[1], ops.linear_topk(hidden, weight, bias, 4)[1])
    one = hidden[:1].expand(40, 3)
    found = ops.linear_topk(one, weight, bias, 4, backend=backend)[1]
    assert torch.equal(found, ops.linear_topk(one.clone(), weight, bias, 4)[1])


@COMPILED
def test_rows_times_labels_beyond_the_range_of_32_bits() -> None:
    """One channel keeps the memory small: 300 rows by 7.2 million labels."""
    labels = 7_200_000
    hidden, weight, bias = torch.ones(300, 1), torch.zeros(labels, 1), torch.zeros(labels)
    bias[-2:] = 1.0
    ranks = ops.linear_rank(hidden, weight, bias, torch.arange(labels - 300, labels), backend="cpu")
    assert torch.equal(ranks, torch.cat([torch.arange(labels - 300, labels - 2) + 2, torch.tensor([0, 1])]))
    assert ops.linear_topk(hidden, weight, bias, 3, backend="cpu")[1].tolist() == [[labels - 2, labels - 1, 0]] * 300


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend: str) -> None:
    hidden, weight, bias = whole_numbers(5, 11)
    targets, rows, offsets = torch.randint(11, (7,)), torch.randint(5, (7,)), torch.tensor([0, 1, 1, 2, 2, 3])
    torch.library.opcheck(_linear_rank, (hidden, weight, bias, targets, rows, backend))
    torch.library.opcheck(_linear_topk, (hidden, weight, bias, 3, torch.tensor([1, 4, 2]), offsets, backend))

    def call() -> Tensor:
        return ops.linear_rank(hidden, weight, bias, targets, rows, backend=backend)

    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(), call())


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@COMPILED
def test_every_instruction_set_that_this_machine_has(isa: str) -> None:
    """The whole of this file again, in a process that is told which kernels to use."""
    passes_under(isa, __file__, "not instruction_set and not opcheck and not torch and not 32_bits")


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_out_of_range_are_never_read(backend: str) -> None:
    hidden, weight, bias = whole_numbers(5, 11)
    numbers = torch.zeros(5, dtype=torch.int64)
    for far in (-1, 11, 2**40):
        with pytest.raises((IndexError, RuntimeError), match=f"targets has {far}, which is out of range"):
            ops.linear_rank(hidden, weight, bias, torch.full((5,), far), backend=backend)
        with pytest.raises((IndexError, RuntimeError), match="rows has .*, which is out of range"):
            ops.linear_rank(hidden, weight, bias, numbers, torch.full((5,), far), backend=backend)
        with pytest.raises((IndexError, RuntimeError), match=f"exclude has {far}, which is out of range"):
            ops.linear_topk(hidden, weight, bias, 2, [torch.tensor([far])] * 5, backend=backend)


def test_inputs_that_do_not_fit_are_refused() -> None:
    hidden, weight, bias = whole_numbers(2, 11)
    with pytest.raises(ShapeError, match=r"linear_rank: targets is torch.int64 \[3\].*expected torch.int64 \[2\]"):
        ops.linear_rank(hidden, weight, bias, torch.zeros(3).long())
    with pytest.raises(ShapeError, match=r"linear_rank: weight is torch.float32 \[11, 2\]"):
        ops.linear_rank(hidden, weight[:, 1:], bias, torch.zeros(2).long())
    with pytest.raises(ShapeError, match="linear_topk: weight is torch.float64"):
        ops.linear_topk(hidden, weight.double(), bias, 1)
    with pytest.raises(ShapeError, match="k is 12, expected 1..11"):
        ops.linear_topk(hidden, weight, bias, 12)
    with pytest.raises(ShapeError, match="exclude has 1 rows"):
        ops.linear_topk(hidden, weight, bias, 2, [torch.tensor([1])])
    with pytest.raises(ShapeError, match="exclude of row 1 is torch.float32"):
        ops.linear_topk(hidden, weight, bias, 2, [torch.tensor([1]), torch.tensor([1.0])])
