"""The core imports and runs with torch and numpy alone."""

from __future__ import annotations

import subprocess
import sys
import textwrap

BLOCKED = ["triton", "pydantic", "typer", "rich", "pyarrow", "polars", "safetensors", "matplotlib", "tensorboard", "pandas"]


def test_core_runs_without_any_optional_package() -> None:
    program = f"""
        import sys

        sys.modules.update(dict.fromkeys({BLOCKED}))  # importing a name that stands for None fails, as if not installed
        import torch
        from teracon_fast import FastTCN, env_report
        model = FastTCN(num_items=9, channels=8, labels=[9, 3], dilations=[1])
        model.encode(torch.tensor([[0, 1, 2]]), [])
        model(torch.tensor([[0, 1, 2]]), 1.0, [], 1, 0, onecall=True)[0].sum().backward()
        assert env_report()["triton"] is False
        assert "teracon_fast.reference" not in sys.modules, "the fast path must not import the reference"
        print("ran")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "ran", done.stderr


def test_importing_the_library_leaves_triton_and_its_kernels_alone() -> None:
    """Where Triton is installed too: it is loaded by the first call that runs one of its kernels."""
    program = """
        import sys

        import teracon_fast, teracon_fast.ops, teracon_fast.model.fast_tcn, teracon_fast.ops.backends
        print([name for name in sys.modules if name.split(".")[0] == "triton" or name.startswith("teracon_fast.kernels")])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_unknown_name_is_an_attribute_error() -> None:
    import teracon_fast

    assert "FastTCN" in dir(teracon_fast)
    assert not hasattr(teracon_fast, "SlowTCN")
