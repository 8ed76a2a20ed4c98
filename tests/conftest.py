"""Fixtures for all tests: the same numbers in every run, and the golden vectors by name."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from golden_vectors import Golden, load

from teracon_fast.ops import native

# Where there is no GPU, Triton's kernels are interpreted. It decides that as it is imported, by whatever test or library comes
# first: so here, before any, and for the whole process.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=1, help="threads of torch's operations (1)")


def pytest_configure(config: pytest.Config) -> None:
    # Small shapes: a second thread only waits, and on a busy machine it waits long. It also changes the last bits.
    torch.set_num_threads(config.getoption("--threads", 1))


def pytest_report_header() -> str:
    """Which kernels these tests run; a report of `make asan` must not be one of the ordinary library's."""
    missing = native.missing_reason()
    if missing is not None:
        return f"compiled extension: none, {missing}"
    sanitized = ", with sanitizers" if b"__asan_init" in native.library().read_bytes() else ""
    return f"compiled extension: {native.library()}{sanitized}, {torch.get_num_threads()} threads"


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same state of torch's generator, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are as wide as they are, whatever the terminal that processes of these tests were told of."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def golden() -> Callable[[str], Golden]:
    """Loads a golden vector by name: `golden("t1_small")`."""
    return load
