"""How long does a published CSV take from text to a prepared, memory-mapped folder, and how much memory?

    python bench/data_loading.py --users 1500000

Generates a task-1 file (items by a Zipf law, real lengths like the authors' example rows: 47 of 100 on average) and a label file
with the same sequences, converts both, opens the folder, reads one epoch of batches, and removes everything.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from teracon_fast.data import DatasetWriter, epoch_batches, fetch, open_dataset, read_sequences_csv

REAL_LENGTHS = [46, 12, 100, 43, 100, 27, 100, 100, 37, 62, 26, 90, 30, 21, 45, 13, 13, 49, 20, 14]


def generate(path: Path, users: int, length: int, items: int, labels: int, seed: int) -> None:
    """Write a published CSV of `users` lines; with labels > 0, one label a line after ',,'."""
    generator = np.random.Generator(np.random.PCG64(seed))
    real = np.minimum(np.resize(REAL_LENGTHS, users) * length // 100, length).clip(1)
    ranks = np.arange(1, items + 1, dtype=np.float64)
    cumulative = np.cumsum(1 / ranks)
    names = generator.permutation(items) + 1
    with open(path, "w", encoding="ascii") as file:
        for start in range(0, users, 20_000):
            count = min(20_000, users - start)
            drawn = names[np.searchsorted(cumulative, generator.random((count, length)) * cumulative[-1])]
            drawn[np.arange(length) < length - real[start : start + count, None]] = 0
            tails = [f",,{(start + row) % labels}" if labels else "" for row in range(count)]
            file.writelines(
                ",".join(map(str, row)) + tail + "\n" for row, tail in zip(drawn.tolist(), tails, strict=True)
            )


def peak_rss_gib() -> float:
    """Peak resident memory of this process so far, in GiB (Linux counts in KiB, macOS in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 30 if sys.platform == "darwin" else 1 << 20)


def report(what: str, seconds: float, rows: int, size: int = 0) -> None:
    rate = f"  {size / seconds / 1e6:6.0f} MB/s" if size else ""
    print(
        f"{what:34s} {seconds:7.1f} s  {rows / seconds:11,.0f} rows/s{rate}  peak RSS so far {peak_rss_gib():.2f} GiB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--users", type=int, default=1_500_000)
    parser.add_argument("--length", type=int, default=100)
    parser.add_argument("--items", type=int, default=640_000, help="distinct items to draw from")
    parser.add_argument("--labels", type=int, default=8, help="distinct labels of the second task; 0 leaves it out")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default: a temporary folder")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder, prefix="teracon-data-loading-"))
    try:
        files = {"watch": folder / "watch.csv"}
        if arguments.labels:
            files["age"] = folder / "age.csv"
        for labels, path in enumerate(files.values()):
            generate(
                path, arguments.users, arguments.length, arguments.items, labels * arguments.labels, arguments.seed
            )
            print(f"{path.name}: {arguments.users:,} lines, {path.stat().st_size / 1e6:,.0f} MB")
        print(f"peak RSS before loading {peak_rss_gib():.2f} GiB")
        with DatasetWriter(folder / "prepared", "bench", arguments.length) as writer:
            for name, path in files.items():
                start = time.perf_counter()
                first = name == "watch"
                writer.add_task(name, "next_item" if first else "label", read_sequences_csv(path, labels=not first))
                report(f"{path.name} -> arrays", time.perf_counter() - start, arguments.users, path.stat().st_size)
        start = time.perf_counter()
        data = open_dataset(folder / "prepared")
        report("open_dataset (validates)", time.perf_counter() - start, arguments.users * len(files))
        task = data.tasks[0]
        indices = np.arange(len(task.samples))
        start = time.perf_counter()
        for batch in epoch_batches(indices, 1024, seed=0, epoch=0):
            fetch(task, batch)
        report("one epoch of batches of 1024", time.perf_counter() - start, len(indices))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
