"""The command line `teracon`: prepare, train, grow, evaluate, recommend, predict, embed, reproduce, report, doctor.

One file a group of commands; `app.py` puts them together. Exit codes: 0 done, 1 doctor found something broken or a run of
`reproduce` failed, 2 bad input (one line on stderr, with --traceback the whole story), 130 interrupted.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; the entry point of the `teracon` script."""
    try:
        from teracon_fast.cli.app import app

        app()  # reads its arguments by way of pydantic
    except ModuleNotFoundError as error:
        from teracon_fast.cli.extras import advice

        hint = advice(error)
        if hint is None or "--traceback" in sys.argv:
            raise
        sys.exit(f"error: {hint}")
