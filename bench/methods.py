"""Training steps of the methods that TERACON is compared with, beside their eager dense forms, at the TTL shape in fp32.

    python bench/methods.py [--rounds 5] [--quick] [--only METHOD] [--results FOLDER]

Each method learns task 1 (the next item, B = 32, 20,000 items) and task 2 (2,000 labels, B = 256). A step is the forward and the
backward pass, what the method does to gradients, Adam, and what the method does after it. Both sides are the same method, from
the same weights; the eager one computes every position of every sequence and all logits (`reference.dense`) under
`torch.optim.Adam`. After two steps of each, which are not timed and whose losses must agree, they take turns within one process.
TERACON's own step is in the suite (`pytest bench/`). Leaves a Markdown table on the terminal and a JSON file in a folder.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# As a script: its own folder would be the only place to look.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import command_line, report
from bench.cases import TINY, TTL, Run, Shape
from bench.measure import DifferentAnswers, fma_peak
from bench.operations import Operations
from teracon_fast.data import Batch
from teracon_fast.methods import METHODS, Method, PeterRec, Place, Sizes
from teracon_fast.methods.peterrec import Patches
from teracon_fast.methods.preactivation import PreActivationBackbone
from teracon_fast.methods.sequence import train_step
from teracon_fast.model.backbone import Backbone
from teracon_fast.packing import Streams
from teracon_fast.reference import dense_loss, patch_addend
from teracon_fast.train.loop import make_optimizer

PLACE = Place(5, 10)  # half way through an epoch
ASKED = 3.0  # times eager, of these:
BAR = ("sinmo", "fine_all", "hat", "conure", "peterrec")


@dataclass(frozen=True)
class Case:
    """A step: of a method with some settings, of its first or second task (0 or 1)."""

    method: str
    task: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return " ".join([self.method, *(str(value) for value in self.settings.values())])


CASES = [
    Case(name, task, settings)
    for name, settings in [
        ("sinmo", {}), ("fine_all", {}), ("hat", {}), ("conure", {}), ("conure", {"block": "pre-activation"}),
        ("peterrec", {}), ("piggyback", {}), ("mtl", {}),
    ]
    for task in (0, 1)
    # Before their second task the others are SinMo.
    if task or name in ("sinmo", "hat") or settings
]  # fmt: skip


@dataclass
class Measured:
    """Seconds of every call of both sides."""

    case: Case
    operations: Operations
    ours: list[float] = field(default_factory=list)
    eager: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """How many times faster ours is, by medians."""
        return statistics.median(self.eager) / statistics.median(self.ours)


def batches(shape: Shape) -> list[Batch]:
    """One of each task."""
    made = []
    for users, labels in zip((shape.first_batch, shape.batch), shape.labels, strict=False):
        y = torch.randint(labels, (users,), generator=torch.Generator().manual_seed(users))
        made.append(Batch(shape.items(users), y, shape.lengths(users)))
    return made


def begun(case: Case, shape: Shape) -> Method:
    """The method at the beginning of its task."""
    sizes = Sizes(shape.labels[0], shape.channels, shape.dilations, shape.kernel_size)
    method = METHODS[case.method](sizes, **case.settings)
    generator = torch.Generator().manual_seed(0)
    for task in range(case.task + 1):
        method.start(task, shape.labels[task], generator)
    return method


def make_dense(method: Method) -> None:
    """From here on the method's losses are those of `reference.dense`; all else of it stays."""

    def task_loss(
        task: int, backbone: Backbone, batch: Batch, head: nn.Linear | None = None, masks: Tensor | None = None,
        weights: Sequence[Tensor] | None = None, convolve: object = None,
    ) -> Tensor:  # fmt: skip
        addend = None
        if convolve is not None:
            assert isinstance(method, PeterRec)
            patches = method.patches[task - 1]
            assert isinstance(patches, Patches)
            down, up = zip(*((patch.down, patch.up) for patch in patches.patches), strict=True)
            addend = patch_addend(down, up, method.slope)
        masks = None if masks is None else masks[:, 0]
        before = isinstance(backbone, PreActivationBackbone)
        return dense_loss(task, backbone, method.head(task) if head is None else head, batch, masks, weights, before, addend)

    method.task_loss = task_loss  # type: ignore[method-assign,assignment]


def sides(case: Case, shape: Shape) -> tuple[Run, Run]:
    """Ours and the eager one; each call is a step, and returns its loss."""
    given = batches(shape)
    fast, dense = begun(case, shape), begun(case, shape)
    dense.load_state_dict(copy.deepcopy(fast.state_dict()))
    make_dense(dense)
    optimizer = make_optimizer(fast, 1e-4, fast.begin_phase("train"))
    plain = torch.optim.Adam(dense.begin_phase("train"), lr=1e-4)

    def step(method: Method, optimizer: torch.optim.Optimizer) -> Tensor:
        others = {task: given[task] for task in method.companions()}
        return train_step(method, optimizer, given[case.task], PLACE, others)

    return lambda: step(fast, optimizer), lambda: step(dense, plain)


def operations(case: Case, shape: Shape) -> Operations:
    """Of a step: three times the forward pass, but twice where convolutions are frozen; PeterRec's patches are left out."""
    network = shape.network

    def forward(task: int) -> Operations:
        users = shape.first_batch if task == 0 else shape.batch
        seen = shape.length - (task == 0)
        lengths = np.maximum(shape.lengths(users) - (task == 0), 0)
        packed = network.pack(lengths, seen, [Streams(np.arange(users))], every=task == 0)
        rows, dense = (packed.convolutions[-1].taps.shape[0], users * seen) if task == 0 else (users, users)
        frozen = case.method == "peterrec" and task > 0
        encoder, head = network.encoder(packed, users * seen), network.head(rows, shape.labels[task], dense)
        return encoder * (2 if frozen else 3) + head * 3

    return forward(1) + forward(0) if case.method == "mtl" and case.task else forward(case.task)


def measure(case: Case, shape: Shape, rounds: int) -> Measured:
    """Both sides in turns.

    Raises:
        DifferentAnswers: the loss after a step is not the eager one's.
    """
    measured, runs = Measured(case, operations(case, shape)), sides(case, shape)
    for _ in range(2):
        ours, eager = (float(run()) for run in runs)
        if not abs(ours - eager) <= 1e-3 * abs(eager):
            raise DifferentAnswers(f"{case.name}, task {case.task + 1}: the loss is {ours}, eagerly {eager}")
    for number in range(rounds):
        turns: list[tuple[Callable[[], Tensor], list[float]]]
        turns = [(runs[0], measured.ours), (runs[1], measured.eager)]
        for run, seconds in turns if number % 2 else turns[::-1]:
            gc.collect()
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    return measured


HEADS = ("method", "task", "eager", "ours", "times eager", "useful GFLOP", "of peak")


def row(measured: Measured, peak: float | None) -> str:
    """Of the Markdown table; peak: of the machine a moment later, GFLOP/s."""
    eager, ours = statistics.median(measured.eager), statistics.median(measured.ours)
    useful = measured.operations.useful / 1e9
    share = "" if peak is None else f"{useful / ours / peak:.0%}"
    cells = [measured.case.name, str(measured.case.task + 1), f"{eager * 1e3:,.0f} ms", f"{ours * 1e3:,.0f} ms"]
    return f"| {' | '.join([*cells, f'{measured.ratio:.2f}', f'{useful:.4g}', share])} |"


def document(measured: Sequence[Measured], shape: Shape, rounds: int, peak: float | None) -> dict[str, Any]:
    """Everything about a run."""
    return {
        **report.provenance(),
        "kind": "methods",
        "shape": asdict(shape),
        "rounds": rounds,
        "fma_peak_gflops": peak,
        "cases": [
            {
                "method": one.case.method, "settings": dict(one.case.settings), "task": one.case.task + 1,
                "useful_gflop": one.operations.useful / 1e9, "dense_gflop": one.operations.dense / 1e9,
                "seconds": {"ours": one.ours, "eager": one.eager}, "times_eager": one.ratio,
            }
            for one in measured
        ],
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=sorted({case.method for case in CASES}), help="one method")
    given, rounds, folder = command_line.parse(parser, arguments, 5, "timed steps of each side")
    shape = TINY if given.quick else TTL
    print(f"| {' | '.join(HEADS)} |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    measured, peaks = [], [fma_peak()]
    for case in CASES:
        if given.only in (None, case.method):
            measured.append(measure(case, shape, rounds))
            peaks.append(fma_peak())
            print(row(measured[-1], peaks[-1]), flush=True)
    peak = max((peak for peak in peaks if peak is not None), default=None)
    missed = [one for one in measured if one.case.method in BAR and one.ratio < ASKED]
    below = [f"{one.case.name} task {one.case.task + 1} ({one.ratio:.2f})" for one in missed]
    print(f"\nasked: {ASKED:.0f} times eager for {', '.join(BAR)}; below it: {', '.join(below) or 'none'}")
    if peak is not None:
        print(f"fp32 FMA peak: {peak:.4g} GFLOP/s on {torch.get_num_threads()} threads")
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    print(f"kept in {report.write(document(measured, shape, rounds, peak), folder, 'methods')}")


if __name__ == "__main__":
    main()
