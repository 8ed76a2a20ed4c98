"""Options that scripts of the bench share: how many rounds, a quick run, where results are kept."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, rounds: int, what: str
) -> tuple[argparse.Namespace, int, Path | None]:
    """Add --rounds, --quick and --results to a parser's own options, and parse.

    Args:
        rounds: of a full run; a quick one has 2. what: a round times.

    Returns:
        What was given, the rounds, and the folder for results: None for a quick run that names none, whose times mean nothing.
    """
    parser.add_argument("--rounds", type=int, help=f"{what} ({rounds})")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does the script work? Times mean nothing")
    parser.add_argument("--results", metavar="FOLDER", type=Path, help="where results go (bench/results)")
    given = parser.parse_args(arguments)
    if given.rounds is not None and given.rounds < 1:
        parser.error(f"--rounds: got {given.rounds}, expected at least 1")
    if given.quick:
        print("quick run on tiny sizes: these times mean nothing\n")
    folder = given.results or (None if given.quick else Path(__file__).resolve().parent / "results")
    return given, given.rounds or (2 if given.quick else rounds), folder
