"""Plots of a run: R matrix, task similarity, rho over training, learning curves, losses.

Each function takes plain arrays and returns a matplotlib Figure (no pyplot, no global state, no display), or None if there
is nothing to show yet. Colors are safe for color-blind readers: the Okabe-Ito set for lines, each with its own line
style, and RdBu or cividis for heat maps.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from teracon_fast.errors import TeraconError
from teracon_fast.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

# Okabe and Ito (2008), darkest first; the yellow is replaced, being unreadable on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#D9D9D9",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "pdf.fonttype": 42,
}
FORMATS = ("png", "pdf", "svg")
MAX_POINTS = 1500
NEARLY_EQUAL = 0.98  # if every cosine is above this, distances are shown
SMALLEST = 1e-7  # distances below this are fp32 rounding


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, its size in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    return figure


def style() -> Any:
    """The matplotlib settings of all plots, as a context manager (needed while drawing and while saving)."""
    from matplotlib import rc_context

    settings: Any = STYLE
    return rc_context(settings)


def check_format(name: str) -> None:
    """Raise TeraconError unless plots can be written in this format."""
    if name not in FORMATS:
        raise TeraconError(f"plot format: got {name!r}, expected one of {', '.join(FORMATS)}")


def save(figure: Figure, path: Path) -> None:
    """Write a plot atomically, in the format of its suffix."""
    with style(), atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:])


def _wrap(name: str, width: int = 13, lines: int = 2) -> str:
    """`name` broken into at most `lines` lines of `width` letters, the rest cut to an ellipsis."""
    parts = textwrap.wrap(name.replace("_", " "), width, max_lines=lines, placeholder=" …")
    return "\n".join(parts) or name


def _title(task: int, name: str, width: int = 34) -> str:
    return f"T{task} " + textwrap.shorten(name.replace("_", " "), width, placeholder=" …")


def _ink(rgba: tuple[float, float, float, float]) -> str:
    """Black or white, whichever is readable on `rgba` (relative luminance, sRGB weights)."""
    red, green, blue = rgba[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"


def _percent(value: float, digits: int) -> str:
    """Signed percentage with a true minus sign, and no sign if it rounds to zero."""
    value = round(value, digits)
    return f"{abs(value):.{digits}f} %" if value == 0 else f"{value:+.{digits}f} %".replace("-", "−")


def _thin(x: Array, y: Array) -> tuple[Array, Array]:
    """At most MAX_POINTS points, each the mean of equally many; unchanged if there are no more."""
    stride = math.ceil(len(x) / MAX_POINTS)
    if stride <= 1:
        return x, y
    whole = len(x) // stride * stride
    return x[:whole].reshape(-1, stride).mean(1), y[:whole].reshape(-1, stride).mean(1)


def _smooth(y: Array) -> Array:
    """Centred moving mean over a twentieth of the points, shorter at the ends: no lag, no bias there."""
    half = max(1, len(y) // 40)
    window = np.ones(2 * half + 1)
    return np.convolve(y, window)[half:-half] / np.convolve(np.ones_like(y), window)[half:-half]


def panels(count: int, width: float = 3.5, height: float = 2.7) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, at most four in a row, and their axes."""
    columns = count if count <= 3 else (2 if count == 4 else math.ceil(count / math.ceil(count / 4)))
    rows = math.ceil(count / columns)
    figure = new_figure(max(width * columns, 5.2), height * rows + 0.7)
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def _legend(figure: Figure, heading: str, known: Mapping[str, Any], columns: int, **look: Any) -> None:
    """The heading of a figure of panels, and below them one legend (text -> line) in at most `columns` columns."""
    figure.suptitle(heading, fontsize=11.5)
    columns = min(columns, len(known))
    figure.legend(list(known.values()), list(known), loc="outside lower center", ncols=columns, frameon=False, **look)


def _heat_map(
    axes: Axes, table: Array, colors: str, norm: Normalize, text: Callable[[int, int], str], size: float = 9
) -> Any:
    """A heat map of `table` with a text in each cell (row, column); NaN is left grey, without a text."""
    from matplotlib import colormaps

    scale = colormaps[colors].with_extremes(bad="#F0F0F0")
    image = axes.imshow(np.ma.masked_invalid(table), cmap=scale, norm=norm, aspect="auto")
    for row, column in zip(*np.nonzero(np.isfinite(table)), strict=True):
        ink = _ink(scale(norm(float(table[row, column]))))
        axes.text(column, row, text(row, column), ha="center", va="center", fontsize=size, color=ink)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def _color_bar(figure: Figure, image: Any, axes: Axes | list[Axes], label: str, **look: Any) -> None:
    bar = figure.colorbar(image, ax=axes, **look)
    bar.set_label(label)
    bar.outline.set_visible(False)


def r_matrix(matrix: Array, names: Sequence[str], metrics: Sequence[str], bwt: Sequence[float]) -> Figure:
    """R[j, i], the test metric of task i after training task j, with backward transfer below.

    Args:
        matrix: [M, M]; NaN where a task is not trained yet. Color is the change in percent since the task was learned.
        names, metrics: of the M tasks (each column has its own metric).
        bwt: M values in percent (100 (R[M,i] - R[i,i]) / R[i,i]); NaN where it is not defined.
    """
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.patches import Rectangle

    count = len(names)
    learned = np.diag(matrix)
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.where(np.abs(learned) > 0, 100 * (matrix - learned) / learned, np.nan)
    finite = np.abs(change[np.isfinite(change)])
    limit = max(1.0, float(finite.max()) if finite.size else 1.0)
    with style():
        cell_w, cell_h = 1.12, 0.62
        figure = new_figure(max(cell_w * count + 3.1, 5.4), cell_h * (count + 1) + 1.9)
        body, foot = figure.subplots(2, 1, height_ratios=[count, 1])
        norm = TwoSlopeNorm(0.0, -limit, limit)
        lower = np.tril(np.ones((count, count), dtype=bool)) & np.isfinite(matrix)

        def result(row: int, column: int) -> str:
            changed = row > column and np.isfinite(change[row, column])
            return f"{matrix[row, column]:.4f}" + (f"\n{_percent(change[row, column], 1)}" if changed else "")

        shown = np.where(lower, np.nan_to_num(change, nan=0.0, posinf=0.0, neginf=0.0), np.nan)
        image = _heat_map(body, shown, "RdBu", norm, result)
        for task in np.flatnonzero(np.diag(lower)):
            body.add_patch(Rectangle((task - 0.47, task - 0.46), 0.94, 0.92, fill=False, lw=1.4, ec="#222222"))
        body.set_yticks(range(count), [f"T{i + 1}" for i in range(count)])
        body.set_ylabel("after training task")
        body.xaxis.tick_top()
        labels = [f"T{i + 1}\n{_wrap(names[i])}\n({metrics[i]})" for i in range(count)]
        body.set_xticks(range(count), labels)
        body.set_title("Test metric R of each task (columns) after each training (rows)", pad=10)
        _heat_map(foot, np.asarray([bwt], dtype=float), "RdBu", norm, lambda _, column: _percent(bwt[column], 2))
        for column in np.flatnonzero(~np.isfinite(bwt)):
            foot.text(column, 0, "–", ha="center", va="center", color="#666666", fontsize=9)
        foot.set_yticks([0], ["BWT"])
        foot.set_xticks([])
        if count > 1:
            _color_bar(figure, image, [body, foot], "change since the task was learned (%)", aspect=25, pad=0.02)
    return figure


def _mask_map(axes: Axes, cosines: Array, digits: int, size: float) -> tuple[Any, str, str]:
    """A heat map of cosines on a scale that spans at least 0.1; if all are close to 1, of 1 - cosine on a log scale, since
    trained masks often differ by less than 0.001.

    Returns:
        The image, its title and the label of its color bar.
    """
    from matplotlib.colors import LogNorm, Normalize

    def cosine(row: int, column: int) -> str:
        # Truncated, so that only equal masks show as 1; no leading zero, so that 448 cells stay readable.
        cut = math.floor((cosines[row, column] + 1e-6) * 10**digits) / 10**digits
        return f"{cut:.{digits}f}".replace("0.", ".", 1).replace("-", "−")

    low, high = float(np.nanmin(cosines)), float(np.nanmax(cosines))
    if low < NEARLY_EQUAL:
        high = min(1.0, math.ceil(high * 20) / 20)
        norm = Normalize(min(math.floor(low * 20) / 20, high - 0.1), high)
        return _heat_map(axes, cosines, "cividis", norm, cosine, size), "Similarity of the task masks", "cosine"

    def distance(row: int, column: int) -> str:
        mantissa, exponent = f"{far[row, column]:.{digits - 2}e}".split("e")
        return f"{mantissa}e{int(exponent)}" if far[row, column] > SMALLEST else f"<{SMALLEST:.0e}".replace("e-0", "e-")

    far = np.maximum(1 - cosines, SMALLEST)
    high = max(float(np.nanmax(far)), 10 * SMALLEST)
    log = LogNorm(min(float(np.nanmin(far)), high / 10), high)
    return _heat_map(axes, far, "cividis_r", log, distance, size), "Distance of the task masks", "1 − cosine"


def similarity(pairs: Mapping[tuple[int, int], Array], names: Sequence[str]) -> Figure | None:
    """Cosine similarity of the tasks' masks, mean over the sites, one cell per pair of tasks.

    Args:
        pairs: (i, j) with i > j, tasks from 1 -> [S] cosines, one per mask site in network order.
    """
    count = len(names)
    if count < 2 or not pairs:
        return None
    table = np.full((count - 1, count - 1), np.nan)
    for (i, j), values in pairs.items():
        table[i - 2, j - 1] = float(np.mean(values))
    with style():
        figure = new_figure(0.92 * (count - 1) + 3.6, 0.55 * (count - 1) + 2.0)
        axes = figure.subplots()
        image, title, label = _mask_map(axes, table, 3, 9.5)
        axes.set_xticks(range(count - 1), [f"T{i + 1}\n{_wrap(names[i], 11)}" for i in range(count - 1)])
        axes.set_yticks(range(count - 1), [f"T{i + 1} {_wrap(names[i], 16)}" for i in range(1, count)])
        axes.set_title(f"{title}\n({label}, mean over mask sites)")
        _color_bar(figure, image, axes, label, shrink=0.9, aspect=18, pad=0.03)
    return figure


def similarity_by_layer(pairs: Mapping[tuple[int, int], Array], names: Sequence[str]) -> Figure | None:
    """Cosine similarity of the tasks' masks, one row per pair of tasks, one column per mask site.

    Args:
        pairs: as in `similarity`. Sites 2k and 2k+1 are the two masks of residual block k.
    """
    if not pairs:
        return None
    keys = sorted(pairs)
    table = np.stack([np.asarray(pairs[key], dtype=float) for key in keys])
    sites = table.shape[1]
    with style():
        figure = new_figure(0.43 * sites + 2.6, 0.28 * len(keys) + 1.5)
        axes = figure.subplots()
        image, title, label = _mask_map(axes, table, 2, 7.5)
        axes.set_yticks(range(len(keys)), [f"T{i} – T{j}" for i, j in keys])
        axes.set_xticks(range(sites), [f"{site // 2 + 1}{'ab'[site % 2]}" for site in range(sites)])
        sites_of = "mask site (residual block; a, b: its first, second convolution)"
        axes.set(title=f"{title} by layer ({label})", xlabel=sites_of, ylabel="pair of tasks")
        # A line between the newer tasks of the pairs helps the eye.
        for row in range(1, len(keys)):
            if keys[row][0] != keys[row - 1][0]:
                axes.axhline(row - 0.5, color="white", lw=2.5)
        few = len(keys) < 6
        _color_bar(figure, image, axes, label, shrink=1.0 if few else 0.6, aspect=8 if few else 20, pad=0.02)
    return figure


def _log_ticks(bottom: float, top: float) -> list[float]:
    """Round values between the limits of a logarithmic axis, as coarse as possible, but at least three."""
    ticks: list[float] = []
    for digits in ((1, 3), (1, 2, 3, 5), range(1, 10), np.arange(1, 10, 0.5), np.arange(1, 10, 0.1)):
        ticks = [float(d) * 10.0**power for power in range(-6, 1) for d in digits if bottom <= d * 10.0**power <= top]
        if len(ticks) >= 3:
            break
    return ticks


def rho_over_training(
    rho: Mapping[int, tuple[Array, Array]], names: Sequence[str], c: Mapping[int, float]
) -> Figure | None:
    """Sampling ratio rho of each past task over the steps of each later task (Eq. 15), on a logarithmic axis.

    Args:
        rho: task i (from 2) -> (steps [n], rho [n, i-1]). Step 0, where rho is preset, is left out.
        c: scale of Eq. 15 of each task; the dotted line is the lower bound of rho, 1 - sigmoid(c).
    """
    measured = {task: (steps[steps > 0], values[steps > 0]) for task, (steps, values) in sorted(rho.items())}
    tasks = [task for task, (steps, _) in measured.items() if len(steps)]
    if not tasks:
        return None
    from matplotlib.ticker import FixedLocator, NullLocator

    floors = {task: 1 / (1 + math.exp(c[task])) for task in tasks}
    low = min(floors.values())
    top = max(0.015, *(1.3 * float(measured[task][1].max()) for task in tasks))
    bottom = low * (low / top) ** 0.13
    with style():
        figure, cells = panels(len(tasks))
        known: dict[str, Any] = {}
        for axes, task in zip(cells, tasks, strict=True):
            steps, values = measured[task]
            width = 1.6 if values.shape[1] < 5 else 1.2
            for past in range(values.shape[1]):
                marker = MARKERS[past % 8] if len(steps) < 15 else None
                x, y = _thin(steps, values[:, past])
                (line,) = axes.plot(x, y, color=COLORS[past % 8], ls=LINES[past % 8], lw=width, marker=marker, ms=4)
                known.setdefault(_title(past + 1, names[past], 26), line)
            axes.axhline(floors[task], color="#777777", lw=0.9, ls=":")
            axes.set(yscale="log", ylim=(bottom, top), xlim=(0, 1.02 * float(steps[-1])))
            axes.yaxis.set_major_locator(FixedLocator(_log_ticks(bottom, top)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_locator(NullLocator())
            title = f"while training {_title(task, names[task - 1], 22)}"
            axes.set(title=title, xlabel="step of the task", ylabel="sampling ratio ρ")
        floor = floors[tasks[0]]
        cells[0].annotate(
            f"smallest possible: {floor:.5f}", (0.98, floor), xycoords=("axes fraction", "data"), xytext=(0, -3),
            textcoords="offset points", ha="right", va="top", fontsize=7.5, color="#555555",
        )  # fmt: skip
        heading = "Share of each batch drawn to retain each past task\n(from the second step on)"
        _legend(figure, heading, known, 4, title="past task")
    return figure


@dataclass(frozen=True)
class LearningCurve:
    """Validations of one task, one an epoch: `values` [n] of its metric, `best` [n] so far in its phase, `phases` [n]."""

    values: Array
    best: NDArray[np.bool_]
    phases: Sequence[str]


def learning_curves(
    valid: Mapping[int, LearningCurve], names: Sequence[str], metrics: Sequence[str]
) -> Figure | None:
    """Validation metric of each task after each epoch, a line for each phase, the kept (best) epoch marked.

    Args:
        valid: by task, from 1.
        metrics: name of each task's metric.
    """
    tasks = [task for task in sorted(valid) if len(valid[task].values)]
    if not tasks:
        return None
    from matplotlib.ticker import MaxNLocator

    known: dict[str, Any] = {}
    several = any(len(set(valid[task].phases)) > 1 for task in tasks)
    with style():
        figure, cells = panels(len(tasks))
        for axes, task in zip(cells, tasks, strict=True):
            curve = valid[task]
            phases, epochs = np.asarray(curve.phases), np.arange(1, len(curve.values) + 1)
            for number, phase in enumerate(dict.fromkeys(curve.phases)):
                own = phases == phase
                color = COLORS[2 * number % 8]
                (line,) = axes.plot(epochs[own], curve.values[own], color=color, marker="o", ms=4, lw=1.6)
                known.setdefault(f"phase {phase}" if several else "after each epoch", line)
                kept = np.flatnonzero(own & curve.best)[-1:]
                if len(kept):
                    x, y = float(epochs[kept[0]]), float(curve.values[kept[0]])
                    (star,) = axes.plot(x, y, ls="none", marker="*", ms=13, color=COLORS[1], mec="white")
            if curve.best.any():
                known.setdefault("kept: best by the selection metric of the run", star)
                axes.annotate(
                    f"{y:.4f}", (x, y), xytext=(0, 9),
                    textcoords="offset points", ha="center", fontsize=8.5, color=COLORS[1],
                )  # fmt: skip
            metric = f"validation {metrics[task - 1]}"
            axes.set(title=_title(task, names[task - 1], 30), xlabel="epoch", ylabel=metric)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.margins(x=0.12, y=0.25)
            if len(epochs) == 1:
                axes.set_xlim(0, 2)
        _legend(figure, "Learning curves", known, 3)
    return figure


@dataclass(frozen=True)
class LossCurves:
    """Losses of one task by name: `losses` [n] as logged at `step`, and `means` [e] over each epoch, which ends at
    `epoch_step`."""

    step: Array
    losses: Mapping[str, Array]
    epoch_step: Array
    means: Mapping[str, Array]


LOSS_NAMES = {
    "loss": "loss",
    "class_loss": "class loss (cross-entropy)",
    "retention_loss": "retention loss (mean squared error)",
    "first_task_loss": "loss of task 1",
}


def losses(curves: Mapping[int, LossCurves], names: Sequence[str]) -> Figure | None:
    """Training losses of each task over its steps: thin lines as logged; thick lines a moving mean, or the means over the
    epochs where few steps were logged.

    Args:
        curves: by task, from 1.
    """
    tasks = [task for task in sorted(curves) if len(curves[task].step)]
    if not tasks:
        return None
    order = list(dict.fromkeys(name for task in tasks for name in curves[task].losses))
    known: dict[str, Any] = {}
    with style():
        figure, cells = panels(len(tasks))
        for axes, task in zip(cells, tasks, strict=True):
            curve = curves[task]
            few_steps = len(curve.step) < 10 * len(curve.epoch_step)
            for name, logged in curve.losses.items():
                color, dash = COLORS[order.index(name) % 8], LINES[order.index(name) % 8]
                x, y = _thin(curve.step, logged)
                axes.plot(x, y, color=color, lw=0.7, alpha=0.35)
                by_epoch = few_steps and name in curve.means
                x, y = (curve.epoch_step, curve.means[name]) if by_epoch else (x, _smooth(y))
                marker = "o" if by_epoch and len(x) < 15 else None
                (line,) = axes.plot(x, y, color=color, ls=dash, lw=1.8, marker=marker, ms=4)
                known.setdefault(LOSS_NAMES.get(name, name.replace("_", " ")), line)
            several = len(curve.losses) > 1
            if several:
                # At the first steps all masks are nearly 1/2 and the teacher is matched exactly: not worth ten decades.
                axes.set_yscale("log")
                low, high = axes.get_ylim()
                axes.set_ylim(max(low, 1e-5 * high), high)
            loss = "loss (log scale)" if several else "cross-entropy (nats)" if "class_loss" in curve.losses else "loss"
            axes.set(title=_title(task, names[task - 1], 30), xlabel="step of the task", ylabel=loss)
            axes.margins(x=0.02)
        _legend(figure, "Training losses", known, 3)
    return figure
