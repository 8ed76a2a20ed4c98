"""Which backends there are, as told to people."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from teracon_fast import env_report
from teracon_fast.ops import backends


def test_a_gpu_brings_the_triton_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not any("triton" in names for names in env_report()["backends"].values())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "a GPU")
    report = env_report()
    assert report["devices"] == ["a GPU"]
    assert all("triton" in names and "torch" in names for names in report["backends"].values())
    assert "triton" not in report["auto"].values(), "on request only, until the kernels have run on a GPU"


FUNCTIONS = {
    "masked_conv": {"forward", "backward"},
    "linear_cross_entropy": {"room", "forward", "backward"},
    "retention_mse": {"distance"},
    "linear_rank": {"rank", "topk"},
    "pack": {"tables"},
    "task_masks": {"task_masks", "step_masks"},
}


@pytest.mark.parametrize(
    ("operation", "backend"), [(name, which) for name in FUNCTIONS for which in backends.OPERATIONS[name]]
)
def test_every_backend_of_the_registry_has_the_functions_of_its_operation(operation: str, backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    module = backends.load(operation, backend)
    assert all(callable(getattr(module, name, None)) for name in FUNCTIONS[operation])
    assert set(backends.OPERATIONS) == {*FUNCTIONS, "adam"}


def test_a_models_backend_may_lack_an_operation_but_must_exist() -> None:
    backends.check_name("torch")
    assert backends.of_model("cpu", "task_masks") == "torch" and backends.of_model("cpu", "masked_conv") == "cpu"
    with pytest.raises(backends.BackendError, match="'nonsense' cannot run masked_conv"):
        backends.check_name("nonsense")
