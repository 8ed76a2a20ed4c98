"""Figures 2 and 3: test metric of a task after each epoch of its training, one line per method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from teracon_fast.report.plots import COLORS, LINES, MARKERS, new_figure, panels, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]


def mean_curve(curves: Sequence[Sequence[float]]) -> tuple[Array, Array]:
    """Mean and standard deviation (n - 1; 0 for one seed) after each epoch; a seed that stopped early keeps its last value.

    Args:
        curves: one per seed, each of at least one epoch.

    Returns:
        float64 [epochs] each.
    """
    length = max(map(len, curves))
    table = np.asarray([[*curve, *[curve[-1]] * (length - len(curve))] for curve in curves], dtype=float)
    return table.mean(0), table.std(0, ddof=1) if len(table) > 1 else np.zeros(length)


def curves(tasks: Sequence[tuple[str, str, Mapping[str, Sequence[Sequence[float]]]]], title: str) -> Figure | None:
    """One panel per task, one line per method, its standard deviation over the seeds as a band. None without any curve.

    Args:
        tasks: name, metric, and for each method its curves, one per seed. Methods without curves are left out.
        title: of the figure.
    """
    drawn = [(name, metric, {label: found for label, found in of_task.items() if found}) for name, metric, of_task in tasks]
    drawn = [entry for entry in drawn if entry[2]]
    if not drawn:
        return None
    from matplotlib.ticker import MaxNLocator

    labels = list(dict.fromkeys(label for _, _, of_task in tasks for label in of_task))
    with style():
        if len(drawn) == 1:
            figure = new_figure(6.2, 4.0)
            all_axes = [figure.subplots()]
        else:
            figure, all_axes = panels(len(drawn))
        known: dict[str, Any] = {}
        for axes, (name, metric, of_task) in zip(all_axes, drawn, strict=True):
            for label, found in of_task.items():
                number = labels.index(label) % len(COLORS)
                mean, spread = mean_curve(found)
                x = np.arange(1, len(mean) + 1)
                few = MARKERS[number] if len(x) <= 20 else None
                (line,) = axes.plot(x, mean, color=COLORS[number], ls=LINES[number], marker=few, ms=4, lw=1.6)
                if len(found) > 1 and len(x) == 1:  # a band would have no width
                    axes.errorbar(x, mean, spread, color=COLORS[number], alpha=0.6, capsize=3, lw=1.2)
                elif len(found) > 1:
                    axes.fill_between(x, mean - spread, mean + spread, color=COLORS[number], alpha=0.15, lw=0)
                known.setdefault(label, line)
            axes.set_title(name)
            axes.set_xlabel("epoch")
            axes.set_ylabel(f"test {metric}")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
            axes.margins(x=0.06, y=0.12)
        figure.suptitle(title, fontsize=11.5)
        figure.legend(list(known.values()), list(known), loc="outside lower center", ncols=min(4, len(known)), frameon=False)
    return figure
