"""Options of the bench suite, the measurements that its tests share, and the closing table."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import report
from bench.cases import CASES, TINY, TTL, Shape
from bench.measure import Measured, measure


class Session:
    """The cases measured so far: each once, however many tests show one of its sides."""

    def __init__(self, config: pytest.Config) -> None:
        self.quick: bool = config.getoption("--quick")
        users: int | None = config.getoption("--evaluated")
        self.shape: Shape = TINY if self.quick else TTL
        self.shape = self.shape if users is None else self.shape.evaluating(users)
        self.rounds: int = config.getoption("--rounds") or (2 if self.quick else 5)
        folder = config.getoption("--results")
        # A quick run's times mean nothing, so they are kept only where asked for.
        self.folder = Path(folder) if folder else None if self.quick else Path(__file__).parent / "results"
        self.cases: dict[str, Measured] = {}

    def case(self, name: str) -> Measured:
        """The measurements of a case."""
        if name not in self.cases:
            self.cases[name] = measure(CASES[name](self.shape), self.rounds, memory=not self.quick)
        return self.cases[name]


_SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("teracon_fast bench")
    group.addoption("--quick", action="store_true", help="tiny shapes, no memory: does the suite work? Times mean nothing")
    group.addoption("--rounds", type=int, help="timed calls of each side (5)")
    group.addoption("--evaluated", type=int, help=f"users of the evaluation case ({TTL.evaluated}; the full one is 10000)")
    group.addoption("--results", metavar="FOLDER", help="where the JSON goes (bench/results)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SESSION] = Session(config)
    if not config.option.benchmark_columns:
        config.option.benchmark_columns = ["median", "min", "max", "rounds"]


@pytest.fixture(scope="session")
def bench_session(pytestconfig: pytest.Config) -> Session:
    return pytestconfig.stash[_SESSION]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = config.stash[_SESSION]
    if not session.cases:
        return
    cases = list(session.cases.values())
    terminalreporter.section("ours beside the eager reference and torch.compile of it")
    if session.quick:
        terminalreporter.write_line("quick run on tiny shapes: these times mean nothing")
    for line in report.table(cases):
        terminalreporter.write_line(line)
    if session.folder is not None:
        path = report.write(report.document(cases, session.shape, session.rounds), session.folder)
        terminalreporter.write_line(f"kept in {path}")
