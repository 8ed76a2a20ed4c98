"""Does bf16 train as well as fp32? The same task sequence with both, over several seeds, on any prepared data.

    python bench/precision.py --data demo/data [--data ...] [--preset demo] [--seeds 3] [--runs FOLDER]

Prints the metric of every task right after it was trained, for fp32 and bf16: mean and range over seeds. A difference of the
means within the range that seeds alone make is no loss. Runs are kept in the folder, and finished ones are not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path

from teracon_fast.cli.app import app

PRECISIONS = ("fp32", "bf16")


def diagonal(data: Path, run: Path, preset: str, precision: str, seed: int) -> list[float]:
    """The metric of each task when it had just been trained (R[i, i])."""
    results = run / "results.json"
    if not results.exists():
        arguments = ["train", "--preset", preset, "--data", str(data), "--run", str(run), "--precision", precision]
        arguments += ["--seed", str(seed), "--no-report", "--no-tensorboard"]
        with contextlib.redirect_stdout(sys.stderr):
            code = app(arguments, prog_name="teracon", standalone_mode=False)
        if code:
            raise SystemExit(code)
    rows = json.loads(results.read_text())["R"]
    return [row[-1] for row in rows]


def summary(values: list[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.4f} ({min(values):.4f} to {max(values):.4f})"


def compare(data: Path, runs: Path, preset: str, seeds: int) -> None:
    """Print a Markdown table for one prepared folder."""
    found = {
        precision: [diagonal(data, runs / f"{precision}-{seed}", preset, precision, seed) for seed in range(seeds)]
        for precision in PRECISIONS
    }
    print(f"\n{data.resolve().parent.name}/{data.name}, preset {preset}, seeds 0 to {seeds - 1}: mean (range)\n")
    print("| task | fp32 | bf16 | difference of means |\n| --- | --- | --- | --- |")
    for task in range(len(found["fp32"][0])):
        columns = {name: [run[task] for run in runs_of] for name, runs_of in found.items()}
        means = {name: sum(values) / len(values) for name, values in columns.items()}
        cells = " | ".join(summary(columns[name]) for name in PRECISIONS)
        print(f"| {task + 1} | {cells} | {means['bf16'] - means['fp32']:+.4f} |")


def main() -> None:
    """Train, or read what is trained, and print."""
    parser = argparse.ArgumentParser(description="Compare training in bf16 with training in fp32.")
    parser.add_argument("--data", type=Path, action="append", required=True, help="prepared folder; may be given again")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, help="where the runs are kept; by default in a folder that is removed")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for number, data in enumerate(given.data):
            compare(data, (given.runs or Path(temporary)) / str(number), given.preset, given.seeds)


if __name__ == "__main__":
    main()
