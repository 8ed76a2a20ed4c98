"""`make tune` measures what it says, keeps what is clearly faster and right, and rewrites one row of the table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_here import require_triton

from bench import device, harness, tune
from bench.device import NotMeasured
from bench.tune import (
    CONVOLUTIONS,
    FULL,
    KINDS,
    OPERATIONS,
    QUICK,
    Outcome,
    Problem,
    candidates,
    problems,
    rewritten,
    with_winners,
    written,
)
from teracon_fast.errors import TeraconError
from teracon_fast.kernels import configs
from teracon_fast.kernels.configs import Config

require_triton()
CPU = torch.device("cpu")
FACTS = {"device": "a device", "date": "2026-11-24", "teracon_fast": "0", "torch": "2", "triton": "3"}
SCAN = Problem("scan", "half", None, 150, QUICK)
Answer = tuple[Tensor, ...]


class Clock:
    """Time passes in calls, by the configuration that is tried."""

    def __init__(self, seconds: Mapping[Config, float]) -> None:
        self.now, self.seconds, self.used = 0.0, seconds, list[Config]()

    def __call__(self) -> float:
        return self.now

    def of(self, call: Callable[[], Answer]) -> Callable[[], Answer]:
        """The call, which takes the seconds of its configuration. It is made once with each: the interpreter is slow."""
        answers = dict[Config, Answer]()

        def run() -> Answer:
            self.used.append(in_use())
            self.now += self.seconds.get(in_use(), 2.0)
            if in_use() not in answers:
                answers[in_use()] = call()
            return answers[in_use()]

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[Config, float]], Clock]:
    def made(seconds: Mapping[Config, float]) -> Clock:
        found = Clock(seconds)
        monkeypatch.setattr(harness, "perf_counter", found)
        monkeypatch.setattr(device, "perf_counter", found)
        return found

    return made


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A copy of the table, to be rewritten."""
    path = tmp_path / "configs.json"
    path.write_text(configs.TABLE.read_text())
    return path


def in_use() -> Config:
    """The configuration that is being tried."""
    (config,) = configs._CANDIDATES.values()
    return config


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
def test_rewrites_its_row_and_a_second_run_changes_nothing(
    table: Path, capsys: pytest.CaptureFixture[str], clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    winners = {"scan": Config(128, 64, 64, 0, 4, 2), "conv_input": Config(64, 0, 64, 0, 8, 3)}
    passing, real = clock(dict.fromkeys(winners.values(), 1.0)), Problem.call
    monkeypatch.setattr(Problem, "call", lambda *arguments: passing.of(real(*arguments)))
    arguments = ["--device", "cpu", "--quick", "--architecture", "sm_90", "--table", str(table), "--kind", "half"]
    arguments += ["--operation", "scan", "--operation", "conv_input"]
    before, text = configs.read(table), table.read_text()
    assert tune.main([*arguments, "--dry-run"]) == 0 and table.read_text() == text
    assert tune.main(arguments) == 0
    told = capsys.readouterr().out
    assert "self-test on the CPU; row sm_90" in told and "50% less than" in told and f"{table} rewritten" in told
    after = configs.read(table)
    assert table.read_text() == configs.written(after)
    assert {name: row for name, row in after.items() if name != "sm_90"} == {k: v for k, v in before.items() if k != "sm_90"}
    assert configs.buckets(after, "sm_90", "half", "scan") == [(None, winners["scan"])], "equal buckets become one"
    assert configs.buckets(after, "sm_90", "half", "conv_input") == [(None, winners["conv_input"])]
    untouched = set(OPERATIONS) - set(winners)
    assert all(after["sm_90"]["half"][name] == before["sm_90"]["half"][name] for name in untouched)
    assert "single" not in after["sm_90"]
    measured = after["sm_90"]["measured"]
    assert measured["torch"] == torch.__version__ and measured["operations"] == ["half conv_input", "half scan"]
    text = table.read_text()
    assert tune.main(arguments) == 0
    assert table.read_text() == text and "stays as it is" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_is_called_and_its_candidates_agree(operation: Any, kind: Any) -> None:
    """In the interpreter; convolutions by plain PyTorch operations."""
    problem = next(problems(QUICK, [operation], [kind]))
    present, *_, other = candidates(problem, "sm_90")
    passing = Clock({other: 1.0})
    with pytest.MonkeyPatch.context() as patch:
        for module in (harness, device):
            patch.setattr(module, "perf_counter", passing)
        found = tune.tune(problem, present, [other], passing.of(problem.call(CPU, "torch")), CPU)
    assert found.passed_over == {} and found.winner == other and set(passing.used) == {present, other}


def test_present_configuration_stays_unless_another_is_clearly_faster(clock: Any) -> None:
    present, close, faster = Config(16, 32, 16), Config(32, 32, 16), Config(64, 32, 16)
    passing = clock({present: 1.0, close: 0.985, faster: 0.9})
    call = passing.of(lambda: (torch.ones(3),))
    assert tune.tune(SCAN, present, [present, close], call, CPU).winner == present
    found = tune.tune(SCAN, present, [present, close, faster], call, CPU)
    assert found.winner == faster and (found.seconds, found.present_seconds) == (pytest.approx(0.9), pytest.approx(1.0))


def test_what_fails_or_computes_something_else_is_passed_over(clock: Any) -> None:
    present, fails, differs, right = Config(16, 32, 16), Config(32, 32, 16), Config(64, 32, 16), Config(128, 32, 16)
    answers = {present: 1.0, differs: 1.05, right: 1.005}
    passing = clock({present: 1.0, differs: 0.5, right: 0.5})

    def call() -> Answer:
        if in_use() == fails:
            raise RuntimeError("out of resource: shared memory\nmore")
        return torch.full((4,), answers[in_use()]), torch.empty(0)

    found = tune.tune(SCAN, present, [fails, differs, right], passing.of(call), CPU)
    assert found.winner == right and len(found.passed_over) == 2
    why = {name.split(",")[0]: reason for name, reason in found.passed_over.items()}
    assert why[written(fails)] == "RuntimeError: out of resource: shared memory"
    assert "0 is off by 0.05, expected at most 0.02" in why[written(differs)]
    with pytest.raises(NotMeasured, match="out of resource"):
        tune.tune(SCAN, fails, [right], passing.of(call), CPU)

    def lost() -> Answer:
        if in_use() == fails:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return (torch.ones(4),)

    with pytest.raises(RuntimeError, match="the device is lost"):
        tune.tune(SCAN, present, [fails], passing.of(lost), CPU)


def outcome(problem: Problem, winner: Config) -> Outcome:
    return Outcome(problem, Config(16, 32, 16), winner, 1.0, 2.0, {})


def test_neighbouring_buckets_with_one_winner_become_one() -> None:
    one, two = Config(64, 64, 32), Config(128, 64, 32)
    of = {up_to: Problem("scan", "single", up_to, size, QUICK) for up_to, size in ((100, 50), (1000, 500), (None, 5000))}
    found = [outcome(of[None], two), outcome(of[100], one), outcome(of[1000], one)]
    new = with_winners(configs.read(), "sm_80", found)
    assert configs.buckets(new, "sm_80", "single", "scan") == [(1000, one), (None, two)]
    assert "features" not in new["sm_80"]["single"]["scan"][0]
    assert json.loads(configs.written(new)) == new


def test_what_was_measured_before_is_kept_where_it_is_of_the_same_device_and_versions() -> None:
    table = configs.read()
    entry = configs.buckets(table, "sm_90", "half", "topk")[0][1]
    first = rewritten(table, "sm_90", [outcome(Problem("topk", "half", None, 9, QUICK), entry)], FACTS)
    assert first["sm_90"]["measured"] == {**FACTS, "operations": ["half topk"]} and table["sm_90"]["measured"] is None
    scan = [outcome(Problem("scan", "half", None, 9, QUICK), Config(64, 64, 32))]
    second = rewritten(first, "sm_90", scan, FACTS)
    assert second["sm_90"]["measured"]["operations"] == ["half scan", "half topk"]
    later = {**FACTS, "date": "2027-01-01"}
    assert rewritten(second, "sm_90", scan, later) is second, "nothing is new"
    other = rewritten(second, "sm_90", scan, {**FACTS, "device": "another"})
    assert other["sm_90"]["measured"] == {**FACTS, "device": "another", "operations": ["half scan"]}


def test_an_operation_that_cannot_be_measured_keeps_all_its_buckets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(problem: Problem, device: torch.device, backend: str) -> Any:
        if problem.operation == "conv" and problem.up_to is None:
            raise TeraconError(f"backend {backend!r} cannot run it")
        return lambda: (torch.ones(2),)

    monkeypatch.setattr(Problem, "call", call)
    wanted = list(problems(QUICK, ["conv", "topk"], ["half"]))
    found = tune.run_all(configs.read(), "sm_80", wanted, CPU, "triton")
    assert [one.problem.operation for one in found] == ["topk", "topk"]
    assert "left as it is, TeraconError: backend 'triton' cannot run it" in capsys.readouterr().out


@pytest.mark.parametrize("architecture", [name for name in configs.SHARED if name != "other"])
def test_candidates_fit_and_so_does_what_the_table_has(architecture: str) -> None:
    table, limit = configs.read(), configs.SHARED[architecture]
    for problem in problems(FULL, OPERATIONS, KINDS):
        tried = candidates(problem, architecture)
        assert len(tried) == len(set(tried)) >= 1 and len(tried) <= 42, problem.title
        for config in tried:
            assert tune.shared_kib(problem, config, architecture) <= limit
            assert config.columns < problem.channels if problem.operation in ("conv", "conv_input") else config.columns
            sizes = (config.rows, config.columns or 16, config.depth, config.features or 16)
            assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)
        present = configs.of_size(configs.buckets(table, architecture, problem.kind, problem.operation), problem.size)
        assert tune.shared_kib(problem, present, architecture) <= limit, "the estimate is of what is known to fit"


def test_a_bucket_is_represented_by_a_size_of_its_own() -> None:
    for problem in problems(FULL, OPERATIONS, ["half"]):
        known = FULL.channels if problem.operation in CONVOLUTIONS else FULL.labels
        below = max((up_to for up_to, _ in known if up_to is not None and up_to < problem.size), default=0)
        assert below < problem.size <= (problem.up_to or 10**9)
        assert f"{problem.size:,}" in problem.title
    assert (None, 646_000) in FULL.labels and (256, 256) in FULL.channels


def test_refuses_without_a_gpu_and_without_a_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], table: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert capsys.readouterr().err.startswith("no GPU:")
    self_test = ["--device", "cpu", "--quick", "--table", str(table), "--architecture"]
    for name in ("other", "sm_75"):
        assert tune.main([*self_test, name]) == 2
        assert "`SHARED` of kernels/configs.py" in (said := capsys.readouterr().err) and "'sm_90'" in said
    for wrong in (["--quick"], ["--device", "cpu"], ["--device", "cpu", "--quick", "--architecture", "sm_90"]):
        with pytest.raises(SystemExit):
            tune.main(wrong)
    assert configs.TABLE.read_text() == table.read_text()


def test_configurations_are_told_in_a_line() -> None:
    assert written(Config(64, 0, 32, 0, 8, 3)) == "rows 64 depth 32 warps 8 stages 3"


@pytest.mark.parametrize(
    ("architecture", "config", "kib"),
    [
        ("sm_90", Config(64, 128, 64, 0, 4, 2), 64), ("sm_80", Config(64, 64, 64, 0, 4, 2), 24),
        ("gfx942", Config(128, 128, 64, 0, 8, 3), 96), ("gfx942", Config(64, 128, 64, 0, 4, 2), 40),
    ],
)  # fmt: skip
def test_shared_memory_is_what_the_compiler_takes(architecture: str, config: Config, kib: int) -> None:
    """As Triton 3.7.1 compiles the scan over labels."""
    assert tune.shared_kib(Problem("scan", "half", None, 646_000, FULL), config, architecture) == kib
