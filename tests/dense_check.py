"""Builds a FastTCN and the dense reference with equal weights, and compares their results and gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teracon_fast import FastTCN
from teracon_fast.reference.model import ReferenceTCN


def twins(
    labels: Sequence[int], channels: int = 16, items: int = 30, dilations: Sequence[int] = (1, 4), kernel_size: int = 3,
    variant: str = "relation", dtype: torch.dtype = torch.float64, seed: int = 0,
) -> tuple[FastTCN, ReferenceTCN]:  # fmt: skip
    """A FastTCN and a ReferenceTCN with the same weights, all moved off their initial values."""
    para = {
        "item_size": items, "dilated_channels": channels, "dilations": list(dilations), "kernel_size": kernel_size,
        "task_embs": [0, 2], "num_task": len(labels), "target_item_size": list(labels),
    }  # fmt: skip
    torch.manual_seed(seed)
    dense = ReferenceTCN(para, variant)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    fast = FastTCN(para, mask=variant)
    fast.load_state_dict(dense.state_dict())
    return fast.to(dtype), dense.to(dtype)


def ragged(lengths: Sequence[int], length: int, items: int = 30, seed: int = 0) -> Tensor:
    """int64 `[len(lengths), length]`: left-padded sequences with the given numbers of real items."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(len(lengths), length, dtype=torch.int64)
    for row, real in enumerate(lengths):
        x[row, length - real :] = torch.randint(1, items, (real,), generator=generator)
    return x


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Equal keys, and each tensor within `tolerance` of the expected one, relative to the largest of all norms' share."""
    assert got.keys() == expected.keys()
    scale = max(float(e.norm()) for e in expected.values())
    for name, value in expected.items():
        error = float((got[name] - value).norm())
        assert error <= tolerance * max(float(value.norm()), 1e-3 * scale), (name, error, float(value.norm()))
