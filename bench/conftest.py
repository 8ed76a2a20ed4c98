"""Options of the suite, the measurements that its tests share, and the closing tables."""

from __future__ import annotations

import pytest

from bench import record
from bench.harness import Measured, measure
from bench.network import on_cpu
from bench.shapes import TINY, TTL


class Session:
    """The cases measured so far: each once, however many tests show one of its sides."""

    def __init__(self, config: pytest.Config) -> None:
        self.given = record.completed(config.option)
        self.report = record.Report("network", self.given)
        self.cases = {case.name: case for case in on_cpu(TINY if self.given.quick else TTL)}
        self.measured: dict[str, Measured] = {}

    def case(self, name: str) -> Measured:
        """The measurements of a case. A quick run starts no processes, and so knows no memory."""
        if name not in self.measured:
            self.measured[name] = measure(self.cases[name], self.given.rounds, self.given.budget, apart=not self.given.quick)
        return self.measured[name]


_SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    record.add_options(parser.getgroup("teracon_fast bench").addoption)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SESSION] = Session(config)
    config.option.benchmark_columns = config.option.benchmark_columns or ["median", "min", "max", "rounds"]


@pytest.fixture(scope="session")
def bench_session(pytestconfig: pytest.Config) -> Session:
    return pytestconfig.stash[_SESSION]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = config.stash[_SESSION]
    if session.measured:
        terminalreporter.section("ours beside PyTorch")
        for measured in session.measured.values():
            session.report.add(measured)
        session.report.close(shape=TINY if session.given.quick else TTL)
