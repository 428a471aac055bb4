"""The entry point: one command, run; an error of ours is one paragraph and an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
from importlib import import_module

from dpf_release.cli.app import app
from dpf_release.core.memory import return_large_blocks
from dpf_release.errors import DPFReleaseError

for _commands in ("owner", "vault", "auditor"):  # each registers its commands
    import_module(f"dpf_release.cli.{_commands}")


def main() -> None:
    """Runs the command; a user's mistake ends with one paragraph and an exit code, a bug with its traceback."""
    rank = int(os.environ.get("RANK", "0"))
    return_large_blocks()
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if rank else sys.stdout):  # noqa: PTH123
            app()
    except DPFReleaseError as error:
        print(f"dpf-release{f' (rank {rank})' if rank else ''}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
