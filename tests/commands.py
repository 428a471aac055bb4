"""The command line as its users run it: in a process of its own, which may be killed on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from warm_cli import WarmCli


def run_cli(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The real command line, in a process of its own."""
    ((status, _, out, err),) = run_warm(arguments, folder)
    return subprocess.CompletedProcess(arguments, status, out, err)


def killed(folder: Path, event: str, ending: str, number: int, *command: str) -> int:
    """Runs a command that kills itself before step `number` of a kind: an audit event on a path that ends so.

    Returns:
        Its session.
    """
    before = KILLED.format(event=event, ending=ending, number=number)
    ((status, session, _, err),) = run_warm(command, folder, before)
    assert status == -signal.SIGKILL, err
    return session


KILLED = """\
import os, signal, sys
left = {number}
def hook(name, arguments):
    global left
    if name == "{event}" and str(arguments[0]).endswith("{ending}"):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""


def run_warm(
    arguments: tuple[str, ...], folder: Path, before: str = "", ranks: Sequence[Mapping[str, str]] = ({},)
) -> list[tuple[int, int, str, str]]:
    """`WarmCli.run`, where each rank has these variables besides the ones that are here."""
    if not WARM:
        WARM.append(WarmCli())
    envs = [{**os.environ, "COLUMNS": "160", **variables} for variables in ranks]
    with tempfile.TemporaryDirectory() as scratch:
        return WARM[0].run(arguments, folder, envs, Path(scratch), before)


WARM: list[WarmCli] = []
