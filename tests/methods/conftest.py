"""What tests of methods share."""

from __future__ import annotations

import pytest
from tiny_data import write_tiny

from teracon_fast.data import TaskSequence
from teracon_fast.methods import Sizes


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TaskSequence:
    """Three tasks: the next item, 30 classes, 4 classes; sequences of 8 items."""
    return write_tiny(tmp_path_factory.mktemp("methods") / "tiny", tasks=3)


@pytest.fixture
def sizes(tiny: TaskSequence) -> Sizes:
    """A small network for `tiny`."""
    return Sizes(tiny.num_items, channels=16, dilations=(1, 2))
