"""Highest memory use of this process on the host."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path


def forget_highest_resident() -> None:
    """Reset the highest resident memory of this process to what it holds now, where there is /proc."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def highest_resident_mib() -> float:
    """Highest resident memory of this process so far.

    Linux's ru_maxrss starts at the value of the parent process, so it is used only where there is no /proc.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
