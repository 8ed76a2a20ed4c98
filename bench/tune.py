"""Measures launch configurations on this GPU and rewrites its architecture's row of `kernels/configs.json`.

    python bench/tune.py [--operation NAME] [--kind half|single] [--dry-run]

Each operation in each size bucket (`bench.tune_problems`) is called with the present configuration and with each candidate, one
compilation each; candidates that fail to compile or launch, or give other results than the present configuration, are passed
over. The fastest ones and the present one then take turns, and the present one stays unless another is at least 2 % faster:
so a second run changes nothing. Times are of a graph of the call's launches, without the host's part, where it can
be captured. Other architectures' rows stay as they are. Everything is about 700 candidates of some seconds each: half an hour
or more.

`--device cpu --quick --architecture NAME --table FILE` is a self-test without a GPU: with TRITON_INTERPRET=1 the heads' kernels
run in Triton's interpreter, convolutions by plain PyTorch operations, all at tiny sizes; the times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# As a script: its own folder would be the only place to look.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import report
from bench.cases import TINY, NotMeasured
from bench.gpu_measure import Meter, first_line
from bench.gpu_report import refusal, triton_version
from bench.large_catalogues import duration
from bench.tune_problems import KINDS, OPERATIONS, Answer, Call, Kind, Problem, Sizes, candidates, problems
from teracon_fast.files import atomic_write
from teracon_fast.kernels import configs
from teracon_fast.kernels.configs import Config, Operation

QUICK = Sizes(
    labels=((64, 40), (None, 150)), channels=((16, 16), (None, 32)), head_channels=16, rows=20, ranked=8, retained=3, users=6,
    places=5, shape=TINY,
)  # fmt: skip
# The present configuration stays unless another takes at most this share of its time.
FASTER = 0.98
FINALISTS, TURNS = 3, 5
# Relative, of each tensor as a whole: sums are taken in another order.
ERRORS = {"half": 2e-2, "single": 1e-4}

Clock = Callable[[Call], float]
Table = dict[str, dict[str, Any]]


@dataclass
class Outcome:
    """What came of one problem. `seconds` of the winner and of the present configuration, medians of their turns."""

    problem: Problem
    present: Config
    winner: Config
    seconds: float
    present_seconds: float
    tried: int
    failed: dict[Config, str] = field(default_factory=dict)  # does not compile, launch, or give the same results; and why

    def line(self) -> str:
        """For the terminal."""
        told = f"{self.problem.title}: "
        if self.winner == self.present:
            told += f"stays {written(self.present)}, {duration(self.present_seconds)}"
        else:
            saved = 1 - self.seconds / self.present_seconds
            told += f"{written(self.winner)}, {duration(self.seconds)}, {saved:.0%} less than {written(self.present)}"
        passed_over = f", {len(self.failed)} passed over" if self.failed else ""
        return f"{told}; {self.tried} tried{passed_over}"


def written(config: Config) -> str:
    """A configuration in a line."""
    return " ".join(f"{name} {value}" for name, value in asdict(config).items() if value)


def graph_clock(meter: Meter) -> Clock:
    """Seconds of a call: of a graph of its launches, where it can be captured."""

    def seconds(call: Call) -> float:
        run: Callable[[], object] = call
        with contextlib.suppress(NotMeasured):
            run = meter.replayed(lambda: call()[0])
        calls = meter.calls(run)
        return statistics.median(meter.seconds(run, calls) for _ in range(3))

    return seconds


def tune(problem: Problem, present: Config, tried: Sequence[Config], call: Call, clock: Clock) -> Outcome:
    """Find the fastest configuration of a call, `present` unless another is clearly faster.

    Raises:
        Exception: the present configuration fails, or the device is lost.
    """
    found = Outcome(problem, present, present, 0.0, 0.0, len(tried))
    with configs.using(problem.operation, present):
        expected = detached(call())
        times = {present: clock(call)}
    for candidate in tried:
        if candidate == present:
            continue
        try:
            with configs.using(problem.operation, candidate):
                check(call(), expected, problem.kind)
                times[candidate] = clock(call)
        except Exception as error:
            if lost(error):
                raise
            found.failed[candidate] = first_line(error)
    finalists = [present, *sorted((c for c in times if c != present), key=times.__getitem__)[:FINALISTS]]
    turns: dict[Config, list[float]] = {config: [] for config in finalists}
    for _ in range(TURNS if len(finalists) > 1 else 1):
        for config in finalists:
            with configs.using(problem.operation, config):
                turns[config].append(clock(call))
    medians = {config: statistics.median(seconds) for config, seconds in turns.items()}
    best = min(finalists, key=medians.__getitem__)
    found.winner = best if medians[best] <= FASTER * medians[present] else present
    found.seconds, found.present_seconds = medians[found.winner], medians[present]
    return found


def lost(error: Exception) -> bool:
    """Whether every later call on the device would fail too."""
    return any(name in str(error) for name in ("CUDA error", "HIP error", "illegal memory access"))


class DifferentResults(AssertionError):
    """A candidate's results are not those of the present configuration."""


def detached(answer: Answer) -> Answer:
    """The answer to compare with, whatever later calls do with memory."""
    return tuple(tensor.detach().float().clone() for tensor in answer if tensor.numel())


def check(answer: Answer, expected: Answer, kind: Kind) -> None:
    """Compare with the present configuration's answer.

    Raises:
        DifferentResults: they differ by more than the order of sums explains.
    """
    for number, (one, other) in enumerate(zip(detached(answer), expected, strict=True)):
        # Scores of -inf or ranks of nothing would make a norm meaningless.
        error = float(_norm(one - other) / _norm(other).clamp_min(1e-30))
        if not error <= ERRORS[kind]:
            raise DifferentResults(f"result {number} is off by {error:.3g}, expected at most {ERRORS[kind]:g}")


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor)


def with_winners(table: Mapping[str, Mapping[str, Any]], architecture: str, outcomes: Sequence[Outcome]) -> Table:
    """The table with the winners in an architecture's row; neighbouring buckets with one winner become one."""
    new: Table = copy.deepcopy({name: dict(row) for name, row in table.items()})
    row = new[architecture]
    for kind in KINDS:
        for operation in OPERATIONS:
            own = [found for found in outcomes if (found.problem.kind, found.problem.operation) == (kind, operation)]
            if not own:
                continue
            entries: list[dict[str, int]] = []
            for found in sorted(own, key=lambda found: found.problem.up_to or 2**62):
                bound = {} if found.problem.up_to is None else {"up_to": found.problem.up_to}
                if entries and _config(entries[-1]) == found.winner:
                    entries.pop()
                entries.append({**bound, **_entry(found.winner)})
            row.setdefault(kind, {})[operation] = entries
    return new


def _entry(config: Config) -> dict[str, int]:
    """A configuration as the table has it: features only where there is a second product."""
    return {name: value for name, value in asdict(config).items() if name != "features" or value}


def _config(entry: Mapping[str, int]) -> Config:
    return Config(**{name: value for name, value in entry.items() if name != "up_to"})


def measured(before: Mapping[str, Any], facts: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """What "measured" says after a run: where, when, with what, and which operations, with those of earlier runs like it."""
    same = {name: value for name, value in before.items() if name in facts and name != "date"}
    if same != {name: value for name, value in facts.items() if name != "date"}:
        return {**facts, "operations": list(names)}
    every = [name for name in before["operations"] if name not in names]
    return {**facts, "operations": sorted([*every, *names])}


def rewritten(table: Table, architecture: str, outcomes: Sequence[Outcome], facts: dict[str, Any]) -> Table:
    """The table after a run; the same where nothing is new, whatever the date."""
    names = sorted({f"{found.problem.kind} {found.problem.operation}" for found in outcomes})
    new = with_winners(table, architecture, outcomes)
    before = table[architecture]["measured"] or {}
    new[architecture]["measured"] = now = measured(before, facts, names)
    old_row = {**table[architecture], "measured": {**before, "date": ""}}
    return table if {**new[architecture], "measured": {**now, "date": ""}} == old_row else new


def run_all(
    table: Table, architecture: str, wanted: Sequence[Problem], device: torch.device, backend: str, clock: Clock
) -> list[Outcome]:
    """Tune every problem, telling of each. One whose operation has no such backend here, or whose present configuration fails,
    is left out with the other buckets of its operation."""
    outcomes, broken = list[Outcome](), set[tuple[str, str]]()
    for problem in wanted:
        key = (problem.kind, problem.operation)
        if key in broken:
            continue
        present = configs.of_size(configs.buckets(table, architecture, *key), problem.size)
        try:
            call = problem.call(device, backend)
            outcomes.append(tune(problem, present, candidates(problem, architecture), call, clock))
        except Exception as error:
            if lost(error):
                raise
            print(f"{problem.title}: left as it is, {first_line(error)}", flush=True)
            broken.add(key)
            continue
        print(outcomes[-1].line(), flush=True)
        for candidate, why in outcomes[-1].failed.items():
            print(f"    passed over {written(candidate)}: {why}")
    return [found for found in outcomes if (found.problem.kind, found.problem.operation) not in broken]


def main(arguments: Sequence[str] | None = None, clock: Clock | None = None) -> int:
    """Tune as the command line says; returns 2 where there is nothing to tune. `clock`: instead of the device's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--operation", choices=OPERATIONS, action="append", help="may be given again (all)")
    parser.add_argument("--kind", choices=KINDS, action="append", help="of operands; may be given again (both)")
    parser.add_argument("--dry-run", action="store_true", help="measure and tell, but leave the table as it is")
    parser.add_argument("--table", type=Path, default=configs.TABLE, help="the table to rewrite (kernels/configs.json)")
    parser.add_argument("--device", default="cuda", help="cpu: a self-test, with --quick; cuda:1: another GPU (cuda)")
    parser.add_argument("--architecture", help="row to rewrite, in a self-test")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does the script work?")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    on_cpu = device.type == "cpu"
    if on_cpu and not (given.quick and given.architecture and given.table != configs.TABLE):
        parser.error("--device cpu is a self-test of this script: it needs --quick, --architecture and a --table of its own")
    if not on_cpu:
        if given.quick or given.architecture:
            parser.error("--quick and --architecture are for a self-test, with --device cpu")
        refused = refusal()
        if refused is not None:
            print(refused, file=sys.stderr)
            return 2
        torch.cuda.set_device(device)
    table = configs.read(given.table)
    architecture = given.architecture or configs.architecture(device)
    if architecture == "other" or architecture not in table:
        print(f"{unlisted(architecture, device)}: {sorted(set(table) - {'other'})} are listed", file=sys.stderr)
        return 2
    name = "self-test on the CPU: no GPU was measured" if on_cpu else torch.cuda.get_device_name(device)
    print(f"{name}; row {architecture} of {given.table}", flush=True)
    operations: Sequence[Operation] = given.operation or OPERATIONS
    wanted = list(problems(QUICK if given.quick else Sizes(), operations, given.kind or KINDS))
    count = sum(len(candidates(problem, architecture)) for problem in wanted)
    print(f"{len(wanted)} calls, {count} candidates, each compiled once", flush=True)
    meter = Meter(device, block=0.001 if given.quick else 0.02)
    backend = "torch" if on_cpu else "triton"
    outcomes = run_all(table, architecture, wanted, device, backend, clock or graph_clock(meter))
    versions = report.provenance()["versions"]
    facts = {
        "device": name, "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "teracon_fast": versions["teracon_fast"], "torch": versions["torch"], "triton": triton_version(),
    }  # fmt: skip
    new = rewritten(table, architecture, outcomes, facts)
    changed = sum(found.winner != found.present for found in outcomes)
    print(f"{changed} of {len(outcomes)} configurations are new")
    if given.dry_run or new is table:
        print(f"{given.table} stays as it is")
        return 0
    with atomic_write(given.table, "w") as file:
        file.write(configs.written(new))
    print(f"{given.table} rewritten; the tests in tests/kernels say whether the kernels still agree")
    return 0


def unlisted(architecture: str, device: torch.device) -> str:
    """What to do about a GPU without a row."""
    found = architecture
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found = f"{properties.name}, {getattr(properties, 'gcnArchName', f'sm_{properties.major}{properties.minor}')}"
    return (
        f"no row of its own serves this device ({found}): it gets \"other\", which `make tune` leaves alone. Put its shared "
        f"memory into `SHARED` of kernels/configs.py and a copy of the row \"other\" into the table, and run again"
    )


if __name__ == "__main__":
    sys.exit(main())
