"""Launch configurations: one table keyed by architecture, operation and size bucket.

Nothing is measured at import or at the first call, and no number of rows chooses a configuration: a batch of another size
never compiles again. Sizes keep shared memory under 163 KiB (sm_80), 227 KiB (sm_90) and 64 KiB (gfx942), and "other", which
serves every architecture that is not listed, under 64 KiB.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

Operation = Literal["scan", "weight", "hidden", "retention", "topk"]


@dataclass(frozen=True)
class Config:
    """Tile sizes of a launch, all powers of two from 16.

    Attributes:
        rows, labels: size of a tile of logits.
        depth: channels that one step of the product behind the logits takes.
        features: channels of a gradient that one program owns at most; 0 where there is no second product.
        warps, stages: as Triton's num_warps and num_stages.
    """

    rows: int
    labels: int
    depth: int
    features: int = 0
    warps: int = 4
    stages: int = 2


# Heads with at most this many labels take smaller tiles: otherwise a few programs would have all the work.
FEW_LABELS = 4096

# Half precision, on tensor cores: heads of many labels, then of few.
_HALF: dict[str, dict[Operation, tuple[Config, Config]]] = {
    "sm_90": {
        "scan": (Config(128, 128, 64, 0, 8, 2), Config(64, 64, 64, 0, 4, 3)),
        "weight": (Config(64, 64, 64, 256, 8, 3), Config(64, 64, 64, 256, 8, 3)),
        "hidden": (Config(64, 64, 64, 256, 8, 3), Config(64, 64, 64, 256, 8, 3)),
        "retention": (Config(64, 64, 64, 256, 8, 3), Config(64, 64, 64, 256, 8, 3)),
        "topk": (Config(64, 128, 64, 0, 8, 3), Config(64, 128, 64, 0, 8, 3)),
    },
    "sm_80": {
        "scan": (Config(128, 64, 32, 0, 8, 3), Config(64, 64, 32, 0, 4, 3)),
        "weight": (Config(64, 64, 32, 256, 8, 3), Config(64, 64, 32, 128, 8, 3)),
        "hidden": (Config(64, 64, 32, 256, 8, 3), Config(64, 64, 32, 128, 8, 3)),
        "retention": (Config(64, 32, 32, 256, 8, 2), Config(64, 32, 32, 256, 8, 2)),
        "topk": (Config(32, 128, 32, 0, 8, 3), Config(32, 128, 32, 0, 8, 3)),
    },
    "gfx942": {
        "scan": (Config(128, 128, 32, 0, 4, 2), Config(64, 64, 32, 0, 4, 2)),
        "weight": (Config(32, 64, 32, 256, 4, 2), Config(32, 64, 32, 128, 4, 2)),
        "hidden": (Config(64, 32, 32, 256, 4, 2), Config(64, 32, 32, 128, 4, 2)),
        "retention": (Config(32, 32, 32, 256, 4, 2), Config(32, 32, 32, 128, 4, 2)),
        "topk": (Config(16, 128, 32, 0, 8, 2), Config(16, 128, 32, 0, 8, 2)),
    },
    "other": {
        "scan": (Config(64, 64, 32, 0, 4, 2), Config(64, 64, 32, 0, 4, 2)),
        "weight": (Config(32, 64, 32, 128, 4, 2), Config(32, 64, 32, 128, 4, 2)),
        "hidden": (Config(64, 32, 32, 128, 4, 2), Config(64, 32, 32, 128, 4, 2)),
        "retention": (Config(32, 32, 32, 128, 4, 2), Config(32, 32, 32, 128, 4, 2)),
        "topk": (Config(16, 128, 32, 0, 4, 2), Config(16, 128, 32, 0, 4, 2)),
    },
}
# fp32: exact products run on the ordinary units, whose operands and sums share the registers. The same everywhere.
_SINGLE: dict[Operation, Config] = {
    "scan": Config(64, 64, 32, 0, 8, 2),
    "weight": Config(32, 32, 32, 64, 8, 2),
    "hidden": Config(32, 32, 32, 64, 8, 2),
    "retention": Config(32, 32, 32, 64, 8, 2),
    "topk": Config(16, 128, 32, 0, 4, 2),
}
# The interpreter takes as long for a large tile as for a small one; small ones have more edges to test.
_INTERPRETED: dict[Operation, Config] = {
    "scan": Config(16, 32, 16),
    "weight": Config(16, 32, 16, 32),
    "hidden": Config(32, 16, 16, 32),
    "retention": Config(16, 32, 16, 32),
    "topk": Config(16, 32, 16),
}


def config(operation: Operation, device: torch.device, dtype: torch.dtype, labels: int) -> Config:
    """The configuration of a launch on `device` whose products take operands of `dtype`."""
    name = architecture(device)
    if name == "interpreter":
        return _INTERPRETED[operation]
    if dtype == torch.float32:
        return _SINGLE[operation]
    return _HALF[name][operation][labels <= FEW_LABELS]


@lru_cache(maxsize=64)
def architecture(device: torch.device) -> str:
    """Row of the table that serves a device: "sm_90", "sm_80", "gfx942", "other"; "interpreter" for the CPU."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        name = str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
        return name if name in _HALF else "other"
    # sm_86 and later of that generation, and sm_120, have 99 KiB of shared memory; sm_100 has that of sm_90.
    return {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_90", (10, 3): "sm_90"}.get(
        torch.cuda.get_device_capability(device), "other"
    )


@lru_cache(maxsize=64)
def programs(device: torch.device) -> int:
    """How many programs a launch should have to fill the device: two for each of its processors."""
    return 6 if device.type == "cpu" else 2 * torch.cuda.get_device_properties(device).multi_processor_count


def split(owners: int, tiles: int, device: torch.device) -> tuple[int, int]:
    """Shares that `owners` programs' walks over `tiles` tiles are cut into, and tiles of a share; none is empty."""
    wanted = max(1, min(tiles, programs(device) // max(owners, 1)))
    share = -(-tiles // wanted) if tiles else 1
    return max(1, -(-tiles // share)), share
