"""The table of launch configurations, and how work is shared out."""

from __future__ import annotations

import itertools
import math
import threading
from typing import get_args

import pytest
import torch

from teracon_fast.kernels import configs
from teracon_fast.kernels.configs import Config, architecture, config, split

OPERATIONS = get_args(configs.Operation)
SECOND_PRODUCT = ("weight", "hidden", "retention")


@pytest.mark.parametrize("name", [*configs.SHARED, "interpreter"])
def test_every_architecture_has_every_operation_in_tiles_that_triton_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "architecture", lambda device: name)
    for operation, dtype, size in itertools.product(
        OPERATIONS, (torch.float32, torch.bfloat16, torch.float16), (1, 128, 256, 512, 4096, 640_000)
    ):
        chosen = config(operation, torch.device("cuda"), dtype, size)
        assert isinstance(chosen, Config)
        assert (chosen.features > 0) == (operation in SECOND_PRODUCT)
        assert chosen.columns > 0 or operation in ("conv", "conv_input")
        sizes = (chosen.rows, chosen.columns or 16, chosen.depth, chosen.features or 16)
        assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)


def test_buckets_ascend_and_the_last_has_no_bound() -> None:
    table = configs.read()
    assert set(table) == set(configs.SHARED)
    for row in table.values():
        for kind, operations in configs.kinds(row):
            assert kind in ("half", "single") and set(operations) <= set(OPERATIONS)
            for entries in operations.values():
                bounds = [entry.get("up_to", math.inf) for entry in entries]
                assert bounds == sorted(set(bounds)) and bounds[-1] == math.inf
    assert all(set(operations) == set(OPERATIONS) for _, operations in configs.kinds(table["other"]))


def test_the_table_is_as_a_rewrite_would_leave_it() -> None:
    assert configs.TABLE.read_text() == configs.written(configs.read())


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((9, 0), "sm_90"), ((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 9), "sm_89"), ((10, 0), "sm_100"), ((10, 3), "sm_100"),
        ((12, 0), "sm_89"), ((7, 5), "other"), ((11, 0), "other"),
    ],
)  # fmt: skip
def test_architectures(capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert architecture.__wrapped__(torch.device("cuda")) == name
    assert architecture(torch.device("cpu")) == "interpreter"


@pytest.mark.parametrize("owners", [0, 1, 2, 5, 6, 7, 100])
def test_shares_cover_all_tiles_and_none_is_empty(owners: int) -> None:
    device = torch.device("cpu")
    for tiles in range(1, 40):
        parts, share = split(owners, tiles, device)
        assert (parts - 1) * share < tiles <= parts * share
        assert parts == 1 or max(owners, 1) * parts <= configs.programs(device)
    assert split(owners, 0, device)[0] == 1


def test_a_candidate_is_used_while_it_is_tried_and_for_its_operation_only() -> None:
    device, candidate, other = torch.device("cpu"), Config(128, 32, 16), Config(64, 32, 16)
    before = config("scan", device, torch.float32, 100), config("topk", device, torch.float32, 100)
    with configs.using("scan", candidate):
        assert config("scan", device, torch.float32, 100) == candidate
        assert config("topk", device, torch.float32, 100) == before[1]
        with configs.using("scan", other):
            assert config("scan", device, torch.float32, 100) == other
        assert config("scan", device, torch.float32, 100) == candidate
    with pytest.raises(RuntimeError, match="fails"), configs.using("scan", candidate):
        raise RuntimeError("fails")
    assert config("scan", device, torch.float32, 100) == before[0]


def test_a_backward_pass_in_a_thread_of_its_own_meets_the_candidate() -> None:
    found = []
    with configs.using("weight", Config(16, 16, 16, 64)):
        thread = threading.Thread(target=lambda: found.append(config("weight", torch.device("cpu"), torch.float32, 100)))
        thread.start()
        thread.join()
    assert found == [Config(16, 16, 16, 64)]
