"""Builds the optional compiled extension. Everything that is not code is in pyproject.toml.

The extension is one shared library of torch operations on torch's stable ABI. It is no Python module: it does not
include Python.h, and `teracon_fast.ops.native` loads it into torch. So one build serves any Python and later torch versions.

Environment variable TERACON_BUILD_EXT: 1 makes a failed build fatal, 0 skips the build; by default it is tried, and the
package is installed without it when that fails.

Environment variable TERACON_SANITIZE: 1 builds it with the address and undefined behavior sanitizers (`make asan`).
"""

from __future__ import annotations

import importlib.util
import os
import re
import site
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
# The oldest torch whose stable ABI has what csrc/ uses; the same number is given to torch's headers.
OLDEST_TORCH = (2, 11)
TARGET_VERSION = f"0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"
# No -march: kernels choose instructions at run time. -g0: half the build time. A square root that sets errno is no vector's.
OPTIMIZED = ["-O3", "-g0", "-fno-math-errno"]
# Each finding ends the process: a report that a test survives would be overlooked.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# Python's own flags have -fwrapv, under which no signed overflow is one.
SANITIZED = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-wrapv", *SANITIZERS]


def installed_torch() -> Path | None:
    """Folder of the torch that the package will run with, found without importing it; None when there is none.

    An isolated build hides torch from `sys.path`, but it runs in the interpreter that is installed into, so torch lies
    in that interpreter's site-packages all the same. Nothing is downloaded.
    """
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    sites = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        sites.append(site.getusersitepackages())
    folders += [Path(place) / "torch" for place in sites]
    return next((folder for folder in folders if (folder / "version.py").exists()), None)


def torch_version(folder: Path) -> tuple[int, int]:
    found = re.search(r"__version__ = '(\d+)\.(\d+)", (folder / "version.py").read_text())
    return (int(found[1]), int(found[2])) if found else (0, 0)


def extension(torch: Path) -> Extension:
    sources = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.cpp"))]
    sanitize = environment_switch("TERACON_SANITIZE") == "1"
    headers = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.h"))]
    return Extension(
        "teracon_fast._C",
        sources,
        depends=headers,
        language="c++",
        extra_compile_args=[
            "-std=c++17", *(SANITIZED if sanitize else OPTIMIZED), "-Wall", "-Wextra", "-fvisibility=hidden", "-pthread",
            "-fopenmp", "-ffp-contract=fast", f"-DTORCH_TARGET_VERSION={TARGET_VERSION}ULL", "-isystem", str(torch / "include"),
        ],
        extra_link_args=["-pthread", "-fopenmp", *(SANITIZERS if sanitize else [])],
        libraries=["torch_cpu"],
        library_dirs=[str(torch / "lib")],
    )  # fmt: skip


def environment_switch(name: str) -> str:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SetupError(f"{name}: got {value!r}, expected 0, 1 or nothing")
    return value


def wanted_extensions() -> list[Extension]:
    mode = environment_switch("TERACON_BUILD_EXT")
    if mode == "0":
        return []
    torch = installed_torch()
    if torch is None:
        reason = f"no torch found in {sysconfig.get_path('purelib')}: install torch first, then this package"
    elif torch_version(torch) < OLDEST_TORCH:
        reason = "torch is {}.{}, expected at least {}.{}".format(*torch_version(torch), *OLDEST_TORCH)
    elif os.name != "posix":
        reason = f"the extension is not built on {sys.platform}"
    else:
        built = extension(torch)
        built.optional = mode != "1"
        return [built]
    if mode == "1":
        raise SetupError(f"TERACON_BUILD_EXT=1, but {reason}")
    print(f"teracon-fast: installing without the compiled extension: {reason}", file=sys.stderr)
    return []


class BuildLibrary(build_ext):
    """Builds `_C.so`: the name carries no Python version, because the library depends on none."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"


class LibraryWheel(bdist_wheel):
    """Tags a wheel with a compiled library for its platform and any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


setup(
    # A kernel folder beside the package in the source tree, inside it once installed.
    package_dir={"teracon_fast.kernels": "kernels"},
    packages=[
        *find_packages(include=["teracon_fast", "teracon_fast.*"]),
        "teracon_fast.kernels",
        *(f"teracon_fast.kernels.{name}" for name in find_packages("kernels")),
    ],
    include_package_data=False,
    package_data={"teracon_fast": ["py.typed", "presets/*.toml", "reproduce/*.toml"], "teracon_fast.kernels": ["configs.json"]},
    ext_modules=wanted_extensions(),
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": LibraryWheel},
)
