"""Reads tests/golden/*.npz and measures distances to them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"
T1_NAMES = sorted(path.stem for path in FOLDER.glob("t1_*.npz"))
TCN_NAMES = sorted(path.stem for path in FOLDER.glob("tcn_*.npz"))


@dataclass(frozen=True)
class Golden:
    """One file: `meta` as a dict, every array as a tensor of the stored dtype. The tensors are shared: do not write."""

    name: str
    meta: dict[str, Any]
    arrays: dict[str, Tensor]

    def __getitem__(self, key: str) -> Tensor:
        return self.arrays[key]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Arrays whose name begins with `prefix`, by the rest of the name: `under("param.")` is a state dict."""
        return {key.removeprefix(prefix): value for key, value in self.arrays.items() if key.startswith(prefix)}

    def call(self) -> dict[str, Any]:
        """Keyword arguments of the published call, for the tcn_* files."""
        return {key: self.meta[key] for key in ("task_num", "onecall", "backward", "new_task")}


@lru_cache
def load(name: str) -> Golden:
    """The golden vector of this name, for example "t1_small"; read once per process."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(np.asarray(file[key])) for key in file.files if key != "meta"}
        return Golden(name, json.loads(str(file["meta"])), arrays)


def relative_error(got: Tensor | float, expected: Tensor | float) -> float:
    """Norm of the difference over the norm of `expected`, in float64. Shapes must be equal."""
    a, b = (torch.as_tensor(value).detach().double() for value in (got, expected))
    assert a.shape == b.shape, f"got {list(a.shape)}, expected {list(b.shape)}"
    difference = float((a - b).norm())
    return difference if difference == 0.0 else difference / float(b.norm())


def gradient_errors(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative error of every gradient tensor, the names of both sides being equal.

    All relation weights count as one vector ("mlp"), and so do all task embeddings ("ec"): one of them alone can be a sum
    over the channels that cancels, or vanish in a saturated tanh, and then holds little but rounding.
    """
    assert set(got) == set(expected), sorted(set(got) ^ set(expected))
    groups: dict[str, list[str]] = {}
    for name in expected:
        kind = "mlp" if ".mlp" in name else "ec" if ".ec." in name else name
        groups.setdefault(kind, []).append(name)

    def joined(source: Mapping[str, Tensor], names: list[str]) -> Tensor:
        return torch.cat([source[name].flatten().double() for name in names])

    return {kind: relative_error(joined(got, names), joined(expected, names)) for kind, names in groups.items()}


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """The gradients that a model holds, by parameter name; parameters without one are left out."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
