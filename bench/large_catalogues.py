"""Heads over very large catalogues: time and memory of ours beside PyTorch's, and what a whole training step of task 1 takes.

    python bench/large_catalogues.py [--rounds 3] [--quick] [--only PART] [--results FOLDER]

Parts: `compared`, where all sides can run, in turns within one process, answers and gradients compared first (`bench.heads`);
`large`, ours over the whole catalogue; `step`, task 1 (`bench.first_step`); `growth`, from a thousand labels to a million. In the
last three each side has a process of its own. Peak memory is that above parameters, inputs and gradients: see `bench.heads`.
Leaves Markdown tables on the terminal, and a JSON file and a picture in a folder.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F

# As a script: its own folder would be the only place to look.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import command_line, first_step, heads, report
from bench.cases import NotMeasured
from bench.heads import FULL, QUICK, CrossEntropy, Measured, Sizes, Spec
from bench.measure import DifferentAnswers, fma_peak
from teracon_fast.report import plots
from teracon_fast.train.loop import Precision

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = ("compared", "large", "step", "growth")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
NAMES = {
    "eager": "eager",
    "eager-bf16": "eager, autocast to bf16",
    "fused": "F.linear_cross_entropy",
    "ours": "ours",
    "ours-bf16": "ours, bf16",
    "ours-merged": "ours, equal rows merged",
    "ours-merged-bf16": "ours, equal rows merged, bf16",
    "ours-filtered": f"ours, filter_eps = 2**{math.log2(heads.FILTER_EPS):g}",
    "ours-direct": "ours, direct",
    "ours-gram": "ours, gram",
    "ours-topk": f"ours, linear_topk(k={heads.TOP})",
    "ours-topk-bf16": f"ours, linear_topk(k={heads.TOP}), bf16",
}
# What is asked for: time relative to eager in fp32 (of "ours" in cross-entropy: to the fused loss too), and memory.
ASKED = {
    "cross-entropy": {"ours": 1.0, "ours-merged": 0.5, "ours-bf16": 0.55},
    "retention-few": {"ours": 0.6, "ours-bf16": 0.6},
    "retention-many": {"ours": 0.6, "ours-bf16": 0.6},
    "rank": {"ours": 1 / 2.5, "ours-bf16": 1 / 5},
}
ASKED_MIB = 256.0
ASKED_STEP_MIB = 6e9 / 2**20
LIMIT_BYTES = 12e9  # of working memory: what would take more is not run
OPTIONS: tuple[Mapping[str, Any] | None, ...] = (
    None,
    {},
    {"chunking_method": "aspect_ratio"},
    {"batch_chunk_size": 384},
    {"batch_chunk_size": 384, "acc_policy": "compact"},
    {"batch_chunk_size": 1056, "acc_policy": "compact"},
    {"batch_chunk_size": 3168, "acc_policy": "compact"},
)


@dataclass
class Table:
    """A case and its sides' measurements."""

    name: str
    title: str
    sides: dict[str, Measured]

    def ratio(self, side: str, to: str) -> float | None:
        """Time relative to another side's."""
        both = self.sides.get(side), self.sides.get(to)
        if both[0] is None or both[1] is None or not (both[0].seconds and both[1].seconds):
            return None
        return both[0].median / both[1].median


@dataclass
class Results:
    """All that a run measures. `peak_gflops`: the highest fp32 FMA peak measured between cases, None if it cannot be had."""

    sizes: Sizes
    rounds: int
    peak_gflops: float | None = None
    options: Mapping[str, Any] | None = None
    tried: dict[str, float] = field(default_factory=dict)  # options of the fused loss, and seconds with them
    cases: list[Table] = field(default_factory=list)
    steps: dict[str, first_step.Step] = field(default_factory=dict)
    growth: dict[int, Table] = field(default_factory=dict)

    def measure_peak(self) -> None:
        self.peak_gflops = max((peak for peak in (self.peak_gflops, fma_peak()) if peak is not None), default=None)


def written(options: Mapping[str, Any] | None) -> str:
    """Options of the fused loss as they are written in a call."""
    if options is None:
        return "options=None"
    return f"LinearCrossEntropyOptions({', '.join(f'{name}={value!r}' for name, value in options.items())})"


def try_options(results: Results) -> None:
    """Find the options that F.linear_cross_entropy is fastest with, over a quarter of the labels."""
    if not hasattr(F, "linear_cross_entropy"):
        return
    spec = Spec(CrossEntropy, results.sizes.labels // 4, ("fused",), results.sizes.sequences)
    case, best = spec.make(results.sizes), math.inf
    for options in OPTIONS:
        heads.warm_up(spec, "fused", options)
        case.options = options
        call = case.call("fused")
        seconds = heads.timed(call)[1]
        if seconds < 2 * best:  # else it is out of the question
            seconds = min(seconds, heads.timed(call)[1])
        results.tried[written(options)], best = seconds, min(best, seconds)
        call.forget()
    results.options = min(OPTIONS, key=lambda options: results.tried[written(options)])


def compare(name: str, spec: Spec, results: Results) -> Table:
    """All sides of a case in turns, then the memory of each in a process of its own."""
    case = spec.make(results.sizes, results.options)
    sides = heads.in_turns(case, calls_of(spec, results, results.rounds))
    results.measure_peak()
    title = case.title
    del case
    heads.trim()
    for side, measured in sides.items():
        if measured.problem is None:
            measured.peak_mib = own(spec, side, results, 1).peak_mib
    return Table(name, title, sides)


def apart(name: str, spec: Spec, results: Results, at_least: int) -> Table:
    """Every side of a case in a process of its own. Calls of many seconds are not repeated, or only `at_least` so many.

    Raises:
        DifferentAnswers: they differ.
    """
    sides, rows = dict[str, Measured](), rows_of(spec, results.sizes)
    calls = calls_of(spec, results, at_least)
    for side in spec.sides:
        needed = needs(spec, side, results)
        if needed > LIMIT_BYTES:
            sides[side] = Measured(problem=f"not run: would take about {needed / 1e9:.0f} GB")
            continue
        sides[side] = own(spec, side, results, calls)
    answers = {side: measured.answer for side, measured in sides.items() if measured.seconds}
    expected = next(iter(answers.values()), math.nan)
    for side, answer in answers.items():
        limit = heads.TOLERANCES["bf16" if side.endswith("bf16") else "fp32"][0]
        if not abs(answer - expected) <= limit * abs(expected):
            raise DifferentAnswers(f"{name}: {side} computes {answer}, expected {expected}")
    title = f"{spec.kind.what}, {rows:,} rows, {spec.labels:,} labels"
    return Table(name, title, sides)


def calls_of(spec: Spec, results: Results, at_least: int) -> int:
    """Timed calls of each side: three times the rounds of short ones, where fresh memory for gradients can take longer than the
    work, and how long differs from call to call; at least so many of long ones."""
    return max(at_least, min(3 * results.rounds, int(4e8 // (spec.labels * rows_of(spec, results.sizes)))))


def rows_of(spec: Spec, sizes: Sizes) -> int:
    """Rows of a case, unmerged."""
    return spec.rows * (sizes.length - 1) if spec.kind is CrossEntropy else spec.rows


def own(spec: Spec, side: str, results: Results, calls: int) -> Measured:
    """A side in a process of its own, or why it cannot be had."""
    try:
        return heads.in_own_process(heads.alone, spec, side, results.sizes, results.options, calls)
    except (NotMeasured, MemoryError) as reason:
        return Measured(problem=str(reason))


def needs(spec: Spec, side: str, results: Results) -> float:
    """Working memory in bytes that PyTorch's cross-entropy takes for [rows, labels] matrices; 0 for ours."""
    if side.startswith("ours") or spec.kind is not CrossEntropy:
        return 0.0
    rows = rows_of(spec, results.sizes)
    if side == "fused" and results.options is not None:
        return 8.0 * min(rows, results.options.get("batch_chunk_size", rows)) * spec.labels
    return 12.0 * rows * spec.labels  # logits, their logarithmic softmax, and the gradient of one of them


def lines_of(table: Table, peak: float | None) -> list[str]:
    """A Markdown table of a case, as lines."""
    columns = ["side", "median", "time x eager", "time x fused", "GFLOP/s", "of peak", "peak memory"]
    lines = [f"### {table.title}", "", f"| {' | '.join(columns)} |", "| --- |" + " ---: |" * (len(columns) - 1)]
    asked = ASKED.get(table.name, {})
    for side, measured in table.sides.items():
        if not measured.seconds:
            lines.append(f"| {NAMES[side]} | {measured.problem} |" + " |" * (len(columns) - 2))
            continue
        rate = measured.gflop / measured.median
        cells = [
            NAMES[side],
            duration(measured.median),
            judged(table.ratio(side, "eager"), asked.get(side)),
            judged(table.ratio(side, "fused"), asked.get(side) if side == "ours" else None),
            f"{rate:,.4g}",
            "" if peak is None else f"{rate / peak:.0%}",
            judged(measured.peak_mib, ASKED_MIB if side.startswith("ours") else None, " MiB"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if "ours-filtered" in table.sides:
        lines += ["", filtering(table)]
    return lines


def filtering(table: Table) -> str:
    """What the filter changes, in a sentence."""
    exact, filtered = table.sides["ours"], table.sides["ours-filtered"]
    said = [f"{name} {filtered.errors[name]:.2g} ({filtered.errors[f'{name}, largest']:.2g})" for name in ("hidden", "weight")]
    return (
        f"Mean loss {exact.answer:.3f}. Filtered, the time is {table.ratio('ours-filtered', 'ours'):.2f} of the exact one's, the "
        f"loss differs by {filtered.errors['answer']:.2g}, the gradients by these shares of their norms (and the largest "
        f"difference by these of the largest element): {', '.join(said)}."
    )


def judged(value: float | None, asked: float | None, unit: str = "") -> str:
    """A figure, and whether it is as small as was asked for."""
    if value is None:
        return ""
    text = f"{value:,.3g}{unit}" if unit and value < 100 else f"{value:,.0f}{unit}" if unit else f"{value:.2f}"
    return text if asked is None else f"{text} (asked {asked:,.4g}: {'met' if value <= asked else 'NOT met'})"


def duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:,.1f} µs"
    return f"{seconds * 1e3:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def step_lines(results: Results) -> list[str]:
    """Markdown tables of the training step, as lines."""
    sizes = results.sizes
    size = f"{sizes.catalogue:,} items, B = {sizes.sequences}, L = {sizes.length}, f = {sizes.channels}"
    rows: list[list[str]] = [["median of a step"], ["peak memory above parameters, gradients, Adam's state"]]
    rows += [["with them"], ["parameters, gradients, Adam's state"], *([f"{part} (profiled)"] for part in first_step.PARTS)]
    for step in results.steps.values():
        held = f"{step.parameters_mib:,.0f}, {step.gradients_mib:,.0f}, {step.state_mib:,.0f} MiB"
        cells = [duration(step.median), judged(step.peak_mib, ASKED_STEP_MIB, " MiB"), f"{step.total_mib:,.0f} MiB", held]
        cells += [f"{duration(step.parts[part])}, {step.parts[part] / step.seconds[-1]:.0%}" for part in first_step.PARTS]
        for row, cell in zip(rows, cells, strict=True):
            row.append(cell)
    lines = [f"### training step of task 1, {size}", "", f"| | {' | '.join(results.steps)} |"]
    return [*lines, "| --- |" + " ---: |" * len(results.steps), *(f"| {' | '.join(row)} |" for row in rows)]


def growth_lines(results: Results) -> list[str]:
    """A Markdown table of time and memory over the number of labels, as lines."""
    rows = next((m.rows for table in results.growth.values() for m in table.sides.values() if m.rows), 0)
    lines = [f"### cross-entropy forward and backward over the number of labels, {rows:,} rows: median, peak memory", ""]
    lines += [f"| labels | {' | '.join(NAMES[side] for side in heads.GROWTH)} |", "| ---: |" + " ---: |" * len(heads.GROWTH)]
    for labels, table in results.growth.items():
        cells = [
            f"{duration(m.median)}, {m.peak_mib:,.0f} MiB" if m.seconds else str(m.problem) for m in table.sides.values()
        ]
        lines.append(f"| {labels:,} | {' | '.join(cells)} |")
    return lines


def document(results: Results) -> dict[str, Any]:
    """Everything about a run, with the fields of `report.document` where they are the same things."""
    peak = results.peak_gflops
    return {
        **report.provenance(),
        "kind": "large-catalogues",
        "sizes": asdict(results.sizes),
        "rounds": results.rounds,
        "fma_peak_gflops": peak,
        "fused_options": {"seconds": results.tried, "kept": written(results.options)} if results.tried else None,
        "cases": {table.name: _table(table, peak) for table in results.cases},
        "steps": {precision: {**asdict(step), "median_seconds": step.median} for precision, step in results.steps.items()},
        "growth": {str(labels): _table(table, peak) for labels, table in results.growth.items()},
    }


def _table(table: Table, peak: float | None) -> dict[str, Any]:
    sides = {}
    for side, measured in table.sides.items():
        record: dict[str, Any] = {"problem": measured.problem}
        if measured.seconds:
            rate = measured.gflop / measured.median
            record = {
                "rows": measured.rows,
                "gflop": measured.gflop,
                "answer": measured.answer,
                "errors": measured.errors,
                "seconds": measured.seconds,
                "median_seconds": measured.median,
                "time_times_eager": table.ratio(side, "eager"),
                "time_times_fused": table.ratio(side, "fused"),
                "gflops": rate,
                "share_of_peak": None if peak is None else rate / peak,
                "peak_memory_mib": measured.peak_mib,
                "asked_time_times_eager": ASKED.get(table.name, {}).get(side),
            }
        sides[side] = record
    return {"title": table.title, "sides": sides}


def picture(results: Results, subtitle: str) -> Figure:
    """Time and peak memory over the number of labels, one panel each, and where a side stops."""
    from matplotlib.figure import Figure

    with plots.style():
        figure = Figure(figsize=(11, 4.9))
        figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
        times, memory = figure.subplots(1, 2)
        handles: dict[str, Any] = {}
        for number, side in enumerate(heads.GROWTH):
            measured = {labels: table.sides[side] for labels, table in results.growth.items()}
            run = {labels: m for labels, m in measured.items() if m.seconds}
            if not run:
                continue
            colour, marker = plots.COLOURS[number], plots.MARKERS[number]
            line: dict[str, Any] = {"color": colour, "marker": marker, "ls": plots.LINES[number], "ms": 6, "lw": 1.8}
            (handles[NAMES[side]],) = times.plot(list(run), [m.median for m in run.values()], **line)
            # Below a tenth of a MiB single pages count.
            memory.plot(list(run), [max(m.peak_mib or 0.0, 0.1) for m in run.values()], **line)
            beyond = next((labels for labels, m in measured.items() if not m.seconds), None)
            if beyond is not None:
                reason = (measured[beyond].problem or "").removeprefix("not run: ")
                for axes, value in ((times, run[max(run)].median), (memory, run[max(run)].peak_mib or 0.0)):
                    _stop(axes, max(run), value, f"{NAMES[side]} stops: {_short(beyond)} labels\n{reason}", colour)
        limits = ((ASKED_MIB, "256 MiB, asked of ours"), (LIMIT_BYTES / 2**20, f"{LIMIT_BYTES / 1e9:.0f} GB, limit of this run"))
        for value, name in limits:
            memory.axhline(value, color="#555555", lw=1.0, ls=":")
            memory.annotate(
                name, (0.01, value), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
                fontsize=8.5, color="#444444",
            )  # fmt: skip
        rows = next((m.rows for table in results.growth.values() for m in table.sides.values() if m.rows), 0)
        for axes, name in ((times, "time of a call (s)"), (memory, "peak memory above parameters,\ninputs and gradients (MiB)")):
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xticks(list(results.growth), [_short(labels) for labels in results.growth])
            axes.minorticks_off()
            axes.set_xlabel("labels")
            axes.set_ylabel(name)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        memory.set_ylim(top=3 * LIMIT_BYTES / 2**20)
        call = f"Cross-entropy of a linear head, forward and backward: {rows:,} rows, f = {results.sizes.channels}"
        figure.suptitle(f"{call}\n{subtitle}", fontsize=11.5)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _stop(axes: Axes, labels: int, value: float, text: str, colour: str) -> None:
    axes.plot(labels, value, ls="none", marker="o", ms=13, mfc="none", mec=colour, mew=1.4)
    axes.annotate(
        text, (labels, value), xytext=(-10, 5), textcoords="offset points", fontsize=8.5, color=colour, ha="right", va="center",
    )  # fmt: skip


def _short(labels: int) -> str:
    """A number of labels for an axis."""
    for unit, name in ((1_000_000, " M"), (1_000, " k")):
        if labels % unit == 0:
            return f"{labels // unit}{name}"
    return f"{labels:,}"


def run_parts(results: Results, wanted: Sequence[str]) -> Iterator[list[str]]:
    """Measure the wanted parts, telling the tables of each as it is done."""
    sizes = results.sizes
    results.measure_peak()
    if "compared" in wanted or "growth" in wanted:
        try_options(results)
        if results.tried:
            tried = [f"- {options}: {duration(seconds)}" for options, seconds in results.tried.items()]
            yield [f"F.linear_cross_entropy over {sizes.labels // 4:,} labels, to find its options:", "", *tried]
    if "compared" in wanted:
        for name, spec in heads.compared(sizes).items():
            results.cases.append(compare(name, spec, results))
            yield lines_of(results.cases[-1], results.peak_gflops)
    if "large" in wanted:
        for name, spec in heads.large(sizes).items():
            results.cases.append(apart(name, spec, results, at_least=2))
            yield lines_of(results.cases[-1], results.peak_gflops)
    if "step" in wanted:
        for precision in PRECISIONS:
            results.steps[precision] = heads.in_own_process(first_step.measure, precision, sizes, results.rounds)
        yield step_lines(results)
    if "growth" in wanted:
        for labels, spec in heads.growing(sizes).items():
            results.growth[labels] = apart(f"{labels:,} labels", spec, results, at_least=1)
        yield growth_lines(results)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=PARTS, action="append", help="a part to measure; may be given again (all)")
    given, rounds, folder = command_line.parse(parser, arguments, 3, "timed calls of each side, and more of short ones")
    results = Results(QUICK if given.quick else FULL, rounds)
    for lines in run_parts(results, given.only or PARTS):
        print("\n".join(lines), end="\n\n", flush=True)
    if folder is None:
        return
    run = document(results)
    folder.mkdir(parents=True, exist_ok=True)
    path = report.write(run, folder, "large-catalogues")
    kept = [str(path)]
    if results.growth:
        machine, versions = run["machine"], run["versions"]
        of = f"{machine['cpu']}, threads: {machine['threads']}, version {versions['teracon_fast']}, torch {versions['torch']}"
        with plots.style():
            picture(results, of).savefig(path.with_suffix(".png"))
        kept.append(path.with_suffix(".png").name)
    print(f"kept in {' and '.join(kept)}")


if __name__ == "__main__":
    main()
