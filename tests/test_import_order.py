"""Imports run downwards between the rooms of the package, and never in a circle.

All imports count: at module level, inside functions, and for type checkers only. A module that a function imports is there once
everything is loaded, so circles are looked for among the others.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "teracon_fast"

# From the top; a room may import from the rows below its own. Of one row, rooms may not import each other.
TIERS: tuple[tuple[str, ...], ...] = (
    ("cli",),
    ("reproduce",),
    ("report", "infer"),
    ("train",),
    ("config",),
    ("methods",),
    ("model",),
    ("optim",),
    ("ops",),
    ("kernels",),
    ("data",),  # real lengths are counted by the packing
    ("packing",),
    ("errors", "files"),
)
# The specification: plain PyTorch that must not lean on what it is there to check.
ALONE = {"reference": {"errors"}}
FREE = {"__init__", "__main__"}  # of the package itself
MOST_MODULES = 8


def modules() -> dict[str, Path]:
    """All modules by their full name; the package's `__init__` files by the name of their package."""
    found = {}
    for folder, name in ((PACKAGE, "teracon_fast"), (ROOT / "kernels", "teracon_fast.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            full = ".".join((name, *parts))
            found[full.removesuffix(".__init__")] = path
    return found


MODULES = modules()


@cache
def imports(name: str) -> tuple[tuple[str, bool], ...]:
    """Modules of the package that a module imports, and whether they are needed to load it."""
    tree = ast.parse(MODULES[name].read_text("utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import in line {node.lineno}, expected the full name"
            # A name of a package is one of its modules, or something that its `__init__` has.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [full if full in MODULES else str(node.module) for full in names]
        else:
            continue
        found += [(full, id(node) not in inside) for full in names if full in MODULES]
    return tuple(found)


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


ROOMS = {part: row for row, tier in enumerate(TIERS) for part in tier}


def test_every_room_has_its_place() -> None:
    assert {room(name) for name in MODULES} - FREE - set(ALONE) == set(ROOMS)


@pytest.mark.parametrize("own", [*ROOMS, *ALONE])
def test_imports_run_downwards(own: str) -> None:
    wrong = set()
    for name in MODULES:
        if room(name) != own:
            continue
        for other, _ in imports(name):
            to = room(other)
            allowed = to in ALONE[own] if own in ALONE else ROOMS.get(to, -1) > ROOMS[own]
            # The version is in the package's `__init__`.
            if to != own and not allowed and other != "teracon_fast":
                wrong.add(f"{name} imports {other}")
    assert not wrong, "\n".join(sorted(wrong))


def test_no_module_imports_itself_through_others() -> None:
    after = {name: {other for other, at_load in imports(name) if at_load and other != name} for name in MODULES}
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " imports ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(after[name]):
                walk(other, (*path, name))
            done.add(name)

    for name in sorted(MODULES):
        walk(name, ())


def test_the_package_itself_has_few_modules() -> None:
    own = [path.name for path in PACKAGE.glob("*.py")]
    assert len(own) <= MOST_MODULES, own
