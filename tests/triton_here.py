"""Whether Triton's kernels can be tested here."""

from __future__ import annotations

import pytest
import torch


def require_triton() -> None:
    """Skip a module's tests without Triton, or where its interpreter is one that the kernels have not been verified in."""
    version = pytest.importorskip("triton", minversion="3.7.1").__version__
    if not torch.cuda.is_available() and tuple(map(int, version.split(".")[:2])) > (3, 7):
        pytest.skip(f"Triton {version}: its interpreter differs from that of 3.7", allow_module_level=True)
