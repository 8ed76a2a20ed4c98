"""The report: what is read from a run folder, what the tables say, and plots without overlapping or clipped text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from synthetic_run import NAMES, write_run, write_run_of

from teracon_fast.errors import DataError, TeraconError
from teracon_fast.report import plots
from teracon_fast.report.run_report import draw, load_run, markdown, method_rows, summary_rows, task_rows, write_report


def test_matrix_bwt_and_similarity_are_those_of_the_files(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 4, epochs=2, steps=5)
    results = json.loads((run / "results.json").read_text())
    record = load_run(run)
    assert record.names == NAMES[:4] and record.metrics == results["metric"]
    assert record.matrix[2, 1] == results["R"][2][1]
    assert np.isnan(record.matrix[1, 2])
    np.testing.assert_allclose(record.bwt[:3], results["bwt"][:3], rtol=1e-12)
    assert np.isnan(record.bwt[3])
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    np.testing.assert_array_equal(record.pairs[4, 2], np.asarray(last["similarity"])[:, 3, 1])
    assert sorted(record.pairs) == [(2, 1), (3, 1), (3, 2), (4, 1), (4, 2), (4, 3)]


def test_unfinished_run_gives_the_rows_it_has(tmp_path: Path) -> None:
    whole = load_run(write_run(tmp_path / "whole", 3, epochs=2, steps=5))
    run = write_run(tmp_path / "part", 3, epochs=2, steps=5)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    ends = [index for index, line in enumerate(lines) if "task_end" in line]
    # Killed in the middle of writing a step of task 3.
    (run / "metrics.jsonl").write_text("".join(lines[: ends[1] + 4]) + lines[ends[1] + 4][:30])
    record = load_run(run)
    assert record.method == "teracon" and record.c == {2: 5.0, 3: 5.0}
    np.testing.assert_array_equal(record.matrix[:2], whole.matrix[:2])
    assert np.isnan(record.matrix[2]).all()
    expected = 100 * (record.matrix[1, 0] - record.matrix[0, 0]) / record.matrix[0, 0]
    assert record.bwt[0] == pytest.approx(expected)
    assert [event["step"] for event in record.logs[3].steps] == [0, 1, 2]
    assert "| T2 |" in markdown(record, []) and "| T3 |" not in markdown(record, [])


def test_bad_lines_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 2, epochs=1, steps=3)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([*lines[:2], "{oops\n", *lines[2:]]))
    with pytest.raises(DataError, match=r"metrics.jsonl:3: .*not JSON"):
        load_run(run)
    (run / "metrics.jsonl").write_text("".join([lines[0], "[1, 2]\n"]))
    with pytest.raises(DataError, match=r"metrics.jsonl:2: .*\"event\" and \"task\""):
        load_run(run)
    with pytest.raises(TeraconError, match="no such run folder"):
        load_run(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TeraconError, match=r"no config\.toml"):
        load_run(tmp_path / "empty")
    with pytest.raises(TeraconError, match="'bmp'"):
        write_report(run, "bmp")


def test_tables(tmp_path: Path) -> None:
    record = load_run(write_run(tmp_path / "run", 3, epochs=2, steps=5))
    heading, rows = summary_rows(record)
    assert heading == ["after training", "T1 next item", "T2 clicks", "T3 purchases of four stars"]
    assert rows[0] == ["metric", "MRR@5", "MRR@5", "MRR@5"]
    assert rows[2] == ["T2", f"{record.matrix[1, 0]:.4f}", f"{record.matrix[1, 1]:.4f}", ""]
    assert rows[-1] == ["BWT (%)", f"{record.bwt[0]:+.2f}", f"{record.bwt[1]:+.2f}", "–"]
    _, training = task_rows(record)
    assert training[0][:5] == ["T1 next item", "2", "10", "61.5", "904"]
    assert training[2][5].count(",") == 1


def require_legible(figures: dict[str, Figure]) -> None:
    """No text of a plot is clipped, and none overlaps another."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    for name, figure in figures.items():
        with plots.style():
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
        renderer = canvas.get_renderer()
        page = figure.bbox
        boxes = []
        undrawn = set()  # tick labels outside the shown range are kept by matplotlib but not drawn
        for axis in [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]:
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            labels = [(tick.get_loc(), label) for tick in ticks for label in (tick.label1, tick.label2)]
            undrawn |= {label for place, label in labels if not low <= place <= high}
        for text in figure.findobj(Text):
            assert isinstance(text, Text)
            box = text.get_window_extent(renderer)
            if text.get_text().strip() and text.get_visible() and box.width > 0 and text not in undrawn:
                assert box.x0 >= page.x0 - 1 and box.x1 <= page.x1 + 1, f"{name}: {text.get_text()!r} is clipped"
                assert box.y0 >= page.y0 - 1 and box.y1 <= page.y1 + 1, f"{name}: {text.get_text()!r} is clipped"
                boxes.append((text.get_text(), box.shrunk(0.9, 0.8)))
        assert len(boxes) > 5
        low = np.asarray([[b.x0, b.y0] for _, b in boxes])
        high = np.asarray([[b.x1, b.y1] for _, b in boxes])
        meet = np.logical_and(low[:, None] < high, low < high[:, None]).all(-1)
        np.fill_diagonal(meet, False)
        clashes = [(boxes[a][0], boxes[b][0]) for a, b in zip(*np.nonzero(meet), strict=True) if a < b]
        assert not clashes, f"{name}: {clashes}"


@pytest.mark.parametrize("tasks", [2, 8])
def test_every_plot_fits_and_no_text_overlaps(tasks: int, tmp_path: Path) -> None:
    figures = draw(load_run(write_run(tmp_path / "run", tasks, epochs=3, steps=10)))
    expected = ["r_matrix", "similarity", "similarity_by_layer", "rho", "learning_curves", "losses"]
    assert list(figures) == expected
    require_legible(figures)


@pytest.mark.parametrize(
    ("method", "losses", "numbers", "phases"),
    [
        ("sinmo", [], [], ["train"]),
        ("mtl", ["class_loss", "first_task_loss"], [], ["train"]),
        ("hat", ["class_loss", "attention_loss"], ["free_channels", "shares"], ["train"]),
        ("conure", ["class_loss"], ["free_weights", "sparsity"], ["train", "retrain"]),
    ],
)
def test_a_run_of_any_method(method: str, losses: list[str], numbers: list[str], phases: list[str], tmp_path: Path) -> None:
    record = load_run(write_run_of(method, tmp_path / method, losses, numbers, phases))
    assert record.method == method and record.c == {} and record.pairs == {}
    assert record.matrix[2].tolist() == [0.2, 0.2, 0.2] and record.bwt[:2] == [0.0, 0.0]
    figures = draw(record)
    assert list(figures) == ["r_matrix", "learning_curves", "losses"]
    require_legible(figures)
    axes = figures["learning_curves"].axes[0]
    drawn = [list(line.get_xdata()) for line in axes.lines if line.get_linestyle() != "None"]  # type: ignore[arg-type]
    assert drawn == [[1, 2], [3, 4]][: len(phases)]
    smooth = figures["losses"].axes[0].lines[1::2]
    assert len(smooth) == max(1, len(losses))
    assert list(smooth[0].get_xdata()) == [*range(20 * len(phases))]  # type: ignore[arg-type]
    heading, rows = method_rows(record)
    assert heading == ["task", *(name.replace("_", " ").replace("shares", "shares (T1, T2, ...)") for name in numbers)]
    last = "0.75" if len(phases) > 1 else "0.25"
    cells = [[", ".join(["0.5"] * i) if name == "shares" else last for name in numbers] for i in (1, 2, 3)]
    assert rows == ([[f"T{i} {NAMES[i - 1]}", *cells[i - 1]] for i in (1, 2, 3)] if numbers else [])
    page = markdown(record, [])
    assert f"Method: `{method}`." in page and "rho" not in page
    assert ("After the last epoch" in page) == bool(numbers)


def test_report_files_are_whole_and_linked(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 2, epochs=2, steps=8)
    page, *images = write_report(run)
    assert page == run / "report" / "report.md" and len(images) == 6
    text = page.read_text()
    for image in images:
        assert image.read_bytes().startswith(b"\x89PNG") and f"({image.name})" in text
    assert not list((run / "report").glob(".*"))
    page, *images = write_report(write_run(tmp_path / "one", 1, epochs=2, steps=8), "svg")
    assert [image.name for image in images] == ["r_matrix.svg", "learning_curves.svg", "losses.svg"]
    assert images[0].read_text().lstrip().startswith("<?xml")


def cells(cosines: list[float]) -> tuple[str, list[str]]:
    """Title and numbers of a similarity plot with one cell per cosine."""
    figure = plots.similarity_by_layer({(2, 1): np.asarray(cosines)}, ["a", "b"])
    assert figure is not None
    return figure.axes[0].get_title(), [text.get_text() for text in figure.axes[0].texts]


def test_similarity_numbers_do_not_overstate() -> None:
    assert cells([0.5, 0.9996, 1.0]) == ("Similarity of the task masks by layer (cosine)", [".50", ".99", "1.00"])
    assert cells([-0.25, 0.5]) == ("Similarity of the task masks by layer (cosine)", ["−.25", ".50"])
    # Masks that are all nearly the same are told apart by their distance.
    assert cells([0.99, 0.9997, 1 - 2e-8, 1 + 1e-7]) == (
        "Distance of the task masks by layer (1 − cosine)",
        ["1e-2", "3e-4", "<1e-7", "<1e-7"],
    )
    assert cells([1.0, 1.0])[1] == ["<1e-7", "<1e-7"]
    assert plots.similarity({}, ["a"]) is None


def test_losses_show_epoch_means_where_few_steps_are_logged() -> None:
    few = plots.LossCurves(
        np.asarray([0.0, 20.0]), {"class_loss": np.asarray([3.0, 2.0]), "retention_loss": np.asarray([1e-12, 0.5])},
        np.asarray([9.0, 19.0, 29.0]),
        {"class_loss": np.asarray([2.5, 2.0, 1.5]), "retention_loss": np.asarray([0.2, 0.3, 0.4])},
    )  # fmt: skip
    figure = plots.losses({2: few}, ["a", "b"])
    assert figure is not None
    axes = figure.axes[0]
    assert [line.get_ydata().tolist() for line in axes.lines[1::2]] == [[2.5, 2.0, 1.5], [0.2, 0.3, 0.4]]  # type: ignore[union-attr]
    assert 1e-5 < axes.get_ylim()[0] < 0.2 and axes.get_yscale() == "log"
