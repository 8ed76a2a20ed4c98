"""Many arrays by one copy, out of pinned memory where there is a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from teracon_fast.packing import transfers


def test_arrays_arrive_as_aligned_dense_tensors_of_one_buffer() -> None:
    arrays = [
        np.arange(5, dtype=np.int32), np.arange(6, dtype=np.int64).reshape(3, 2).T, np.zeros((0, 3), np.int32),
        np.zeros(0, np.int64), np.arange(12, dtype=np.int32)[::2].reshape(2, 3), np.array([2**40]),
    ]  # fmt: skip
    moved = transfers.together(arrays, torch.device("cpu"))
    for tensor, array in zip(moved, arrays, strict=True):
        assert tensor.is_contiguous() and tensor.data_ptr() % transfers.ALIGNMENT == 0
        assert torch.equal(tensor, torch.from_numpy(array.copy()))
    assert len({tensor.untyped_storage().data_ptr() for tensor in moved}) == 1
    assert transfers.together([], torch.device("cpu")) == []


def test_a_dense_part_of_a_part() -> None:
    part = torch.arange(20)[4:]
    assert transfers.dense(part, (2, 3), 1).tolist() == [[5, 6, 7], [8, 9, 10]]
    assert transfers.dense(part, (2,), 3).tolist() == [7, 8]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_buffer_is_pinned_for_a_gpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def empty(*_: Any, pin_memory: bool, **__: Any) -> Any:
        asked.append(pin_memory)
        raise MemoryError

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(MemoryError):
        transfers.together([np.zeros(3, np.int32)], torch.device(kind))
    assert asked == [kind == "cuda"]


def test_a_tensor_stays_where_it_is() -> None:
    tensor = torch.ones(3)
    assert transfers.to_device(tensor, torch.device("cpu")) is tensor
