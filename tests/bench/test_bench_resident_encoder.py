"""The counts behind docs/gpu.md."""

from __future__ import annotations

import pytest
from bench.cases import TTL, Shape
from bench.resident_encoder import counts

from bench import resident_encoder


def test_counts_of_a_network_that_can_be_counted_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block over sequences without pads: the last position reads 3 rows of the first convolution, which read 7 items."""
    monkeypatch.setattr("bench.cases.REAL_LENGTHS", (100,))
    monkeypatch.setattr(resident_encoder, "REAL_LENGTHS", (100,))
    found = counts(Shape(length=20, channels=16, dilations=(1,)), users=10)
    assert found["rows"] == 3 + 1
    assert found["operations"] == 4 * 2 * 3 * 16 * 16
    assert found["bytes, a launch a convolution"] == 2 * 16 * ((7 + 3) + (3 + 1) + 1)
    assert found["bytes, resident"] == 2 * 16 * (7 + 1)
    assert found["weights from L2, a user a block"] == 2 * 2 * 3 * 16 * 16
    together = found["users of mean length that a block holds"]
    assert together == (227 << 10) // (2 * 2 * 16 * 20)
    assert found["share of its products that a user a block needs"] == (3 + 1) / 128


def test_the_page_has_these_counts() -> None:
    found, page = counts(TTL), (resident_encoder.Path(__file__).parent.parent / "docs" / "gpu.md").read_text()
    assert f"{found['operations'] / 1e6:.0f} M" in page
    assert f"{found['bytes, a launch a convolution'] / 1e3:.0f} kB" in page and f"{found['bytes, resident'] / 1e3:.0f} kB" in page
    assert f"{found['weights from L2, a user a block'] / 1e6:.1f} MB" in page
    assert f"{found['share of its products that a user a block needs']:.0%}".replace("%", " %") in page
    assert f"{found['the same with so many']:.0%}".replace("%", " %") in page
