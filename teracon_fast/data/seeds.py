"""Seeds of the parts of a run, all derived from one."""

from __future__ import annotations

import numpy as np


def derived_seed(seed: int, task: int, purpose: str) -> int:
    """An independent seed for each task (from 1) and purpose."""
    sequence = np.random.SeedSequence([seed, task, *purpose.encode()])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))  # fits a signed 64-bit integer
