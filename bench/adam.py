"""Adam on an item embedding of which each step reads few rows: ours beside torch.optim.Adam(fused=True).

    python bench/adam.py [--items 646000] [--channels 256] [--users 1024] [--length 47] [--steps 200] [--timed 40]
                         [--head 0] [--results FOLDER]

Items are drawn Zipf(1). Both sides get the same gradients of the same rows, in turns within one process. Ours takes the steps
that the rows of the batch have missed, as reading them does, sums the gradients of repeated items, and steps. Torch's forms the
dense gradient, and steps; both parts are shown, since a program may form its gradients elsewhere. The last steps are timed, when
rows have been missed for as long as they will be. At the end all rows are brought up to date, and parameters and moments compared
bit by bit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

# As a script: its own folder would be the only place to look.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import report
from teracon_fast import ops
from teracon_fast.ops.embedding_rows import catch_up
from teracon_fast.optim.adam import Adam


@dataclass
class Found:
    """Milliseconds of each part of the timed steps, medians; the flush at the end; and how the results differ."""

    read: float = 0.0  # steps that the rows of the batch have missed
    sums: float = 0.0  # gradients of repeated items
    step: float = 0.0
    torch_gradient: float = 0.0  # dense
    torch_step: float = 0.0
    flush: float = 0.0
    steps: int = 0
    ulps: dict[str, int] = field(default_factory=dict)  # largest difference, in units of the last place

    @property
    def ours(self) -> float:
        """Of a whole step without the flush."""
        return self.read + self.sums + self.step

    @property
    def ours_flushed(self) -> float:
        """Of a whole step with its share of the flush."""
        return self.ours + self.flush / self.steps


def ulps(a: Tensor, b: Tensor) -> int:
    """Largest distance between floats, counted in floats."""

    def ordered(t: Tensor) -> Tensor:
        bits = t.detach().reshape(-1).view(torch.int32).long()
        return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    parts = zip(a.detach().reshape(-1).split(1 << 24), b.detach().reshape(-1).split(1 << 24), strict=True)
    return max(int((ordered(x) - ordered(y)).abs().max()) for x, y in parts)


def measure(items: int, channels: int, users: int, length: int, steps: int, timed: int, head: int = 0) -> Found:
    """Both optimisers for `steps` steps, the last `timed` of which count; `head` labels add a dense parameter to both."""
    torch.manual_seed(0)
    start = torch.empty(items, channels).uniform_(-(items**-0.5), items**-0.5)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start)
    heads = [nn.Parameter(torch.zeros(head, channels)) for _ in range(2)]
    mine = Adam([ours, *heads[:1]] if head else [ours], fused=True, lazy=True)
    other = torch.optim.Adam([theirs, *heads[1:]] if head else [theirs], fused=True)
    theirs.grad = torch.zeros_like(theirs)
    for parameter in heads:
        parameter.grad = torch.randn(head, channels, generator=torch.Generator().manual_seed(1))
    weights = 1 / torch.arange(1, items + 1, dtype=torch.float64)
    count = users * length
    pool = 1e-4 * torch.randn(2 * count, channels)
    spent: dict[str, list[float]] = {name: [] for name in ("read", "sums", "step", "torch_gradient", "torch_step")}

    rows: list[Tensor] = []
    dense = theirs.grad

    def backward(gradient: Tensor) -> None:
        rows[0].backward(gradient)

    def form_dense(drawn: Tensor, gradient: Tensor) -> None:
        dense.zero_().index_add_(0, drawn, gradient)

    def clock(name: str, call: Callable[[], object]) -> None:
        begin = time.perf_counter()
        call()
        spent[name].append(1e3 * (time.perf_counter() - begin))

    for _ in range(steps):
        drawn = torch.multinomial(weights, count, replacement=True)
        gradient = pool[int(torch.randint(count, ())) :][:count]
        rows.clear()
        ours.grad = None
        clock("read", partial(catch_up, ours, drawn))
        rows.append(ops.embedding_rows(ours, drawn, sparse=True))  # the rows themselves are read on either side
        clock("sums", partial(backward, gradient))
        clock("step", mine.step)
        clock("torch_gradient", partial(form_dense, drawn, gradient))
        clock("torch_step", other.step)
    found = Found(steps=steps)
    for name, values in spent.items():
        setattr(found, name, statistics.median(values[-timed:]))
    begin = time.perf_counter()
    mine.flush()
    found.flush = 1e3 * (time.perf_counter() - begin)
    found.ulps["parameter"] = ulps(ours, theirs)
    for name in ("exp_avg", "exp_avg_sq"):
        found.ulps[name] = ulps(mine.state[ours][name], other.state[theirs][name])
    return found


def table(found: Found) -> list[str]:
    """What was found, line by line."""
    whole, alone = found.torch_gradient + found.torch_step, found.torch_step
    return [
        f"ours   {found.ours:8.2f} ms a step: read {found.read:.2f}, sums {found.sums:.2f}, step {found.step:.2f}",
        f"torch  {whole:8.2f} ms a step: dense gradient {found.torch_gradient:.2f}, step {found.torch_step:.2f}",
        f"flush  {found.flush:8.2f} ms after {found.steps} steps, {found.flush / found.steps:.2f} ms a step",
        f"faster than torch's whole step {whole / found.ours:.2f} times, flush included {whole / found.ours_flushed:.2f}",
        f"torch's step alone / ours {alone / found.ours:.2f} times, without our sums {alone / (found.ours - found.sums):.2f}",
        "largest difference in floats: " + ", ".join(f"{name} {n}" for name, n in found.ulps.items()),
    ]


def main(arguments: list[str] | None = None) -> Found:
    """Measure as the command line says, print the table and a line of JSON, and keep it where asked."""
    parser = argparse.ArgumentParser(description="Adam on an embedding of which each step reads few rows.")
    defaults = {"items": 646_000, "channels": 256, "users": 1024, "length": 47, "steps": 200, "timed": 40, "head": 0}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--results", metavar="FOLDER", type=Path, help="where the JSON goes too")
    given = vars(parser.parse_args(arguments))
    folder: Path | None = given.pop("results")
    found = measure(**given)
    print("\n".join(table(found)))
    figures = {**given, "threads": torch.get_num_threads(), "torch": torch.__version__, **asdict(found)}
    print(json.dumps(figures))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        print("kept in", report.write({**report.provenance(), "kind": "adam", **figures}, folder, "adam"))
    return found


if __name__ == "__main__":
    main()
