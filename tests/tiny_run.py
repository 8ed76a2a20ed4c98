"""A small prepared data set and a run trained on it in seconds, for tests of inference and the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np

LENGTH = 12
ITEMS = np.arange(101, 141)  # raw ids; index 1 is item 101
SMALL = {"channels": 8, "dilations": "1,2", "epochs": 2, "batch-size": 32, "lr": 0.01, "log-every": 1}


def write_dataset(folder: Path, ages: tuple[str, str, str] = ("old", "young", "mid")) -> Path:
    """Three tasks: next item, an item to click (30 labels, which are items), an age group (3 labels)."""
    from teracon_fast.data import DatasetWriter

    random = np.random.default_rng(0)
    sequences = ITEMS[random.integers(0, len(ITEMS), (120, LENGTH))]
    sequences[: len(ITEMS), -1] = ITEMS  # every id occurs, so that the dictionary is known
    sequences[np.arange(LENGTH) < random.integers(0, LENGTH - 3, 120)[:, None]] = 0
    users = np.arange(120)
    with DatasetWriter(folder, name="tiny", length=LENGTH) as writer:
        writer.add_task("next", "next_item", sequences, groups=users)
        writer.add_task("click", "label", sequences, labels=ITEMS[users % 30], groups=users)
        writer.add_task("age", "label", sequences, labels=np.asarray(ages)[users % 3], groups=users)
    return folder


def arguments(data: Path, run: Path, *more: str) -> list[str]:
    """Arguments of `teracon train` for a run of two or three seconds."""
    flags = [part for name, value in SMALL.items() for part in (f"--{name}", str(value))]
    return ["train", "--data", str(data), "--run", str(run), "--no-tensorboard", "--no-report", *flags, *more]


def train_tiny(folder: Path) -> tuple[Path, Path]:
    """(prepared folder, run folder) under `folder`, trained."""
    from teracon_fast.config import load_config
    from teracon_fast.train import run as continual

    values = {"data": write_dataset(folder / "data"), "run": folder / "run", "tensorboard": False, "log_every": 1}
    values |= {"model.channels": 8, "model.dilations": [1, 2]}
    for section in ("first", "later"):
        values |= {f"{section}.{name}": value for name, value in (("epochs", 2), ("batch_size", 32), ("lr", 0.01))}
    continual.train(load_config(overrides=values))
    return folder / "data", folder / "run"
