"""How long does a published CSV take from text to a prepared, memory-mapped folder, and how much memory?

    python -m bench.data [--users 1500000]

Writes a task-1 file (items by a Zipf law, the authors' example lengths) and a label file with the same sequences, converts both,
opens the folder, reads one epoch of batches, and removes everything.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bench.shapes import Shape
from teracon_fast.data import DatasetWriter, epoch_batches, fetch, open_dataset, read_sequences_csv


def generate(folder: Path, users: int, length: int, items: int, labels: int) -> tuple[Path, Path]:
    """Write `users` lines in the published format: item sequences, and the same with a label after ',,'."""
    generator, real = np.random.Generator(np.random.PCG64(0)), Shape(length=length).lengths(users)
    cumulative, names = np.cumsum(1 / np.arange(1, items + 1)), generator.permutation(items) + 1
    watch, age = folder / "watch.csv", folder / "age.csv"
    with open(watch, "w", encoding="ascii") as sequences, open(age, "w", encoding="ascii") as labelled:
        for start in range(0, users, 20_000):
            count = min(20_000, users - start)
            drawn = names[np.searchsorted(cumulative, generator.random((count, length)) * cumulative[-1])]
            drawn[np.arange(length) < length - real[start : start + count, None]] = 0
            words = pa.array(drawn.reshape(-1)).cast(pa.string())
            offsets = pa.array(np.arange(0, count * length + 1, length, dtype=np.int32))
            lines = pc.binary_join(pa.ListArray.from_arrays(offsets, words), ",").to_pylist()
            sequences.writelines(f"{line}\n" for line in lines)
            labelled.writelines(f"{line},,{(start + row) % labels}\n" for row, line in enumerate(lines))
    return watch, age


@contextmanager
def measured(what: str, rows: int, size: int) -> Iterator[None]:
    """Print wall time, CPU time (they differ where other programs run), rates and peak memory of a block."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 30 if sys.platform == "darwin" else 1 << 20)
    rates = f"{rows / wall:12,.0f} rows/s {size / wall / 1e6:6,.0f} MB/s"
    print(f"{what:28s} {wall:7.1f} s (cpu {cpu:6.1f} s) {rates}  peak RSS so far {peak:.2f} GiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, value in {"users": 1_500_000, "length": 100, "items": 640_000, "labels": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"({value})")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="teracon-bench-data-") as name:
        folder = Path(name)
        files = generate(folder, given.users, given.length, given.items, given.labels)
        with DatasetWriter(folder / "prepared", "bench", given.length) as writer:
            for path, kind in zip(files, ("next_item", "label"), strict=True):
                with measured(f"{path.name} -> arrays", given.users, path.stat().st_size):
                    writer.add_task(path.stem, kind, read_sequences_csv(path, labels=kind == "label"))
        arrays = sum(file.stat().st_size for file in (folder / "prepared").rglob("*.npy"))
        with measured("open_dataset (validates)", given.users * len(files), arrays):
            task = open_dataset(folder / "prepared").tasks[0]
        indices = np.arange(len(task.samples))
        with measured("one epoch, batches of 1024", len(indices), task.sequences.nbytes):
            for batch in epoch_batches(indices, 1024, seed=0, epoch=0):
                fetch(task, batch)


if __name__ == "__main__":
    main()
