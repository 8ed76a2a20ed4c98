"""The scripts of the bench work, count operations rightly, and their cases compute the same thing on every side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from triton_here import require_triton

from bench import adam, gpu, heads, methods, network, record, scaling, steps
from bench.bench_network import ReplayClock
from bench.harness import CPU, Measured, Operations, Side, measure
from bench.heads import CrossEntropy, Rank
from bench.network import Forward, LaterStep
from bench.shapes import TINY, TTL
from teracon_fast.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent.parent


def run(tmp_path: Path, *command: str) -> tuple[str, dict[str, Any]]:
    """Run a script; what it printed and its record."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = ["--quick", "--results", str(tmp_path / "kept")]
    done = subprocess.run([sys.executable, "-m", *command, *options], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(next((tmp_path / "kept").glob("*.json")).read_text())
    assert {"date", "machine", "versions", "backend", "rounds", "peaks", "rows"} <= set(found) and found["failed"] == []
    assert found["versions"]["torch"] == torch.__version__ and found["machine"]["threads"] == 1
    assert "these times mean nothing" in done.stdout and found["rounds"] == 1
    return done.stdout, found


def test_the_suite(tmp_path: Path) -> None:
    said, found = run(tmp_path, "pytest", "bench", "-p", "no:cacheprovider")
    sides = len(network.ON_CPU)
    assert f"{4 * sides - 3} passed, 3 skipped" in said, "evaluation is fp32"
    assert {row["case"] for row in found["rows"]} == {"forward", "t3-step", "t1-step", "evaluate"} and found["kind"] == "network"
    assert all(row["median_seconds"] > 0 for row in found["rows"]) and len(found["rows"]) == 4 * sides - 3
    assert "| x eager | x best of PyTorch | which is |" in said


def test_scaling(tmp_path: Path) -> None:
    said, found = run(tmp_path, "bench.scaling")
    assert [row["side"] for row in found["rows"] if row["case"] == "length"] == ["6", "12", "20", "40"] * 2
    assert [row["side"] for row in found["rows"] if row["case"] == "past tasks"] == list("12345678")
    base = {row["title"]: row for row in found["rows"] if row["time_times_base"] == 1 == row["useful_times_base"]}
    for row in found["rows"]:
        cost, other = (of["median_seconds"] / of["useful_gflop"] for of in (row, base[row["title"]]))
        assert row["cost_times_base"] == pytest.approx(cost / other)
    assert said.count("A useful operation takes ") == 5 and next((tmp_path / "kept").glob("*.png")).stat().st_size > 20_000


def test_large_catalogues(tmp_path: Path) -> None:
    """One part of each kind; the others have the same cases at other sizes."""
    said, found = run(tmp_path, "bench.heads", "--only", "step", "--only", "growth")
    assert {row["side"] for row in found["rows"]} == {*heads.GROWTH} and found["kind"] == "large-catalogues"
    assert all(row.get("median_seconds", 1) > 0 and row["peak_mib"] is not None for row in found["rows"] if "problem" not in row)
    assert next((tmp_path / "kept").glob("*.png")).stat().st_size > 20_000 and "training step of task 1, B=6, 900 items" in said


def test_methods(tmp_path: Path) -> None:
    said, found = run(tmp_path, "bench.methods", "--only", "sinmo", "--only", "conure", "--compile")
    assert {row["side"] for row in found["rows"]} == {"eager", "compile", "ours"} and "### conure pre-activation task 2" in said
    assert all(row["times_best"] >= 0 and row["best"] in ("eager", "compile") for row in found["rows"] if row["side"] == "ours")


def test_adam(tmp_path: Path) -> None:
    _, found = run(tmp_path, "bench.adam", "--users", "3")
    assert [row["largest_error"] for row in found["rows"]] == [0, 0] and found["rows"][1]["times_eager"] > 0


def test_gpu_without_one(tmp_path: Path) -> None:
    said, found = run(tmp_path, "bench.gpu", "--device", "cpu")
    assert "self-test on the CPU" in said and found["kind"] == "gpu-cpu" and found["device"]["name"] == "cpu"
    assert {row["case"] for row in found["rows"]} >= {"t3-step", "embed", "embed-large", "t1-step-large", "masked-conv", "adam"}
    unmeasured = [row["side"] for row in found["rows"] if "problem" in row]
    assert unmeasured == ["ours-bf16-kernels"] and {"copy", "bf16", "fp32"} <= set(found["peaks"])
    assert all(row["times_floor"] > 0 for row in found["rows"] if row["case"] == "embed")


def test_refuses_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert gpu.main([]) == 2 and gpu.main(["--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("no GPU: torch") and "TORCH=torch" in said and "it needs --quick" in said
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def no_driver() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check")

    monkeypatch.setattr(torch.cuda, "init", no_driver)
    assert gpu.refusal() == "no GPU: RuntimeError: Found no NVIDIA driver on your system."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu.refusal() is None


def test_tests_of_gpus_are_those_of_kernels_and_their_last_line_is_kept(tmp_path: Path) -> None:
    chosen = gpu.tests_of_gpus()
    assert "tests/ops/test_triton_backend.py" in chosen and "tests/kernels/test_triton_linear_rank.py" in chosen
    assert not any("compiles" in path or "bench" in path or "tune" in path for path in chosen)
    (tmp_path / "test_two.py").write_text("def test_good(): pass\ndef test_bad(): assert False\n")
    found = gpu.run_tests([str(tmp_path), "-p", "no:cacheprovider", "--rootdir", str(tmp_path)])
    assert found["status"] == 1 and found["last_line"].startswith("1 failed, 1 passed")


@pytest.mark.parametrize("main", [scaling.main, heads.main, methods.main, adam.main])
def test_bad_rounds_are_refused(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--quick", "--rounds", "0"])
    assert "--rounds: got 0, expected at least 1" in capsys.readouterr().err


def reachable_outputs(lengths: np.ndarray, length: int) -> int:
    """Convolution outputs that the last positions depend on, by marking them one by one; pad states once for all users."""
    needed: set[tuple[int, int, int]] = set()  # (convolution, user or -1 for a pad state, position)
    for user, real in enumerate(lengths):
        layer = {length - 1}
        for depth, dilation in reversed(list(enumerate(d * k for d in TINY.dilations for k in (1, 2)))):
            # The residual connection reads its block's input at the same position, so the set only grows.
            needed |= {(depth, user if position >= length - real else -1, position) for position in layer}
            layer |= {position - tap * dilation for position in layer for tap in range(TINY.kernel_size)}
            layer = {position for position in layer if position >= 0}
    return len(needed)


def test_useful_operations_are_those_that_marking_every_needed_output_finds() -> None:
    lengths = TINY.lengths(TINY.batch)
    counted = TINY.encoder(TINY.pack(lengths), TINY.batch * TINY.length)
    per_output = 2 * TINY.kernel_size * TINY.channels**2
    # The packer keeps a user's own copy of a pad state where no chain holds it: never fewer than needed, and hardly more.
    exact = reachable_outputs(lengths, TINY.length)
    assert exact <= counted.useful / per_output <= 1.02 * exact
    assert counted.dense == per_output * TINY.batch * TINY.length * 2 * len(TINY.dilations)


def test_training_costs_three_passes_of_the_student_and_one_of_the_teacher() -> None:
    case, head = LaterStep(TINY), 2 * TINY.channels
    positions = TINY.batch * TINY.length + case.past_users * (2 * TINY.length - 1)
    per_position = 2 * TINY.kernel_size * TINY.channels**2 * 2 * len(TINY.dilations)
    past_heads = case.past_users * (TINY.labels[0] + TINY.labels[1]) * head
    student = positions * per_position + past_heads + TINY.batch * TINY.labels[2] * head
    teacher = case.past_users * (2 * TINY.length - 1) * per_position + past_heads
    assert case.operations("ours").dense == 3 * student + teacher
    whole, frozen = (methods.MethodStep(TINY, name, 1).operations("ours") for name in ("sinmo", "peterrec"))
    head_of = TINY.head(TINY.batch, TINY.labels[1]).useful * 3
    assert frozen.useful - head_of == pytest.approx((whole.useful - head_of) * 2 / 3)
    first = methods.MethodStep(TINY, "sinmo", 0).operations("ours")
    assert methods.MethodStep(TINY, "mtl", 1).operations("ours").useful == first.useful + whole.useful


def test_bytes_of_a_pass_are_those_of_its_tensors() -> None:
    case = network.Convolutions(TINY, CPU, "torch")
    model, packed = case.fast(3, "torch"), case.packed()
    states = [model.embeding.rows(TINY.items(case.users).reshape(-1)[packed.cells])]
    with torch.no_grad():
        states += list(model.layers(states[0], model.masks(25.0)[:, [2, 0, 1]], packed))
    sizes = [state.bfloat16().nbytes for state in states]
    assert case.moved_bytes("ours") == sum(sizes[:-1]) + sum(sizes[1:]) + sum(sizes[2::2])
    assert TINY.encoder_bytes(packed) == case.moved_bytes("ours") + sizes[0] + states[0].nbytes


def test_the_full_sizes_are_those_that_were_asked_for() -> None:
    assert (TTL.length, TTL.channels, len(TTL.dilations), TTL.labels, TTL.batch, TTL.first_batch) == (
        *(100, 256, 8, (20_000, 2_000, 8), 256, 32),
    )  # fmt: skip
    lengths = (TTL.items(20) != 0).sum(1).tolist()
    assert lengths == [46, 12, 100, 43, 100, 27, 100, 100, 37, 62, 26, 90, 30, 21, 45, 13, 13, 49, 20, 14]
    operations = Forward(TTL).operations("ours")
    assert 2.9 < operations.dense / operations.useful < 3.4  # what the project's design counts for these lengths and this cone
    assert (gpu.FULL.labels, gpu.FULL.batch, gpu.FULL.first_batch) == ((646_000, 17_880, 8), 1024, 32)
    curves = {(curve.name, curve.call): curve for curve in scaling.curves(TTL)}
    assert curves["length", "forward"].sides == ("30", "60", "100", "200")
    assert curves["batch", "training step of task 3"].sides == ("64", "128", "256", "512")
    assert heads.FULL.growth[-1] == 1_000_000 and 26 in heads.FULL.retained and heads.FULL.catalogue == 646_000


def agree(case: Any) -> Measured:
    """Measure once; every side's answer is the first one's."""
    found = measure(case, 1, 0.01, peaks={})
    assert not any(side.failed for side in found.sides.values())
    assert all(max(side.errors.values(), default=0) < 1e-4 for name, side in found.sides.items() if "bf16" not in name)
    return found


def test_steps_with_any_number_of_past_tasks_are_those_of_the_reference() -> None:
    for past in (1, 4):
        case = LaterStep(TINY, past=past, compiled=False)
        assert case.shape.task_labels(past + 1) == [60, 30, 8, 8, 8][: past + 1]
        assert set(agree(case).sides["ours"].errors) == {"loss", "retention", "rho"}
    assert set(steps.NAMES) == set(METHODS) - {"teracon", "parameter_masks"}


def test_every_method_trains_as_its_eager_form_does() -> None:
    for case in methods.cases(TINY, ("eager", "ours")):
        agree(case)
        step = case.side("ours").run
        losses = [float(step()["loss"]) for _ in range(3)]
        assert losses[0] > losses[-1], f"{case.title}: a step does not train"


@pytest.mark.parametrize("part", ["compared", "large"])
def test_every_side_of_a_head_computes_the_same(part: str) -> None:
    for case in heads.cases(part, heads.QUICK, TINY):
        found = agree(case)
        left_out = {name for name, side in found.sides.items() if side.problem}
        assert left_out <= ({"fused", "fused-384", "fused-1056"} if not hasattr(F, "linear_cross_entropy") else set())


def test_merged_rows_stand_for_the_positions_that_share_them() -> None:
    case = CrossEntropy(heads.QUICK, 50, ("eager",), 6)
    lengths = [9, 2, 20, 8, 20, 5]  # of sequences of 20: the example lengths, a fifth
    own, row_of = sum(length - 1 for length in lengths), case.row_of()
    assert case.rows_of("ours") == 6 * 19 and case.rows_of("ours-merged") == own + 18
    by_sequence = row_of.view(6, 19)
    for length, rows in zip(lengths, by_sequence, strict=True):
        assert rows[: 19 - (length - 1)].tolist() == list(range(19 - (length - 1)))
    real = torch.cat([rows[19 - (length - 1) :] for length, rows in zip(lengths, by_sequence, strict=True)])
    assert real.tolist() == list(range(18, 18 + own))
    assert case.operations("ours-merged").useful == 2 * 3 * (own + 18) * 50 * 16


def test_heads_that_take_too_much_memory_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "LIMIT_BYTES", 12.0 * 57 * 60)
    found = measure(CrossEntropy(heads.QUICK, 100, ("eager", "ours"), 3), 1, 0.01, peaks={})
    assert "would take about" in str(found.sides["eager"].problem) and found.sides["ours"].seconds
    assert {len(rank.unique()) > 3 for rank in Rank(heads.QUICK, 900, heads.RANK, 32).side("eager").run().values()} == {True}


def test_on_a_gpu_steps_are_replayed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made for a GPU is made here, but for the graphs themselves."""
    assert "ours-bf16-graphs" in LaterStep(TINY, torch.device("cuda"), "triton").sides
    replayed: list[int] = []
    monkeypatch.setattr(steps.Teracon, "enable_graphs", lambda method: replayed.append(method.task))
    for case in (network.FirstStep(TINY, CPU, "torch"), LaterStep(TINY, CPU, "torch")):
        for side in ("ours-bf16-graphs", "ours-bf16"):
            case.side(side).run()
    assert replayed == [0, 2]


SMALL = heads.Sizes(16, 8, 2, 40, 40, (2, 5), 4, (), 2)


def test_cases_of_a_gpu_in_tritons_interpreter() -> None:
    require_triton()
    if torch.cuda.is_available():
        pytest.skip("kernels are not interpreted where there is a GPU")
    shape = replace(TINY, batch=2, first_batch=2, length=6, dilations=(1,), labels=(20, 10, 4))
    kinds = [network.Convolutions, LaterStep]
    cases: list[Any] = [kind(shape, CPU, "triton", False) for kind in kinds] + heads.on_gpu(SMALL, CPU, "triton")
    for case in cases:
        found = measure(case, 1, 1e-9, one_by_one=True, peaks={})
        problems = {name: side.problem for name, side in found.sides.items() if side.problem}
        assert set(problems) <= {"ours-bf16-kernels"}, problems


def test_figures_of_a_curve_follow_from_the_medians() -> None:
    def of(times: list[float], operations: list[float]) -> tuple[dict[str, dict[str, float]], Any]:
        sides = {str(n): Side(Operations(o, o), seconds=[t]) for n, (t, o) in enumerate(zip(times, operations, strict=True), 1)}
        return scaling.relative(Measured("", "", 0, sides, {}), "1"), SimpleNamespace(base="1", name="past tasks")

    rows, _ = of([1.0, 4.0, 16.0], [3e9, 6e9, 12e9])
    assert [row["cost_times_base"] for row in rows.values()] == [1, 2, 4]
    said = scaling.statement(*of([1.0, 1.2, 1.4], [10e9, 11e9, 12e9]))
    assert "1.00 to 1.17 of its time at 1;" in said and "adds 10.0% of the base's operations and 20.0%" in said
    assert "to the power 2.00" in scaling.statement(*of([1.0, 4.0, 16.0], [3e9, 6e9, 12e9]))


def test_tables_leave_out_columns_without_values() -> None:
    rows = [{"side": "ours", "median_seconds": 1.5, "share_of_peak": 0.33, "peak_mib": 1500.0}, {"side": "b", "problem": "why"}]
    assert record.table("a title", rows) == [
        "### a title", "", "| side | median | of peak | peak memory | not measured |", "| --- | ---: | ---: | ---: | ---: |",
        "| ours | 1.50 s | 33% | 1,500 MiB |  |", "| b |  |  |  | why |",
    ]  # fmt: skip
    assert [record.duration(seconds) for seconds in (2e-6, 0.25, 1234.5)] == ["2.0 µs", "250.0 ms", "1,234.50 s"]


def test_failures_are_part_of_the_exit_status_and_of_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = record.Report("kind", SimpleNamespace(results=tmp_path / "new", rounds=3))
    report.add(Measured("a", "a case", 0, {"ours": Side(problem="a defect", failed=True)}, {"fp32": 1e9}))
    assert report.close(shape=TINY) == 1 and "FAILED: a case, ours: a defect" in capsys.readouterr().out
    assert report.path is not None and report.path.name.endswith("-kind.json")
    found = json.loads(report.path.read_text())
    assert found["failed"] == ["a case, ours: a defect"] and found["shape"]["batch"] == TINY.batch


def test_replay_clock_gives_back_the_durations() -> None:
    clock = ReplayClock()
    clock.durations = [2.0, 0.5]
    readings = [clock() for _ in range(4)]
    assert [readings[1] - readings[0], readings[3] - readings[2]] == [2.0, 0.5] and readings[2] == readings[1]
