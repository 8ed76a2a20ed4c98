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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from teracon_fast.data import DatasetWriter, epoch_batches, fetch, open_dataset, read_sequences_csv

REAL_LENGTHS = [46, 12, 100, 43, 100, 27, 100, 100, 37, 62, 26, 90, 30, 21, 45, 13, 13, 49, 20, 14]


def generate(files: dict[str, Path], users: int, length: int, items: int, labels: int, seed: int) -> None:
    """Write published CSVs of `users` lines: `files["watch"]`, and the same lines with a label after ',,' in `files["age"]`."""
    generator = np.random.Generator(np.random.PCG64(seed))
    real = np.minimum(np.resize(REAL_LENGTHS, users) * length // 100, length).clip(1)
    cumulative = np.cumsum(1 / np.arange(1, items + 1))
    names = generator.permutation(items) + 1
    with ExitStack() as stack:
        opened = {name: stack.enter_context(open(path, "w", encoding="ascii")) for name, path in files.items()}
        for start in range(0, users, 20_000):
            count = min(20_000, users - start)
            drawn = names[np.searchsorted(cumulative, generator.random((count, length)) * cumulative[-1])]
            drawn[np.arange(length) < length - real[start : start + count, None]] = 0
            words = pa.array(drawn.reshape(-1)).cast(pa.string())
            offsets = pa.array(np.arange(0, count * length + 1, length, dtype=np.int32))
            lines = pc.binary_join(pa.ListArray.from_arrays(offsets, words), ",").to_pylist()
            opened["watch"].writelines(f"{line}\n" for line in lines)
            if "age" in opened:
                opened["age"].writelines(f"{line},,{(start + row) % labels}\n" for row, line in enumerate(lines))


def peak_rss_gib() -> float:
    """Peak resident memory of this process so far, in GiB (Linux counts in KiB, macOS in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 30 if sys.platform == "darwin" else 1 << 20)


@contextmanager
def measured(what: str, rows: int, size: int) -> Iterator[None]:
    """Print wall time, CPU time (they differ where other programs run), rates and peak memory of a block."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    rate = f"{rows / wall:12,.0f} rows/s {size / wall / 1e6:6,.0f} MB/s"
    print(f"{what:28s} {wall:7.1f} s (cpu {cpu:6.1f} s) {rate}  peak RSS so far {peak_rss_gib():.2f} GiB", flush=True)


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
        generate(files, arguments.users, arguments.length, arguments.items, arguments.labels, arguments.seed)
        for path in files.values():
            print(f"{path.name}: {arguments.users:,} lines, {path.stat().st_size / 1e6:,.0f} MB")
        print(f"peak RSS before loading {peak_rss_gib():.2f} GiB")
        with DatasetWriter(folder / "prepared", "bench", arguments.length) as writer:
            for name, path in files.items():
                first = name == "watch"
                with measured(f"{path.name} -> arrays", arguments.users, path.stat().st_size):
                    writer.add_task(name, "next_item" if first else "label", read_sequences_csv(path, labels=not first))
        arrays = sum(file.stat().st_size for file in (folder / "prepared").rglob("*.npy"))
        with measured("open_dataset (validates)", arguments.users * len(files), arrays):
            data = open_dataset(folder / "prepared")
        task = data.tasks[0]
        indices = np.arange(len(task.samples))
        with measured("one epoch, batches of 1024", len(indices), task.sequences.nbytes):
            for batch in epoch_batches(indices, 1024, seed=0, epoch=0):
                fetch(task, batch)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
