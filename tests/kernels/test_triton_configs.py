"""The table of launch configurations, and how work is shared out."""

from __future__ import annotations

import itertools

import pytest
import torch

from teracon_fast.kernels import configs
from teracon_fast.kernels.configs import Config, Operation, architecture, config, split

OPERATIONS: tuple[Operation, ...] = ("scan", "weight", "hidden", "retention", "topk")
ARCHITECTURES = ("sm_90", "sm_80", "gfx942", "other", "interpreter")


def test_every_architecture_has_every_operation_in_tiles_that_triton_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, operation, dtype, labels in itertools.product(
        ARCHITECTURES, OPERATIONS, (torch.float32, torch.bfloat16, torch.float16), (2, configs.FEW_LABELS, 640_000)
    ):
        monkeypatch.setattr(configs, "architecture", lambda device, name=name: name)
        chosen = config(operation, torch.device("cuda"), dtype, labels)
        assert isinstance(chosen, Config)
        second_product = operation in ("weight", "hidden", "retention")
        assert (chosen.features > 0) == second_product
        for size in (chosen.rows, chosen.labels, chosen.depth, *([chosen.features] if second_product else [])):
            assert size >= 16 and size & (size - 1) == 0


@pytest.mark.parametrize(
    ("capability", "name"),
    [((9, 0), "sm_90"), ((8, 0), "sm_80"), ((10, 0), "sm_90"), ((8, 6), "other"), ((12, 0), "other"), ((7, 5), "other")],
)
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
