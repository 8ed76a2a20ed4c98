"""A sequence of tasks on real households' shopping, from the raw data to the plots. This is what `make demo` runs.

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
from teracon_fast.data import Batch, fetch, open_dataset
from teracon_fast.infer.open import open_run
from teracon_fast.methods import StepContext, Teracon
from teracon_fast.ops.task_masks import rho
from teracon_fast.packing import real_lengths
from teracon_fast.reference import ReferenceTCN, continual_step, draw_users
from teracon_fast.train.loop import make_optimizer, train_step
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
    settings, options = config.for_task(last), config.task_options(last)
    ours, teacher = (open_run(config.run, after=number).method for number in (last, last - 1))
    assert isinstance(ours, Teracon) and isinstance(teacher, Teracon)
    teacher.model.requires_grad_(False)
    method = Teracon.around(ours.model, teacher.model, **options)
    mine = make_optimizer(method, settings.lr, method.begin_phase("train"))
    x, y = fetch(tasks[-1], task_split(config, tasks[-1]).train[: settings.batch_size])
    batch, context = Batch(x, y, real_lengths(x)), StepContext(batch=1, num_batches=2.0)  # halfway through the annealing
    s = context.scale(options["s_max"])
    with torch.no_grad():
        ratios = rho(teacher.model.masks(s), ours.model.masks(s)[:, -1], options["c"]).tolist()

    eager, eager_teacher = reference_of(ours.model), reference_of(teacher.model).requires_grad_(False)
    theirs = torch.optim.Adam(eager.parameters(), lr=settings.lr)
    users = draw_users(len(x), ratios, generator=torch.Generator().manual_seed(0))

    def step() -> None:
        method.rho = ratios
        train_step(method, mine, batch, context)

    sides: dict[str, Callable[[], Any]] = {
        "ours": step,
        "eager": lambda: continual_step(eager, eager_teacher, theirs, x, y, users, ratios, s, options["alpha"]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, run in sides.items():
            run()  # untimed: the other side's call has given memory back
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return (
        f"A training step of task {last} with retention ({len(x)} users of {x.shape[1]} items, f = {ours.sizes.channels}, "
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
    plots = sorted((run / "report").glob("*.png"))
    print(f"Plots: {', '.join(str(path) for path in plots)}")
    print(f"Done in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
