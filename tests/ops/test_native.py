"""The compiled extension: what it measures, and what is said when it is not there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from teracon_fast.errors import TeraconError
from teracon_fast.ops import native


def require_native() -> None:
    """CI builds the extension for certain; elsewhere it is optional."""
    if not native.available() and os.environ.get("TERACON_BUILD_EXT") != "1":
        pytest.skip(f"compiled extension: {native.missing_reason()}")


def mm_rate() -> float:
    """Best fp32 GFLOP/s of torch.mm on matrices that fit the caches."""
    a, b = torch.rand(1024, 768), torch.rand(768, 256)
    best = 0.0
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(5):
            torch.mm(a, b)
        best = max(best, 5 * 2 * 1024 * 768 * 256 / (time.perf_counter() - start) * 1e-9)
    return best


def test_peak_is_above_every_matrix_product_and_below_physics() -> None:
    require_native()
    threads = torch.get_num_threads()
    # A busy machine slows either side for a moment: the best of a few tries is the rate of the hardware.
    peak, product = 0.0, 0.0
    for _ in range(4):
        peak, product = max(peak, native.fma_peak(threads)), max(product, mm_rate())
    assert 1.5 * peak > product  # the peak of a busy moment beside the product of an idle one
    # 6 GHz, two 512-bit units, a multiply and an add each: no core to date does more.
    assert peak < 6.0 * 2 * 16 * 2 * threads


@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="torch is told another capability than the machine's")
def test_instructions_are_the_ones_that_torch_finds_too() -> None:
    require_native()
    expected = {"AVX2": "avx2+fma", "AVX512": "avx512f"}.get(torch.backends.cpu.get_cpu_capability(), "generic")
    assert native.fma_instructions() == expected


@pytest.mark.parametrize("threads", [0, -1, 4097])
def test_bad_thread_count_is_refused_with_what_was_got_and_expected(threads: int) -> None:
    with pytest.raises(TeraconError, match=f"got {threads} threads, expected 1 to 4096"):
        native.fma_peak(threads)


def test_the_operation_itself_refuses_a_bad_thread_count() -> None:
    require_native()
    assert native.available()
    with pytest.raises(RuntimeError, match="got 0 threads, expected 1 to 4096"):
        torch.ops.teracon_fast.fma_peak(0)


def test_peak_is_no_part_of_importing_and_absence_is_explained(tmp_path: Path) -> None:
    """With the library gone, the package still imports, and asking for the peak says why it cannot be had."""
    package = tmp_path / "teracon_fast"
    shutil.copytree(native.LIBRARY.parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = (
        "import teracon_fast, sys\n"
        "from teracon_fast import FastTCN\nfrom teracon_fast.ops import native\n"
        "print(teracon_fast.__file__)\n"
        "try:\n    native.fma_peak(1)\n"
        "except native.NativeError as error:\n    print(error)\n"
    )
    own = {name: value for name, value in os.environ.items() if name != "TERACON_NATIVE_LIBRARY"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, text=True, check=True)
    where, message = done.stdout.splitlines()
    assert Path(where).parent == package
    assert "compiled extension is not available" in message and "TERACON_BUILD_EXT=1" in message


def test_a_broken_library_is_reported_not_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native, "LIBRARY", broken)
    monkeypatch.delenv("TERACON_NATIVE_LIBRARY", raising=False)
    native.missing_reason.cache_clear()
    try:
        assert "does not load into torch" in str(native.missing_reason())
        with pytest.raises(native.NativeError, match="does not load"):
            native.fma_peak(1)
    finally:
        native.missing_reason.cache_clear()


def test_the_extension_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERACON_NATIVE", "0")
    native.missing_reason.cache_clear()
    try:
        assert native.missing_reason() == "switched off by TERACON_NATIVE=0"
    finally:
        native.missing_reason.cache_clear()


def test_another_build_of_the_extension_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = tmp_path / "build" / "_C.so"
    monkeypatch.setenv("TERACON_NATIVE_LIBRARY", str(named))
    native.missing_reason.cache_clear()
    try:
        assert native.missing_reason() == f"TERACON_NATIVE_LIBRARY: got {named}, expected a file"
        named.parent.mkdir()
        named.write_bytes(b"not a library")
        native.missing_reason.cache_clear()
        assert str(named) in str(native.missing_reason()), "it is the one that was tried"
        if native.LIBRARY.exists():
            shutil.copy(native.LIBRARY, named)
            code = "import torch; from teracon_fast.ops import native; print(native.available(), *torch.ops.loaded_libraries)"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            assert done.stdout.split() == ["True", str(named)]
    finally:
        native.missing_reason.cache_clear()
