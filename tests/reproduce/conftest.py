"""What tests of the paper's experiments share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_data import write_tiny

from teracon_fast.data import TaskSequence
from teracon_fast.reproduce import Choices


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TaskSequence:
    """Three tasks of 80 users: the next item, 30 classes, 4 classes; sequences of 6 items."""
    return write_tiny(tmp_path_factory.mktemp("reproduce") / "tiny", tasks=3, rows=80, length=6)


@pytest.fixture
def choices(tiny: TaskSequence, tmp_path: Path) -> Callable[..., Choices]:
    """Quick choices on `tiny`, into the folder of the test."""

    def make(**changes: Any) -> Choices:
        return Choices(**{"data": tiny.path, "output": tmp_path / "out", "quick": True, **changes})

    return make
