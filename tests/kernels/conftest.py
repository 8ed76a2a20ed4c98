"""The kernels run on a GPU where there is one, else in Triton's interpreter (see the fixtures of all tests)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def device() -> torch.device:
    from teracon_fast.kernels.tiles import INTERPRETED

    if not torch.cuda.is_available() and not INTERPRETED:
        pytest.skip("no GPU, and TRITON_INTERPRET is off")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, or numbers out of any range: what a kernel fails to write shows."""
    plain = torch.empty

    def empty(*arguments: Any, **options: Any) -> Tensor:
        fresh = plain(*arguments, **options)
        return fresh.fill_(torch.nan if fresh.is_floating_point() else -(2**30) - 7)

    monkeypatch.setattr(torch, "empty", empty)
