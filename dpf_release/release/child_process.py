"""Work on files that may be hostile, in a child process that can use little. No torch.

The child is Python with this package and its own limits: memory, processor time, files that it opens, none that it
writes. It inherits no open file and no variable but where Python finds its packages, loads no HDF5 plugin, and answers
in JSON lines, of which a bounded number is read. Whatever it dies of, its parent lives and learns of it. It is no jail:
the network, and every file that its user can read, are open to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MEMORY_BYTES = 2**30  # beside what Python and its libraries take, and the files that are mapped
OPEN_FILES = 64
MOST_ANSWER_BYTES = 2**23
WAITING_SECONDS = 120  # beside processor time: for a disk, or a machine with other work

ENVIRONMENT = {
    "HDF5_PLUGIN_PRELOAD": "::",  # HDF5's word for: load none
    "HDF5_PLUGIN_PATH": "",
    "HDF5_USE_FILE_LOCKING": "FALSE",  # a release may lie where nothing can be written
    "OMP_NUM_THREADS": "1",  # each thread takes memory for its stack
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONIOENCODING": "utf-8",
    "LC_ALL": "C.UTF-8",
}
KEPT = ("LD_LIBRARY_PATH", "PYTHONHOME")  # without which this Python may not start


def run_limited(module: str, request: Any, seconds: int) -> tuple[list[Any], str]:
    """What a module of this package answers to a request, and what it died of: empty where it ended as it should.

    The module is run as `python -m`; it calls `confine` with the seconds of processor time before it looks at anything,
    reads the request, JSON, from its standard input, and writes a JSON value a line.
    """
    # Only absolute entries: with "" a `numpy.py` of the current folder, perhaps the release, would be imported.
    packages = os.pathsep.join(entry for entry in sys.path if Path(entry).is_absolute())
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    with subprocess.Popen(
        [sys.executable, "-P", "-m", module, str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd="/",
        env=ENVIRONMENT | kept | {"PYTHONPATH": packages},
        start_new_session=True,  # of its own group, so that it can be killed with all that it started
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError), child.stdin:
                child.stdin.write(json.dumps(request).encode())
            output, ended = _read(child.stdout.fileno(), time.monotonic() + seconds + WAITING_SECONDS)
            if ended:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=5)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
    answers, last_words = _parsed(output)
    code, died_of = child.returncode, ""
    if len(output) > MOST_ANSWER_BYTES:
        died_of = "it answered too much"
    elif not ended:
        died_of = f"it took more than {seconds + WAITING_SECONDS} s"
    elif code == -signal.SIGXCPU:
        died_of = f"it took more than {seconds} s of processor time"
    elif code != 0:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        died_of = f"it {how}, under a limit of {MEMORY_BYTES >> 20} MiB" + (f" ({last_words})" if last_words else "")
    return answers, died_of


def _read(handle: int, deadline: float) -> tuple[bytes, bool]:
    """What comes through a pipe, and whether that was all of it."""
    output = b""
    with selectors.DefaultSelector() as selector:
        selector.register(handle, selectors.EVENT_READ)
        while len(output) <= MOST_ANSWER_BYTES and selector.select(max(0.0, deadline - time.monotonic())):
            part = os.read(handle, 2**16)
            if not part:
                return output, True
            output += part
    return output, False


def _parsed(output: bytes) -> tuple[list[Any], str]:
    """The answers, and the last line that is none: what a Python that dies says."""
    answers, rest = [], ""
    for line in output.decode("utf-8", errors="replace").splitlines():
        try:
            answers.append(json.loads(line))
        except (ValueError, RecursionError):
            rest = line.strip() or rest
    return answers, "".join(character for character in rest[:200] if character.isprintable())


def confine(seconds: int) -> None:
    """Puts the limits on this process, which has imported what it needs: from here on it can use little more."""
    used = 0
    with contextlib.suppress(OSError):
        used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0}
    limits |= {resource.RLIMIT_NOFILE: OPEN_FILES, resource.RLIMIT_CPU: seconds}
    if used:  # elsewhere than on Linux, what is in use is not known
        # What the process writes to. The whole address space would count a shard of 1 GiB that is mapped to be read.
        limits[resource.RLIMIT_DATA] = used + MEMORY_BYTES
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (limit, limit))
