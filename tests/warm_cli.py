"""`python -m dpf_release` without the seconds that torch takes to import: each command is a fork of one warm process.

Run as a file, it is that process: requests on a line of standard input are run together, and their answers are a line
on standard output.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import subprocess
import sys
import threading
import traceback
from pathlib import Path

WARM = (
    "torch",
    "torchvision",
    "h5py",
    "rich.console",
    "dp_accounting",
    "sklearn.cluster",
    "dpf_release.cli.main",
    "dpf_release.cli.demo",
    "dpf_release.evaluation.frontier",
    "dpf_release.publish.audit.audit",
    "dpf_release.publish.inspect",
)


class WarmCli:
    """One warm process; the commands that it runs are processes of their own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self, arguments: tuple[str, ...], folder: Path, envs: list[dict[str, str]], scratch: Path, before: str = ""
    ) -> list[tuple[int, int, str, str]]:
        """Runs a command in a session of its own, once in each environment, all at the same time.

        Args:
            arguments: of the command.
            folder: where.
            envs: the environments.
            scratch: a folder for what they print.
            before: Python that is run in their processes first.

        Returns:
            Of each: exit status (negative: killed by that signal), the session, standard output and standard error.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        printed = [(scratch / f"{number}.out", scratch / f"{number}.err") for number in range(len(envs))]
        request = {"arguments": arguments, "folder": str(folder), "before": before}
        runs = [{"env": env, "out": str(out), "err": str(err)} for env, (out, err) in zip(envs, printed, strict=True)]
        self.process.stdin.write(json.dumps([request | run for run in runs]) + "\n")
        self.process.stdin.flush()
        ended = json.loads(self.process.stdout.readline())
        return [
            (status, session, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))
            for (status, session), (out, err) in zip(ended, printed, strict=True)
        ]

    def close(self) -> None:
        """Ends the warm process."""
        self.process.communicate()


def serve() -> None:
    """Answers requests; returns in each child, which is to run the command."""
    for name in WARM:
        __import__(name)
    gc.freeze()  # a fork that looks at all of these again would copy their memory
    for line in sys.stdin:
        children = []
        for request in json.loads(line):
            child = os.fork()
            if child == 0:
                begin(request)
                return
            children.append(child)
        ended = [(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), child) for child in children]
        print(json.dumps(ended), flush=True)
    sys.exit()


def begin(request: dict[str, object]) -> None:
    """Makes this process what the command would have found itself in."""
    os.setsid()
    os.chdir(str(request["folder"]))
    os.environ.clear()
    os.environ.update(request["env"])  # type: ignore[arg-type]
    opened = ((0, os.devnull, os.O_RDONLY), (1, request["out"], os.O_WRONLY), (2, request["err"], os.O_WRONLY))
    for descriptor, path, flags in opened:
        handle = os.open(str(path), flags | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(handle, descriptor)
        os.close(handle)
    sys.argv = ["dpf_release", *request["arguments"]]  # type: ignore[misc]
    sys.path[0] = str(Path.cwd())
    exec(compile(str(request["before"]), "before", "exec"), {})


def ended_with() -> int:
    """Runs the command to its end; the exit status that Python would give it."""
    try:
        serve()
        runpy.run_module("dpf_release", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def end(status: int) -> None:
    """Ends this process as Python does, but for taking apart all that was imported, which takes seconds."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for those threads that Python waits for
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    end(ended_with())
