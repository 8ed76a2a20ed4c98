"""The bench of Adam runs, and both of its sides compute the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.adam import main, ulps
from teracon_fast.ops import native


@pytest.mark.skipif(not native.available(), reason="without the compiled extension nothing is deferred")
def test_small(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = {"items": 500, "channels": 24, "users": 4, "length": 5, "steps": 12, "timed": 3, "head": 7}
    asked = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    found = main([*asked, "--results", str(tmp_path / "kept")])
    assert found.ulps == {"parameter": 0, "exp_avg": 0, "exp_avg_sq": 0}
    assert min(found.read, found.sums, found.step, found.torch_gradient, found.torch_step, found.flush) > 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-2])
    assert printed["items"] == 500 and printed["step"] == found.step
    (path,) = (tmp_path / "kept").iterdir()
    kept = json.loads(path.read_text())
    assert path.name.endswith("-adam.json") and kept["kind"] == "adam" and printed.items() <= kept.items()


def test_differences_count_floats() -> None:
    one, zero = torch.ones(3), torch.zeros(3)
    assert ulps(one, one) == 0 and ulps(zero, -zero) == 0
    assert ulps(one, torch.nextafter(one, 2 * one)) == 1
    assert ulps(torch.nextafter(zero, one), torch.nextafter(zero, -one)) == 2
