"""Batches where a model is: the same numbers, whether the device keeps the sequences or they come with each batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_data import write_tiny

from teracon_fast.data import BatchSource, TaskData, fetch
from teracon_fast.packing import real_lengths

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TaskData:
    return write_tiny(tmp_path_factory.mktemp("data") / "tiny", tasks=2, rows=50).tasks[1]


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("samples", [[3, 99, 0, 3], [7], []])
def test_batches_are_those_of_fetch(task: TaskData, resident: bool, samples: list[int]) -> None:
    source, wanted = BatchSource(task, DEVICE, resident), np.array(samples, np.int64)
    assert source.resident == resident
    x, y, lengths = source.load(source.prepare(wanted))
    expected_x, expected_y = fetch(task, wanted)
    assert x.dtype == y.dtype == torch.int64 and x.device.type == y.device.type == DEVICE.type
    assert torch.equal(x.cpu(), expected_x) and torch.equal(y.cpu(), expected_y)
    assert lengths.dtype == np.int64
    np.testing.assert_array_equal(lengths, real_lengths(expected_x))


@pytest.mark.parametrize("resident", [False, True])
def test_samples_that_do_not_exist_are_refused(task: TaskData, resident: bool) -> None:
    source = BatchSource(task, DEVICE, resident)
    for wrong in (-1, len(task.samples)):
        with pytest.raises(IndexError):
            source.prepare(np.array([0, wrong]))


@pytest.mark.parametrize(("free", "fits"), [(4, True), (3.9, False)])
def test_a_gpu_keeps_sequences_of_up_to_a_quarter_of_its_free_memory(
    task: TaskData, free: float, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from teracon_fast.data import loader

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free * task.sequences.nbytes), 1 << 40))
    assert loader._fits(task, torch.device("cuda", 0)) == fits
    assert not loader._fits(task, torch.device("cpu"))


def test_resident_sequences_do_not_depend_on_the_files(tmp_path: Path) -> None:
    """They are a copy: what is mapped may go."""
    task = write_tiny(tmp_path / "tiny", tasks=1, rows=50).tasks[0]
    source, before = BatchSource(task, DEVICE, True), np.array(task.sequences)
    make: Callable[[], torch.Tensor] = lambda: source.load(source.prepare(np.arange(10))).x  # noqa: E731
    first = make()
    first += 1
    np.testing.assert_array_equal(make().cpu().numpy(), before[task.samples[:10, 0]])
