"""Launch configurations: one table, `configs.json`, keyed by architecture, kind of products, operation and size bucket.

Nothing is measured at import or at the first call, and the number of rows does not matter, so that a batch of another size never
recompiles. `make tune` measures and rewrites the table. Tiles fit the shared memory of their architecture; those of "other",
which serves every architecture that is not listed, fit 64 KiB.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

# Linear heads, by number of labels; convolutions, by channels.
Operation = Literal["scan", "weight", "hidden", "retention", "topk", "conv", "conv_input", "conv_weight"]
TABLE = Path(__file__).with_name("configs.json")
# KiB of shared memory that a program may take.
SHARED = {
    "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx90a": 64, "gfx942": 64, "other": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Tile sizes of a launch, all powers of two from 16.

    Attributes:
        rows, columns: size of a tile of the result: rows and labels of a head's logits; rows of a convolution, which has all
            channels, and how many of them are finished at once (0: all); output and input channels of its weight's gradient.
        depth: channels (or rows, where those are summed over) that one step of a tile's product covers.
        features: most channels of a gradient that one program owns; 0 where there is no second product.
        warps, stages: as Triton's num_warps and num_stages.
    """

    rows: int
    columns: int
    depth: int
    features: int = 0
    warps: int = 4
    stages: int = 2


# For the interpreter a large tile costs as much as a small one, but small ones have more edges to test.
_INTERPRETED: dict[Operation, Config] = {
    "scan": Config(16, 32, 16),
    "weight": Config(16, 32, 16, 32),
    "hidden": Config(32, 16, 16, 32),
    "retention": Config(16, 32, 16, 32),
    "topk": Config(16, 32, 16),
    "conv": Config(16, 32, 16),
    "conv_input": Config(16, 0, 16),
    "conv_weight": Config(16, 32, 16),
}


# Configurations under measurement. Not a context variable: backward passes run in threads of their own.
_CANDIDATES: dict[Operation, Config] = {}


@contextmanager
def using(operation: Operation, candidate: Config) -> Iterator[None]:
    """Within it every launch of `operation` uses `candidate` instead of the table: for `make tune`."""
    before = _CANDIDATES.get(operation)
    _CANDIDATES[operation] = candidate
    try:
        yield
    finally:
        if before is None:
            del _CANDIDATES[operation]
        else:
            _CANDIDATES[operation] = before


def config(operation: Operation, device: torch.device, dtype: torch.dtype, size: int) -> Config:
    """The configuration of a launch on `device` whose products take operands of `dtype`.

    Args:
        size: labels of a head, or output channels of a convolution: what the operation's buckets are of.
    """
    if operation in _CANDIDATES:
        return _CANDIDATES[operation]
    name = architecture(device)
    if name == "interpreter":
        return _INTERPRETED[operation]
    return of_size(_rows()[name, "single" if dtype == torch.float32 else "half", operation], size)


def of_size(buckets: list[tuple[int | None, Config]], size: int) -> Config:
    """The configuration of the first bucket that holds `size`."""
    return next(found for up_to, found in buckets if up_to is None or size <= up_to)


@lru_cache(maxsize=1)
def _rows() -> Mapping[tuple[str, str, str], list[tuple[int | None, Config]]]:
    """Buckets, the last without a bound, by (architecture, kind, operation). Missing ones are those of "other"."""
    table = read()
    other = {(kind, operation) for kind, operations in kinds(table["other"]) for operation in operations}
    keys = [(name, kind, operation) for name in table for kind, operation in other]
    return {key: buckets(table, *key) for key in keys}


def buckets(table: Mapping[str, Mapping[str, Any]], name: str, kind: str, operation: str) -> list[tuple[int | None, Config]]:
    """Bounds and configurations of an operation on an architecture, the last without a bound: its own, or those of "other"."""
    entries = table[name].get(kind, {}).get(operation) or table["other"][kind][operation]
    return [(entry.get("up_to"), Config(**{key: value for key, value in entry.items() if key != "up_to"})) for entry in entries]


def read(path: Path = TABLE) -> dict[str, dict[str, Any]]:
    """The table: by architecture "measured" (where and when, None: chosen without a measurement), "half" and "single"."""
    table: dict[str, dict[str, Any]] = json.loads(path.read_text())
    return table


def kinds(row: Mapping[str, Any]) -> list[tuple[str, dict[str, list[dict[str, int]]]]]:
    """Operations of half precision and of float32 of an architecture's row."""
    return [(kind, row[kind]) for kind in ("half", "single") if kind in row]


def written(table: Mapping[str, Mapping[str, Any]]) -> str:
    """The table as text, one configuration per line."""
    def block(name: str, indent: str, parts: list[str], brackets: str = "{}") -> str:
        return f"{indent}{json.dumps(name)}: {brackets[0]}\n" + ",\n".join(parts) + f"\n{indent}{brackets[1]}"

    blocks = []
    for name, row in table.items():
        parts = [f'    "measured": {json.dumps(row["measured"])}']
        for kind, operations in kinds(row):
            lines = [
                block(operation, " " * 6, [" " * 8 + json.dumps(entry) for entry in entries], "[]")
                for operation, entries in operations.items()
            ]
            parts.append(block(kind, " " * 4, lines))
        blocks.append(block(name, "  ", parts))
    return "{\n" + ",\n".join(blocks) + "\n}\n"


@lru_cache(maxsize=64)
def architecture(device: torch.device) -> str:
    """Row of the table that serves a device: "sm_90", "gfx942", ..., "other"; "interpreter" for the CPU."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        name = str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    else:
        major, minor = torch.cuda.get_device_capability(device)
        # Later chips of a generation use the tiles of the first one; sm_12x has the shared memory of sm_89.
        name = {(10, 3): "sm_100"}.get((major, minor), "sm_89" if major == 12 else f"sm_{major}{minor}")
    return name if name in SHARED else "other"


@lru_cache(maxsize=64)
def programs(device: torch.device) -> int:
    """Programs that fill the device: two per multiprocessor."""
    return 6 if device.type == "cpu" else 2 * torch.cuda.get_device_properties(device).multi_processor_count


def split(owners: int, tiles: int, device: torch.device) -> tuple[int, int]:
    """Number of shares to split the walks of `owners` programs over `tiles` tiles into, and tiles per share; none is empty."""
    wanted = max(1, min(tiles, programs(device) // max(owners, 1)))
    share = -(-tiles // wanted) if tiles else 1
    return max(1, -(-tiles // share)), share
