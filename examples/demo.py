"""A sequence of tasks on real households' shopping, from the raw data to the pictures. This is what `make demo` runs.

    python examples/demo.py [--folder demo] [--preset demo]

It runs the three commands that a person would type, in one process, then times a training step of the last task beside the
eager reference. Everything it writes lies in the folder.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from teracon_fast import FastTCN
from teracon_fast.cli.app import app
from teracon_fast.config import RunConfig, load_config
from teracon_fast.data import fetch, open_dataset
from teracon_fast.model.checkpoints import load_model
from teracon_fast.ops.task_masks import rho
from teracon_fast.reference import ReferenceTCN, continual_step, draw_users
from teracon_fast.train import loop as trainer
from teracon_fast.train.run import task_split

ROUNDS = 9


def teracon(*arguments: str) -> None:
    """Type a command: show it, run it, and stop here if it fails."""
    print(f"\n$ teracon {' '.join(arguments)}", flush=True)
    code = app(list(arguments), prog_name="teracon", standalone_mode=False)
    if code:
        raise SystemExit(code)


def reference_of(model: FastTCN) -> ReferenceTCN:
    """The eager reference with the same weights."""
    para: dict[str, Any] = {
        "item_size": model.num_items,
        "dilated_channels": model.channels,
        "dilations": list(model.dilations),
        "kernel_size": model.kernel_size,
        "task_embs": list(model.task_embedding_range),
        "num_task": model.num_tasks,
        "target_item_size": model.labels,
    }
    reference = ReferenceTCN(para, model.mask_variant)
    reference.load_state_dict(model.state_dict())
    return reference


def measure_step(config: RunConfig) -> str:
    """Medians of interleaved training steps of the last task, ours and the eager reference's, from the same weights."""
    tasks = open_dataset(config.data).tasks
    last = len(tasks)
    settings = config.for_task(last)
    ours, teacher = (load_model(config.run / "checkpoints" / f"task{number}.safetensors") for number in (last, last - 1))
    teacher.requires_grad_(False)
    eager, eager_teacher = reference_of(ours), reference_of(teacher).requires_grad_(False)
    x, y = fetch(tasks[-1], task_split(config, tasks[-1]).train[: settings.batch_size])
    s = settings.s_max / 2
    with torch.no_grad():
        ratios = rho(teacher.masks(s), ours.masks(s)[:, -1], settings.c).tolist()
    users = draw_users(len(x), ratios, generator=torch.Generator().manual_seed(0))
    mine = trainer.make_optimizer(ours, settings.lr)
    theirs = torch.optim.Adam(eager.parameters(), lr=settings.lr)

    sides: dict[str, Callable[[], Any]] = {
        "ours": lambda: trainer.continual_step(ours, teacher, mine, x, y, users, ratios, s, settings.alpha),
        "eager": lambda: continual_step(eager, eager_teacher, theirs, x, y, users, ratios, s, settings.alpha),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(ROUNDS + 1):
        for name, step in sides.items():
            start = time.perf_counter()
            step()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return (
        f"A training step of task {last} with retention ({len(x)} users of {x.shape[1]} items, f = {ours.channels}, "
        f"{torch.get_num_threads()} threads): {medians['ours'] * 1e3:.1f} ms, "
        f"eager reference {medians['eager'] * 1e3:.1f} ms: {medians['eager'] / medians['ours']:.2f} times faster "
        f"(medians of {ROUNDS} interleaved steps in this process)"
    )


def main() -> None:
    """Prepare, train, report, measure."""
    parser = argparse.ArgumentParser(description="Learn a sequence of tasks on the Complete Journey data.")
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where everything is written")
    parser.add_argument("--preset", default="demo", help="settings of the run")
    given = parser.parse_args()
    start = time.perf_counter()
    data, run = given.folder / "data", given.folder / "run"

    teracon("prepare", "completejourney", "--output", str(data), "--overwrite")
    teracon("train", "--preset", given.preset, "--data", str(data), "--run", str(run), "--fresh")
    config = load_config(given.preset, overrides={"data": str(data), "run": str(run)})
    print()
    print(measure_step(config))
    pictures = sorted((run / "report").glob("*.png"))
    print(f"Pictures: {', '.join(str(path) for path in pictures)}")
    print(f"Done in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
