"""Runs a test file again under another instruction set of the CPU kernels."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from teracon_fast.ops import native

INSTRUCTION_SETS = ("generic", "avx2", "avx512", "avx512_bf16")


def passes_under(isa: str, file: str, selection: str) -> None:
    """The selected tests of a file pass in a process that is told which kernels to use; a set that is lacking is refused."""
    if native.available() and native.cpu_isa() == isa:
        pytest.skip("the other tests of this run are run under it")
    environment = os.environ | {"TERACON_CPU_ISA": isa}
    if isa == "generic":
        environment["ATEN_CPU_CAPABILITY"] = "default"  # torch too without fused multiply-add, for those who compare bits
    probe = "from teracon_fast.ops import native; print(native.cpu_isa())"
    done = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        assert f"TERACON_CPU_ISA is '{isa}', expected one that this machine has" in done.stderr
        return
    assert done.stdout.strip() == isa
    # Captured as the caller may be: a sanitizer's words must get out of a process that it ends.
    options = ["--threads", str(torch.get_num_threads()), "--capture", "sys", "-q", "-p", "no:cacheprovider", "-k", selection]
    command = [sys.executable, "-m", "pytest", file, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[:3000]
