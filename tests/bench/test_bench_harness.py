"""The measuring loop is fair, compares answers first, and its figures follow from the times."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import device, harness
from bench.device import NotMeasured, Peak, kernel_seconds, replayed, tf32
from bench.harness import Answer, Call, Case, Measured, Operations, Side, compare, measure


class Clock:
    """Time passes only in calls that say so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    for module in (harness, device):
        monkeypatch.setattr(module, "perf_counter", found)
    return found


@dataclass
class Fake(Case):
    """Sides whose calls take the seconds of a schedule; a side that was not the last to run starts slowly."""

    clock: Clock | None
    seconds: dict[str, float]
    slow: float = 1.0  # times, of a side's first call after another side's
    problems: dict[str, Exception] = field(default_factory=dict)
    answers: dict[str, float] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    name, title = "fake", "a fake case"  # type: ignore[assignment]

    @property
    def sides(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self.seconds)

    def operations(self, side: str) -> Operations:
        return Operations(6e9, 9e9)

    def side(self, name: str) -> Call:
        if name in self.problems:
            raise self.problems[name]

        def run() -> Answer:
            cold = self.log[-1:] != [name]
            self.log.append(name)
            if self.clock is not None:
                self.clock.now += self.seconds[name] * (self.slow if cold else 1.0)
            return {"loss": torch.tensor(self.answers.get(name, 2.0)), "gradient": torch.ones(3)}

        return Call(run)


def test_every_turn_begins_with_untimed_calls_of_its_side(clock: Clock) -> None:
    """Sides that are slow after another one has run are timed as if they were alone."""
    case = Fake(clock, {"eager": 4.0, "ours": 1.0}, slow=3.0)
    found = measure(case, 2, 1e9, peaks={})
    assert found.sides["eager"].seconds == [4.0, 4.0] and found.sides["ours"].seconds == [1.0, 1.0]
    log, turns = case.log[4:], []
    while log:
        count = next((n for n, name in enumerate(log) if name != log[0]), len(log))
        turns.append((log[0], count))
        log = log[count:]
    # Cold, warm, and one more that is no faster: 3 untimed calls and 2 timed ones. Each round begins with another side.
    assert turns == [("eager", 5), ("ours", 5 + 4), ("eager", 5)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness.Local, "_warm", lambda self: self.seconds)
        unfair = measure(Fake(clock, {"eager": 4.0, "ours": 1.0}, slow=3.0), 2, 1e9, peaks={})
    assert unfair.sides["eager"].median > 4.0, "without them the first timed calls would be slow ones"


def test_untimed_calls_go_on_until_the_side_is_steady(clock: Clock) -> None:
    runner = harness.Local(Fake(clock, {"ours": 1.0}), "ours", memory=False)
    for times, untimed in (([9.0, 9.0], 2), ([9.0, 5.0, 3.0, 3.0], 4), ([9.0, 7.0, 5.0, 3.0, 1.0], 5)):
        left = [*times, 99.0]

        def run(left: list[float] = left) -> Answer:
            clock.now += left.pop(0)
            return {}

        runner.call = Call(run)
        assert runner._warm() == times[-1] and len(left) == len(times) + 1 - untimed


def test_short_calls_are_repeated_and_long_ones_are_not(clock: Clock) -> None:
    assert [harness._timed_calls(s, False) for s in (1e-4, 0.3, 1.5, 6.0)] == [10, 3, 2, 1]
    assert [harness._timed_calls(s, True) for s in (1e-5, 0.01, 1.5)] == [100, 5, 1]
    case = Fake(clock, {"eager": 20.0, "ours": 10.0})
    found = measure(case, 5, 60.0, one_by_one=True, peaks={})
    assert case.log == ["eager"] * 3 + ["ours"] * (3 + 3), "a side that is alone has been called before; rounds fit the budget"
    assert [len(side.seconds) for side in found.sides.values()] == [1, 2]


def test_what_is_not_timed(clock: Clock) -> None:
    def before() -> None:
        clock.now += 100.0

    def run() -> Answer:
        clock.now += 0.5
        return {}

    runner = harness.Local(Fake(clock, {}), "ours", memory=False)
    runner.call = Call(run, before)
    assert runner.turn(warm=True) == 0.5
    assert kernel_seconds(run, torch.device("cpu"), 3) == 0.5


def test_ratios_are_medians_of_rounds_and_best_of_pytorch_has_the_same_precision() -> None:
    sides = {
        "eager": Side(Operations(2e9, 4e9), seconds=[4.0, 9.0, 4.0]), "fused": Side(seconds=[3.0, 3.0, 3.0]),
        "eager-bf16": Side(seconds=[1.0, 1.0, 1.0]), "compile-bf16": Side(seconds=[0.8, 0.8, 0.8]),
        "compile": Side(problem="none"),
        "ours": Side(Operations(2e9, 4e9), seconds=[2.0, 3.0, 1.0]), "ours-bf16": Side(seconds=[0.5, 0.4, 0.4]),
    }  # fmt: skip
    found = Measured("a", "a case", 10, sides, {"fp32": 4e9})
    assert found.times("ours", "eager") == 3.0, "of 2, 3 and 4; the medians' ratio is 2"
    assert found.best_of_pytorch("ours") == "fused" and found.best_of_pytorch("ours-bf16") == "compile-bf16"
    rows = {row["side"]: row for row in found.rows()}
    assert rows["ours"]["times_best"] == 1.5 and rows["ours"]["best"] == "fused"
    assert rows["ours-bf16"]["times_best"] == 2.0 and rows["ours-bf16"]["times_eager"] == 10.0
    assert [rows["ours"][key] for key in ("useful_gflops", "share_of_peak", "users_per_second")] == [1.0, 0.25, 5.0]
    assert rows["compile"] == {"case": "a", "title": "a case", "side": "compile", "problem": "none", "peak_mib": None}
    found.peaks = {"fp32": 4e9, "bf16": 8e9, "copy": 1e9}
    sides["ours"].moved_bytes = 1e9
    row = next(row for row in found.rows() if row["side"] == "ours")
    assert row["times_floor"] == 2.0 and row["gigabytes_per_second"] == 0.5, "moving the bytes takes longer than the operations"


def test_sides_that_compute_different_things_are_not_timed(clock: Clock) -> None:
    seconds, answers = {"eager": 1.0, "ours": 1.0, "ours-bf16": 1.0, "torch": 1.0}, {"ours": 2.01, "ours-bf16": 2.01}
    found = measure(Fake(clock, seconds, answers=answers | {"torch": float("nan")}), 1, peaks={})
    assert found.sides["ours"].failed and found.sides["ours"].seconds == []
    assert found.sides["ours"].problem == "ours differs from eager: loss is off by 0.005, expected at most 0.001"
    assert "off by nan" in str(found.sides["torch"].problem)
    assert found.sides["ours-bf16"].seconds and found.sides["ours-bf16"].errors["loss"] == pytest.approx(0.005, rel=1e-4)
    shapes = compare(Fake(None, {}), "a", {"loss": torch.ones(3)}, "b", {"loss": torch.ones(4)})
    assert shapes == {}, "rows that are merged have no counterparts"


def test_a_side_that_fails_leaves_the_others_measured(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    problems = {
        "eager": torch.OutOfMemoryError("out of memory"), "torch": ValueError("a defect\nat length"),
        "compile": RuntimeError("no compiler"), "fused": NotMeasured("not in this torch"),
    }  # fmt: skip
    found = measure(Fake(clock, dict.fromkeys([*problems, "ours"], 1.0), problems=problems), 2, peaks={})
    assert {name: side.problem for name, side in found.sides.items() if side.problem} == {
        "eager": "OutOfMemoryError: out of memory", "torch": "ValueError: a defect", "compile": "RuntimeError: no compiler",
        "fused": "not in this torch",
    }  # fmt: skip
    assert [name for name, side in found.sides.items() if side.failed] == ["torch"]
    assert found.sides["ours"].seconds == [1.0, 1.0] and "a defect" in capsys.readouterr().err


def test_a_side_that_stops_working_drops_out(clock: Clock) -> None:
    case, calls = Fake(clock, {"eager": 1.0, "ours": 1.0}), 0
    plain = case.side

    def side(name: str) -> Call:
        def run() -> Answer:
            nonlocal calls
            calls += name == "ours"
            if calls > 8 and name == "ours":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return plain(name).run()

        return Call(run)

    case.side = side  # type: ignore[method-assign]
    found = measure(case, 4, peaks={})
    assert found.sides["ours"].seconds == [] and "out of memory" in str(found.sides["ours"].problem)
    assert len(found.sides["eager"].seconds) == 4


class Working(Case):
    """Holds inputs of 40 MiB; a call takes 60 MiB for a moment and leaves 20."""

    name, title, sides, inputs_held = "working", "memory", ("eager", "ended"), True  # type: ignore[assignment]

    def tiny(self) -> Case:
        return Fake(None, {"eager": 0.0, "ended": 0.0})

    def side(self, name: str) -> Call:
        if name == "ended":
            os._exit(9)
        inputs: list[Tensor] = [torch.ones(10 << 20)]

        def run() -> Answer:
            moment = torch.ones(10 << 20)
            return {"left": moment[: 5 << 20] + inputs[0][: 5 << 20]}

        return Call(run)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system tells no highest memory that can be reset")
def test_memory_is_that_of_a_call_in_a_process_of_its_own() -> None:
    found = measure(Working(), 2, apart=True, peaks={})
    assert 38 < (found.sides["eager"].peak_mib or 0.0) < 48 and len(found.sides["eager"].seconds) == 2
    assert "was ended: out of memory?" in str(found.sides["ended"].problem) and not found.sides["ended"].failed
    peak = Peak(torch.device("cpu"))
    held = torch.ones(16 << 20)
    assert 60 < (peak.mib() or 0.0) < 80 and len(held)


def test_large_answers_are_sampled_over_all_columns() -> None:
    large = torch.arange(3 << 20).view(-1, 256)
    found = harness._sampled(large)
    assert (1 << 19) < len(found) <= (1 << 20) + 1 and len((found.long() % 256).unique()) == 256
    assert harness._sampled(torch.ones(2, 3, dtype=torch.bfloat16)).dtype == torch.float32


def test_on_the_cpu_nothing_is_replayed_and_tf32_stays() -> None:
    with pytest.raises(NotMeasured, match="no CUDA graphs on the CPU"):
        replayed(lambda: None, torch.device("cpu"))
    states: list[Callable[[], object]] = [torch.get_float32_matmul_precision, lambda: torch.backends.cudnn.allow_tf32]
    before = [state() for state in states]
    with pytest.raises(KeyError), tf32(torch.device("cuda"), True):
        assert [state() for state in states] == ["high", True]
        with tf32(torch.device("cuda"), False), tf32(torch.device("cpu"), True):
            assert [state() for state in states] == ["highest", False]
        raise KeyError
    assert [state() for state in states] == before


def test_rates_are_positive() -> None:
    assert min(device.rates(torch.device("cpu"), 16, 4096).values()) > 0
