"""The bench of a GPU runs without one as a self-test, judges what it measured, and refuses where there is nothing to measure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench.cases import S_TRAINING
from bench.gpu_cases import OURS, QUICK, Convolutions, Embedding, FirstTaskStep, GpuCase, TrainingStep
from bench.gpu_measure import Found, Meter, Rates, Result
from bench.gpu_report import Equivalence, Run, bars
from bench.measure import DifferentAnswers
from bench.measure import Run as Call
from bench.operations import Operations
from bench.traffic import Traffic
from torch import Tensor
from triton_here import require_triton

from bench import gpu, gpu_cases, gpu_measure, gpu_report, heads, traffic
from teracon_fast.ops.backends import BackendError, resolve
from teracon_fast.reference import step as reference_step

CPU = torch.device("cpu")
CASES = {"t3-step", "embed", "embed-large", "t1-step", "t1-step-large", "masked-conv", "adam"}


def test_self_test_measures_every_side_of_every_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu", "--quick", "--rounds", "1", "--results", str(tmp_path / "kept")]) == 0
    told = capsys.readouterr().out
    assert "self-test on the CPU with backend 'torch': no GPU was measured" in told and "these times mean nothing" in told
    (path,) = (tmp_path / "kept").iterdir()
    assert path.name.endswith("-gpu-cpu.json")
    run = json.loads(path.read_text())
    assert run["kind"] == "gpu" and run["failed"] == [] and run["tests"] is None
    assert run["device"]["name"] == "cpu" and {"triton", "architecture"} <= set(run["device"])
    assert {"date", "machine", "versions"} <= set(run)
    assert set(run["cases"]) == CASES and set(run["heads"]) == set(gpu.head_specs(heads.QUICK))
    for result in [*run["cases"].values(), *run["heads"].values()]:
        for side in result["sides"].values():
            assert side["problem"] is None and side["median_seconds"] == statistics.median(side["seconds"]) > 0
            assert side["peak_mib"] is None, "memory of the CPU is not counted"
    assert set(run["cases"]["t3-step"]["sides"]) == {"eager", "eager-bf16", "torch", "torch-bf16", "ours-fp32", OURS}
    best = min(run["cases"]["t3-step"]["sides"][side]["median_seconds"] for side in ("eager", "eager-bf16"))
    ours = run["cases"]["t3-step"]["sides"][OURS]
    assert ours["times_eager"] == pytest.approx(best / ours["median_seconds"])
    assert run["cases"]["masked-conv"]["replayed"] == "no graphs of launches on the CPU"
    assert run["cases"]["embed-large"]["users"] == 2 * run["cases"]["embed"]["users"]
    rates = run["rates"]
    for result in run["cases"].values():
        floor = max(result["useful_gflop"] * 1e9 / rates["bf16"], sum(result["bytes"].values()) / rates["copy"])
        assert result["floor_seconds"] == pytest.approx(floor)
        assert f"### {result['title']}" in told
    assert 0 < run["kernels"]["busy"] and run["kernels"]["launches"] >= len(run["kernels"]["longest"]) > 3
    assert [bar["verdict"] for bar in run["bars"]][0] == "not measured" and len(run["bars"]) == 8
    assert all(f"| {bar['what']} | {bar['asked']} | {bar['found']} | {bar['verdict']} |" in told for bar in run["bars"])


def test_refuses_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.startswith("no GPU: torch") and "TORCH=torch" in str(gpu_report.refusal())
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def no_driver() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check")

    monkeypatch.setattr(torch.cuda, "init", no_driver)
    assert gpu_report.refusal() == "no GPU: RuntimeError: Found no NVIDIA driver on your system."
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert gpu_report.refusal() == "no GPU: PyTorch sees none"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu_report.refusal() is None


@pytest.mark.parametrize("arguments", [["--device", "cpu"], ["--device", "cpu", "--quick", "--rounds", "0"]])
def test_arguments_that_make_no_sense(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert "needs --quick" in (said := capsys.readouterr().err) or "expected at least 1" in said


RATES = Rates(bf16=700e12, tf32=400e12, fp32=50e12, copy=4e12, size=8192, copied=2**30)


def result(name: str, users: int, eager: float, ours: float, useful: float = 0.0, moved: float = 0.0) -> Result:
    """Made up: eager's half precision is slower than its TF32."""
    sides = {"eager": Found([eager]), "eager-bf16": Found([2 * eager]), OURS: Found([ours], peak_mib=2048.0)}
    return Result(name, f"a {name}", users, Operations(useful, useful), Traffic({"activations": moved}), sides)


def made_up(good: bool) -> Run:
    """A run in which everything asked for is just met, or just not."""
    worse = 1.0 if good else 1.05
    large = result("t1-step-large", 1024, 1.0, 0.2)
    conv = result("masked-conv", 1024, 1.0, 1.0, useful=0.6 * RATES.bf16 * 1e-3)
    conv.replayed = 1e-3 * worse
    if not good:
        large.sides[OURS] = Found(problem="OutOfMemoryError: CUDA out of memory")
    results = {
        "t3-step": result("t3-step", 1024, 0.030, 0.002 * worse, useful=0.0008 * RATES.bf16, moved=1.0),
        "embed": result("embed", 1024, 0.025, 0.001 * worse, moved=0.0009 * RATES.copy),
        "embed-large": result("embed-large", 8192, 1.0, 8192e-6 * worse, moved=0.007 * RATES.copy),
        "t1-step": result("t1-step", 32, 0.1, 0.01 * worse),
        "t1-step-large": large,
        "masked-conv": conv,
    }
    tests = Equivalence(0, "120 passed in 60 s", 60.0) if good else Equivalence(1, "1 failed, 119 passed", 60.0)
    return Run("on a made-up device", gpu_cases.FULL, 7, "triton", RATES, tests, results)


def test_every_bar_is_met_or_not() -> None:
    good, bad = bars(made_up(True)), bars(made_up(False))
    assert [bar.verdict for bar in good] == ["met"] * 8
    assert [bar.verdict for bar in bad] == ["NOT met"] * 8
    assert [bar.asked for bar in good] == [
        "all of these tests pass", "15 times eager at its best", "within 2.5 of the floor", "25 times eager at its best",
        "1,000,000, or the reason why not", "10 times eager at its best", "fits", "60% of the bf16 GEMM rate",
    ]  # fmt: skip
    assert good[1].found == "15.0 times eager, float32" and good[2].found == "2.50 times 800.0 µs"
    assert good[6].found == "200.0 ms, 2.0 GiB in all" and bad[6].found == "OutOfMemoryError: CUDA out of memory"
    assert good[7].found == "60%, 420 TFLOP/s useful (kernels alone)"
    lines = gpu_report.bar_lines(made_up(False))
    assert sum("| NOT met |" in line for line in lines) == 8 and "on a made-up device" in lines[0]


@pytest.mark.parametrize(("moved", "verdict"), [(0.007, "so the floor is not the reason"), (0.009, "which is the reason")])
def test_too_few_users_a_second_come_with_what_the_floor_allows(moved: float, verdict: str) -> None:
    run = made_up(True)
    run.results = {"embed-large": result("embed-large", 8192, 1.0, 0.01, moved=moved * RATES.copy)}
    bar = bars(run)[4]
    assert bar.verdict == "NOT met" and verdict in bar.found and f"{8192 / moved:,.0f}" in bar.found


def test_what_was_not_measured_is_neither_met_nor_not() -> None:
    run = Run("nowhere", QUICK, 1, "torch")
    assert {bar.verdict for bar in bars(run)} == {"not measured"}
    partial = made_up(True)
    partial.rates = None
    partial.results["masked-conv"].replayed = "cannot be captured"
    partial.results["t1-step"].sides[OURS] = Found(problem="a reason")
    assert [bar.verdict for bar in bars(partial)] == [
        "met", "met", "not measured", "met", "met", "not measured", "met", "not measured",
    ]  # fmt: skip
    assert any("a reason" in line for line in gpu_report.result_lines(partial, partial.results["t1-step"]))


def test_tables_show_floor_memory_and_kernels() -> None:
    run = made_up(True)
    run.results["t3-step"].sides["eager-bf16"].note = "batch in 2 parts"
    lines = gpu_report.result_lines(run, run.results["t3-step"])
    ours = next(line for line in lines if line.startswith("| ours, bf16"))
    assert [cell.strip() for cell in ours.split("|")[2:8]] == ["2.0 ms", "15.00", "512,000", "280", "2.50", "2,048 MiB"]
    assert any("batch in 2 parts" in line for line in lines)
    assert lines[-1].startswith("Floor, bf16: 800.0 µs = the larger of 0.56 TFLOP useful, 800.0 µs, and")
    assert "without the host's part: 1.0 ms" in gpu_report.result_lines(run, run.results["masked-conv"])[-3]
    kernels = gpu_measure.Kernels(0.002, 0.0015, 120.0, [("conv_kernel", 0.001, 32.0)])
    said = "\n".join(gpu_report.kernel_lines(kernels))
    assert "75%: the host limits" in said and "| conv_kernel | 1.0 ms | 32 |" in said
    assert "kernels limit" in gpu_report.kernel_lines(replace(kernels, busy=0.0019))[2]


def test_floor_is_the_larger_of_both() -> None:
    assert RATES.floor(7e12, 4e9) == pytest.approx(0.01) and RATES.floor(7e9, 4e12) == pytest.approx(1.0)


def test_bytes_of_a_pass_are_those_of_its_tensors() -> None:
    case = Convolutions(QUICK, CPU, "torch")
    model, packed = case.fast(3, "torch"), case.packed()
    states = [model.embeding.rows(QUICK.items(case.users).reshape(-1)[packed.cells])]
    with torch.no_grad():
        states += list(model.layers(states[0], model.masks(S_TRAINING)[:, [2, 0, 1]], packed))
    states = [state.bfloat16() for state in states]
    read, made = sum(state.nbytes for state in states[:-1]), sum(state.nbytes for state in states[1:])
    added = sum(state.nbytes for state in states[2::2])
    assert case.traffic().parts["activations"] == read + made + added
    trained = traffic.encoder(packed, QUICK.channels, 2, train=True).parts
    # Forward also rows before LayerNorm; backward: gradient, those rows, its product's twice, input, its gradient.
    assert trained["activations"] == read + 2 * made + added + 4 * made + 2 * read
    assert trained["embedding"] == states[0].nbytes + states[0].float().nbytes
    step = TrainingStep(QUICK, CPU, "torch").traffic().parts
    assert step["heads"] == 4 * QUICK.channels * (2 * (90 + 30) + 2 * 8)
    assert step["Adam, past heads"] == 24 * QUICK.channels * (90 + 30)
    layers = [layer for block in model.blocks for layer in (block.conv1, block.conv2, block.ln1, block.ln2)]
    backbone = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    assert step["Adam, backbone and current head"] == 32 * (backbone + 8 * QUICK.channels)
    assert FirstTaskStep(QUICK, CPU, "torch").traffic().parts["Adam, head"] == 32 * 90 * QUICK.channels


def test_a_batch_whose_logits_do_not_fit_is_split_to_the_same_loss_and_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    case, whole = (FirstTaskStep(QUICK, CPU, "torch") for _ in range(2))
    expected = whole.side("eager")
    losses = [expected() for _ in range(2)]
    plain = reference_step.next_item_loss

    def small(model: Any, x: Tensor, s: float) -> Tensor:
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(model, x, s)

    monkeypatch.setattr(reference_step, "next_item_loss", small)
    run = case.side("eager")
    torch.testing.assert_close([run() for _ in range(2)], losses)
    assert case.notes == {"eager": "batch in 4 parts, whose logits fit"} and whole.notes == {}
    monkeypatch.setattr(reference_step, "next_item_loss", lambda *_: small(None, torch.zeros(9, 1), 0.0))
    with pytest.raises(torch.OutOfMemoryError):
        case.side("eager")()


class Broken(Embedding):
    """A case with sides that fail, do not fit, or compute something else."""

    wrong: dict[str, Exception | float] = {}

    def side(self, side: str) -> Call:
        run, wrong = super().side(side), self.wrong.get(side, 0.0)
        if isinstance(wrong, Exception):
            raise wrong
        return lambda: run() * (1.0 + wrong)


def measured(wrong: dict[str, Exception | float], **options: Any) -> Result:
    case = Broken(QUICK, CPU, "torch")
    case.wrong = wrong
    return gpu_measure.measure(case, Meter(CPU, block=0.001), 2, 10.0, **options)


@pytest.mark.parametrize("together", [True, False])
def test_a_side_that_fails_leaves_the_others_measured(together: bool, capsys: pytest.CaptureFixture[str]) -> None:
    problems: dict[str, Exception | float] = {
        "eager": torch.OutOfMemoryError("CUDA out of memory"), "torch": ValueError("a defect\nat length"),
        "compile-bf16": RuntimeError("no compiler"),
    }  # fmt: skip
    found = measured(problems, together=together, compiled=True)
    said = {name: side.problem for name, side in found.sides.items() if side.problem}
    assert said == {
        "eager": "OutOfMemoryError: CUDA out of memory", "torch": "ValueError: a defect",
        "compile-bf16": "RuntimeError: no compiler",
    }  # fmt: skip
    assert [name for name, side in found.sides.items() if side.failed] == ["torch"]
    assert gpu.failures(found) == [f"{found.title}, torch: ValueError: a defect"]
    assert all(len(found.sides[name].seconds) == 2 for name in set(found.sides) - set(said))
    assert found.best_eager == "eager-bf16" and found.times_eager("eager") is None
    assert "a defect" in capsys.readouterr().err


@pytest.mark.parametrize(("side", "factor"), [(OURS, 0.2), ("ours-fp32", 0.01), ("torch", float("nan"))])
def test_sides_that_compute_different_things_are_not_compared(side: str, factor: float) -> None:
    with pytest.raises(DifferentAnswers, match=f"{side} is off by"):
        measured({side: factor})


def test_losses_are_compared_with_the_rates_that_a_step_gives() -> None:
    case = TrainingStep(QUICK, CPU, "torch")
    told = {side: case.told(side, case.side(side)()) for side in ("eager", "torch", OURS)}
    assert all(len(answer) == 4 for answer in told.values())
    case.check(told)
    told["torch"][3] += 0.1
    with pytest.raises(DifferentAnswers, match="torch computes"):
        case.check(told)
    large = gpu_cases.LargeFirstTaskStep(QUICK, CPU, "torch")
    large.check({OURS: torch.tensor([4.5])})
    with pytest.raises(DifferentAnswers, match="expected about 4.5"):
        large.check({OURS: torch.tensor([45.0])})


def test_a_failure_is_told_and_the_run_goes_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """With a backend that does not exist only eager is measured."""
    arguments = ["--device", "cpu", "--quick", "--rounds", "1", "--backend", "nonsense", "--only", "cases", "--only", "kernels"]
    assert gpu.main([*arguments, "--results", str(tmp_path)]) == 1
    run = json.loads(next(tmp_path.iterdir()).read_text())
    assert run["cases"]["embed"]["sides"]["eager"]["median_seconds"] > 0
    assert any(failure.startswith("profile: BackendError") for failure in run["failed"])
    assert run["bars"][1]["verdict"] == "not measured" and "- FAILED: training step of task 3" in capsys.readouterr().out


class Clock:
    """Time passes only in calls that say so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def lasting(self, seconds: float) -> Callable[[], Tensor]:
        def run() -> Tensor:
            self.now += seconds
            return torch.zeros(1)

        return run


def test_a_time_is_a_blocks_divided_by_its_calls() -> None:
    clock = Clock()
    meter = Meter(CPU, clock, block=0.05)
    assert meter.seconds(clock.lasting(0.004), 5) == pytest.approx(0.004)
    assert [meter.calls(clock.lasting(s)) for s in (1.0, 0.0101, 1e-9)] == [1, 4, gpu_measure.MOST_CALLS]
    rates = gpu_measure.rates(Meter(CPU), 16, 4096, 1)
    assert min(rates.bf16, rates.tf32, rates.fp32, rates.copy) > 0


def test_turns_end_with_the_budget_and_one_that_no_longer_fits_drops_out() -> None:
    clock = Clock()
    found = result("a", 1, 1.0, 1.0)
    for side in found.sides.values():
        side.seconds, side.calls = [], 1
    calls = 0

    def full() -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(1)

    runs: dict[str, Call] = {"eager": clock.lasting(1.0), "eager-bf16": full, OURS: clock.lasting(2.0)}
    gpu_measure.in_turns(runs, found, Meter(CPU, clock), rounds=9, budget=5.0)
    assert found.sides["eager"].seconds == [1.0] * 2 and found.sides[OURS].seconds == [2.0] * 2
    assert found.sides["eager-bf16"].seconds == [] and "out of memory" in str(found.sides["eager-bf16"].problem)


def test_replayed_calls_are_timed_without_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    meter = Meter(CPU, clock)
    assert gpu_measure.replayed(clock.lasting(1.0), meter, 1) == "no graphs of launches on the CPU"
    monkeypatch.setattr(meter, "replayed", lambda run: clock.lasting(0.25))
    assert gpu_measure.replayed(clock.lasting(1.0), meter, 3) == pytest.approx(0.25)


def test_tf32_is_as_before_afterwards() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with pytest.raises(KeyError), gpu_measure.tf32(True):
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
        with gpu_measure.tf32(False):
            assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
        raise KeyError
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_kernels_are_what_ran_on_the_device() -> None:
    def event(on: Any, **more: Any) -> SimpleNamespace:
        span = SimpleNamespace(elapsed_us=lambda: 40.0)
        return SimpleNamespace(device_type=on, time_range=span, self_cpu_time_total=7.0, **more)

    kinds = gpu_measure.DeviceType
    assert gpu_measure.kernel_seconds(event(kinds.CUDA), True) == pytest.approx(40e-6)
    assert gpu_measure.kernel_seconds(event(kinds.CUDA, is_user_annotation=True), True) is None
    assert gpu_measure.kernel_seconds(event(kinds.CPU), True) is None
    assert gpu_measure.kernel_seconds(event(kinds.CPU, is_user_annotation=False), False) == pytest.approx(7e-6)


def test_tests_of_gpus_are_those_of_kernels_and_their_last_line_is_kept(tmp_path: Path) -> None:
    chosen = gpu.tests_of_gpus()
    assert "tests/ops/test_triton_backend.py" in chosen and "tests/kernels/test_triton_linear_rank.py" in chosen
    assert not any("compiles" in path or "bench" in path or "tune" in path for path in chosen)
    (tmp_path / "test_two.py").write_text("def test_good(): pass\ndef test_bad(): assert False\n")
    plain = [str(tmp_path), "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    found = gpu.run_tests([*plain, "-k", "good"])
    assert found.status == 0 and found.said.startswith("1 passed, 1 deselected") and found.seconds > 0
    found = gpu.run_tests(plain)
    assert found.status == 1 and found.said.startswith("1 failed, 1 passed")


def test_device_names_make_file_names() -> None:
    assert gpu_report.slug("NVIDIA H200 (SXM5)") == "nvidia-h200-sxm5"


def test_the_full_shape_is_the_one_that_was_asked_for() -> None:
    full = gpu_cases.FULL
    assert (full.length, full.channels, full.labels, full.batch, full.first_batch) == (100, 256, (646_000, 17_880, 8), 1024, 32)
    names = [case.name for case in gpu_cases.cases(full, CPU, "torch", 8192)]
    assert set(names) == CASES and len(names) == len(CASES)
    specs = gpu.head_specs(heads.FULL)
    assert {spec.labels for spec in specs.values()} == {646_000} and "retention-few" in specs


SMALL = heads.Sizes(16, 8, 2, 40, 40, (2, 5), 4, (), 2, (1, 2))


@pytest.mark.parametrize("name", gpu.head_specs(SMALL))
def test_heads_in_tritons_interpreter(name: str) -> None:
    require_triton()
    if torch.cuda.is_available():
        pytest.skip("kernels are not interpreted where there is a GPU")
    found = gpu_measure.measure_head(gpu.head_specs(SMALL)[name].make(SMALL), Meter(CPU, block=1e-9), "triton", 1)
    assert all(side.seconds for side in found.sides.values()) and found.operations.useful > 0


@pytest.mark.parametrize("kind", [Convolutions, TrainingStep])
def test_cases_in_tritons_interpreter(kind: type[GpuCase]) -> None:
    require_triton()
    try:
        resolve("triton", "masked_conv")
    except BackendError as reason:
        pytest.skip(str(reason))
    shape = replace(QUICK, batch=2, length=6, dilations=(1,), labels=(20, 10, 4))
    found = gpu_measure.measure(kind(shape, CPU, "triton"), Meter(CPU, block=1e-9), 1, 1.0)
    assert all(side.seconds for side in found.sides.values())


@pytest.mark.parametrize("case", [TrainingStep, FirstTaskStep])
def test_on_a_gpu_steps_are_replayed_too(case: type[GpuCase], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made for a GPU is made here, but for the graphs themselves."""
    measured = case(QUICK, CPU, "torch")
    assert gpu_cases.REPLAYED not in measured.sides()
    assert gpu_cases.REPLAYED in case(QUICK, torch.device("cuda"), "triton").sides()
    measured.own[gpu_cases.REPLAYED] = measured.own[OURS]
    made, taken = [], []
    monkeypatch.setattr(
        gpu_cases, "StepGraphs", lambda model, teacher, alpha, precision: made.append((alpha, precision)) or "graphs"
    )
    for name in ("t1_step", "continual_step"):
        real = getattr(gpu_cases.trainer, name)
        monkeypatch.setattr(
            gpu_cases.trainer, name, lambda *a, graphs, real=real, **named: taken.append(graphs) or real(*a, **named)
        )
    measured.side(gpu_cases.REPLAYED)()
    measured.side(OURS)()
    assert made == [(gpu_cases.ALPHA, "bf16")] and taken == ["graphs", None]


def test_the_faster_of_both_ways_is_judged() -> None:
    def result(**seconds: float) -> Any:
        sides = {name: SimpleNamespace(seconds=[value], median=value) for name, value in seconds.items()}
        return SimpleNamespace(sides=sides)

    assert gpu_report._ours(result(**{OURS: 2.0, gpu_cases.REPLAYED: 1.0})) == gpu_cases.REPLAYED
    assert gpu_report._ours(result(**{OURS: 1.0, gpu_cases.REPLAYED: 2.0})) == OURS == gpu_report._ours(result())
