"""Whether Triton's kernels can be tested here."""

from __future__ import annotations

import re

import pytest
import torch


def require_triton() -> None:
    """Skip a module's tests without Triton, and without a GPU where its interpreter is not that of 3.7."""
    version = pytest.importorskip("triton").__version__
    if not torch.cuda.is_available() and not (3, 7, 1) <= tuple(map(int, re.findall(r"\d+", version)[:3])) < (3, 8):
        pytest.skip(f"Triton {version}: its interpreter differs from that of 3.7.1", allow_module_level=True)
