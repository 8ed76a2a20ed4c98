"""Fixtures for all tests: the same numbers in every run, and the golden vectors by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from golden_vectors import Golden, load

# Small shapes: a second thread only waits, and on a busy machine it waits long. It also changes the last bits.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same state of torch's generator, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def golden() -> Callable[[str], Golden]:
    """Loads a golden vector by name: `golden("t1_small")`."""
    return load
