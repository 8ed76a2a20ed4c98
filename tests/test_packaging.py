"""The package as users get it: source distribution, wheel, install with and without the compiled extension."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import teracon_fast
from teracon_fast.ops import native

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("teracon_fast", "kernels", "csrc", "tests", "bench", "examples", "docs")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "Makefile")


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command without build-mode settings of the surroundings; its output is shown when it fails."""
    kept = {name: value for name, value in os.environ.items() if name not in ("TERACON_BUILD_EXT", "PYTHONPATH")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**kept, **environment}, capture_output=True, text=True
    )
    print(done.stdout, done.stderr, sep="\n")
    return done


def build_wheel(source: Path, into: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build from a fresh copy: what another build compiled must not be found again."""
    copy = into / "source"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    pip = (sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "--no-index", "-w", into, copy)
    return run(*pip, cwd=into, **environment)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution made from a copy of this checkout, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    checkout = folder / "checkout"
    for name in SOURCES:
        if (ROOT / name).exists():
            ignore = shutil.ignore_patterns("__pycache__", "*.so", "results")
            shutil.copytree(ROOT / name, checkout / name, ignore=ignore)
    for name in FILES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, checkout / name)
    code = f"import setuptools.build_meta as b; print(b.build_sdist({str(folder)!r}))"
    assert run(sys.executable, "-c", code, cwd=checkout).returncode == 0
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    return next((folder / "unpacked").iterdir())


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel made from the source distribution, with the extension exactly when this installation has it."""
    folder = tmp_path_factory.mktemp("wheel")
    assert build_wheel(sdist, folder, TERACON_BUILD_EXT="1" if native.available() else "0").returncode == 0
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed into a folder of its own."""
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel)
    assert run(*pip, cwd=target).returncode == 0
    return target


def test_wheel_has_the_package_its_data_and_its_kernels_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "teracon_fast").rglob("*.py")}
    presets = {str(path.relative_to(ROOT)) for path in (ROOT / "teracon_fast" / "presets").glob("*.toml")}
    kernels = {f"teracon_fast/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    tables = {"teracon_fast/kernels/configs.json", "teracon_fast/reproduce/paper.toml"}
    library = {"teracon_fast/_C.so"} if native.available() else set()
    metadata = {name for name in names if ".dist-info/" in name}
    assert presets and set(names) - metadata == modules | presets | kernels | tables | library | {"teracon_fast/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in metadata)
    # A library of torch operations needs no particular Python.
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    assert (wheel.name.split("-")[4] == "any.whl") == (not library)


def test_metadata_names_version_command_and_dependencies(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    folder = next(name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name)
    metadata = message_from_string(archive.read(f"{folder}/METADATA").decode())
    assert metadata["Name"] == "teracon-fast"
    assert metadata["Version"] == teracon_fast.__version__
    assert metadata["License-Expression"] == "BSD-3-Clause"
    required = {
        re.match(r"[\w-]+", line)[0]  # type: ignore[index]
        for line in metadata.get_all("Requires-Dist", [])
        if "extra ==" not in line
    }
    assert required == {"torch", "numpy"}
    assert set(metadata.get_all("Provides-Extra", [])) == {"train", "demo", "dev"}
    assert "teracon = teracon_fast.cli:main" in archive.read(f"{folder}/entry_points.txt").decode()


def test_installed_copy_is_imported_from_where_it_lies_and_works(installed: Path) -> None:
    code = (
        "import torch, teracon_fast, teracon_fast.kernels\n"
        "from teracon_fast import FastTCN, Request\n"
        "from teracon_fast.ops import native\n"
        "print(teracon_fast.__file__, teracon_fast.kernels.__file__, native.available())\n"
        "model = FastTCN(num_items=11, channels=8, labels=[11, 3], dilations=(1, 4), kernel_size=3)\n"
        "out = model.encode(torch.arange(1, 11).reshape(2, 5), [Request(1)])\n"
        "print(tuple(out[0].shape))\n"
        "print(native.fma_peak(1) > 0 if native.available() else True)\n"
    )
    done = run(sys.executable, "-c", code, cwd=installed.parent, PYTHONPATH=str(installed))
    assert done.returncode == 0
    package, kernels, compiled = done.stdout.splitlines()[0].split()
    assert Path(package) == installed / "teracon_fast" / "__init__.py"
    assert Path(kernels) == installed / "teracon_fast" / "kernels" / "__init__.py"
    assert compiled == str(native.available())
    assert done.stdout.splitlines()[1:] == ["(2, 8)", "True"]


def test_source_checkout_without_any_install_finds_its_kernels(sdist: Path) -> None:
    code = "import teracon_fast, teracon_fast.kernels as k; print(teracon_fast.__file__, k.__file__)"
    done = run(sys.executable, "-c", code, cwd=sdist)
    assert done.stdout.split() == [str(sdist / "teracon_fast" / "__init__.py"), str(sdist / "kernels" / "__init__.py")]


def test_installing_asks_for_nothing_that_is_there(wheel: Path) -> None:
    """Above all for no other torch: with every dependency satisfied, pip would install this package alone."""
    pip = (sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", f"{wheel}[dev]")
    done = run(*pip, cwd=wheel.parent)
    assert done.returncode == 0
    would = [line for line in done.stdout.splitlines() if line.startswith("Would install")]
    assert would in ([], [f"Would install teracon-fast-{teracon_fast.__version__}"])


def test_without_a_compiler_it_installs_and_without_being_asked_to_it_fails_only_then(sdist: Path, tmp_path: Path) -> None:
    none = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    assert build_wheel(sdist, tmp_path / "tried", **none).returncode == 0
    names = zipfile.ZipFile(next((tmp_path / "tried").glob("*.whl"))).namelist()
    assert "teracon_fast/__init__.py" in names and "teracon_fast/_C.so" not in names
    assert build_wheel(sdist, tmp_path / "required", TERACON_BUILD_EXT="1", **none).returncode != 0
    assert not list((tmp_path / "required").glob("*.whl"))


def test_a_build_mode_that_does_not_exist_is_refused(sdist: Path, tmp_path: Path) -> None:
    done = build_wheel(sdist, tmp_path, TERACON_BUILD_EXT="yes")
    assert done.returncode != 0
    assert "TERACON_BUILD_EXT: got 'yes', expected 0, 1 or nothing" in done.stdout + done.stderr


def test_the_core_needs_torch_and_numpy_only(tmp_path: Path) -> None:
    """With every optional package blocked, model, losses and metrics import."""
    extras = ["pydantic", "typer", "rich", "pyarrow", "polars", "safetensors", "matplotlib", "tensorboard", "pandas"]
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {extras!r}: raise ModuleNotFoundError('blocked ' + name, name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import teracon_fast.reference, teracon_fast.ops, teracon_fast.packing\n"
        "import teracon_fast.model.masks, teracon_fast.train.metrics\n"
        "from teracon_fast import FastTCN, env_report\n"
        "from teracon_fast.ops import native\n"
        "print(env_report()['teracon_fast'])\n"
    )
    done = run(sys.executable, "-c", code, cwd=ROOT)
    assert done.stdout.split() == [teracon_fast.__version__]


def test_every_environment_variable_has_its_line_in_the_one_page_about_them() -> None:
    read_in_code: set[str] = set()
    code = [*(ROOT / "teracon_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    for path in [*code, *(ROOT / "csrc").rglob("*.cpp"), ROOT / "setup.py"]:
        lines = [line for line in path.read_text().splitlines() if "environ" in line or "getenv" in line]
        read_in_code |= {name for line in lines for name in re.findall(r"\"([A-Z][A-Z_0-9]+)\"", line)}
    page = (ROOT / "docs" / "environment.md").read_text()
    listed = set(re.findall(r"^\| `([A-Z_0-9]+)`", page, re.MULTILINE))
    assert read_in_code - listed == set()
    assert {name for name in listed if name.startswith("TERACON_")} - read_in_code == set()
