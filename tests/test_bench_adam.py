"""The bench of Adam runs, and both of its sides compute the same."""

from __future__ import annotations

import json

import pytest
import torch

from bench.bench_adam import main, ulps
from teracon_fast import _native


@pytest.mark.skipif(not _native.available(), reason="without the compiled extension nothing is deferred")
def test_small(capsys: pytest.CaptureFixture[str]) -> None:
    options = {"items": 500, "channels": 24, "users": 4, "length": 5, "steps": 12, "timed": 3, "head": 7}
    found = main([part for name, value in options.items() for part in (f"--{name}", str(value))])
    assert found.ulps == {"parameter": 0, "exp_avg": 0, "exp_avg_sq": 0}
    assert min(found.read, found.sums, found.step, found.torch_gradient, found.torch_step, found.flush) > 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["items"] == 500 and printed["step"] == found.step


def test_differences_count_floats() -> None:
    one, zero = torch.ones(3), torch.zeros(3)
    assert ulps(one, one) == 0 and ulps(zero, -zero) == 0
    assert ulps(one, torch.nextafter(one, 2 * one)) == 1
    assert ulps(torch.nextafter(zero, one), torch.nextafter(zero, -one)) == 2
