"""Kills an owner's commands at random moments, runs them again, and compares every byte with a run left alone.

    python benchmarks/kill.py --kills 100 --seed 0 [--folder DIR]

Each trial copies a start state of a small project, kills `featurize`, `poison` or `package` with SIGKILL (the process
group, or the main process alone; a third of the trials kill the second run too), and runs it to the end. Then:

- vault and release are those of a run that nobody killed, file for file, with the same modes; nothing is left behind;
- right after the kill no half file lay under a final name, and the release was absent, the old one or the new one;
- decoding processes that lost their main process did not keep the vault locked, and ended.

`featurize` draws a secret plan first. Half of its trials start from a plan, half from none: for those the run left
alone comes last, under the plan that the killed run or the next one drew.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from dpf_release.owner.init import init
from dpf_release.release.verify import verify

CONFIG = """\
release = { name = "squares", version = "1.0.0", licence = "cc0-1.0" }
network = { arch = "resnet20_cifar", arguments = { width = 8 }, hook = "conv4_1", size = [32, 32], resize = 0 }
train = { epochs = 4, batch_size = 32 }
reconstructor = { epochs = 6, batch_size = 32 }
poison = { epochs = 40, batch_size = 32, lambda = 3.0 }
bank = { shard_size = "80 kB", batch_size = 4 }
compute = { device = "cpu", bf16 = "off", workers = 0 }
"""
INPUTS = {"images", "dpf.toml"}  # of a project: no command writes them
WHOLE = re.compile(r"(?!\.).*(\.h5|\.safetensors|index\.json|manifest\.json)")  # under these names never half a file
ORPHANS_END_WITHIN = 15.0  # seconds


class BrokenPromiseError(Exception):
    """What did not hold, a line each."""


# --------------------------------------------------------------------------------------------- what lies in a folder


def digests(folder: Path) -> dict[str, str]:
    """Mode and SHA-256 of every file below a folder, but a project's inputs, by path."""
    return {
        path.relative_to(folder).as_posix(): f"{path.stat().st_mode:o} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in INPUTS
    }


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    return [f"differs: {path}" for path in sorted(found.keys() | expected) if found.get(path) != expected.get(path)]


def leftovers(folder: Path) -> list[str]:
    names = ("*.partial", ".lock", ".*.dpf-staging", ".*.dpf-old")
    return sorted(f"left behind: {path.relative_to(folder)}" for name in names for path in folder.rglob(name))


def half_files(killed: dict[str, str], before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Files of a killed run under final names that are neither those before it nor those after the next run."""
    named = [path for path in killed if WHOLE.fullmatch(path)]
    return [f"half a file: {path}" for path in named if killed[path] not in (before.get(path), after.get(path))]


def wrong_release(release: Path, before: dict[str, str], after: dict[str, str]) -> list[str]:
    """That a release is the old one (or absent, where there was none) or the new one; digests are of the project."""
    old, new = (
        {path.removeprefix("release/"): digest for path, digest in project.items() if path.startswith("release/")}
        for project in (before, after)
    )
    found = digests(release)  # none of a folder that is not there
    if found in (old, new):
        return [f"release: {problem}" for problem in verify(release)] if found else []
    return [f"neither the old release nor the new one: {line}" for line in differences(found, new)]


def without_shards(project: Path) -> Path:
    """The project with the plan of its private features, and none of them."""
    for path in [project / "vault/features/index.json", *project.glob("vault/features/*/*.h5")]:
        path.unlink()
    return project


# --------------------------------------------------------------------------------------------- processes


def start(project: Path, command: str) -> subprocess.Popen[bytes]:
    """The command in a session of its own; what it says goes to a file beside the project."""
    with project.with_suffix(".log").open("wb") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        call = [sys.executable, "-m", "dpf_release", command]
        return subprocess.Popen(call, cwd=project, stdout=log, stderr=log, env=environment, start_new_session=True)


def wait_for_lock(process: subprocess.Popen[bytes], project: Path) -> None:
    """Until the process holds the vault, or has ended: the imports are over, the work begins."""
    while process.poll() is None:
        with contextlib.suppress(OSError, ValueError):
            if json.loads((project / "vault/.lock").read_text())["pid"] == process.pid:
                return
        time.sleep(0.001)


def run(project: Path, command: str) -> tuple[float, float]:
    """Runs a command to its end: seconds until it held the vault, and until it wrote its last file."""
    began, process = time.time(), start(project, command)
    wait_for_lock(process, project)
    held = time.time() - began
    if process.wait():
        raise BrokenPromiseError([f"{command} in {project} failed:", project.with_suffix(".log").read_text()])
    return held, max(path.stat().st_mtime for path in project.rglob("*")) - began


def living(session: int) -> list[int]:
    """Processes of a session; those are not counted that have ended and only wait to be asked about."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it may end while we look
            state, _, _, of_session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(of_session) == session and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


def orphans(session: int, until: float) -> list[str]:
    """Processes of a session that are there at `until` (of the monotonic clock) still; they are killed then."""
    while living(session) and time.monotonic() < until:
        time.sleep(0.05)
    left = living(session)
    if left:
        os.killpg(session, signal.SIGKILL)
    return [f"{len(left)} processes outlive their killed main process for {ORPHANS_END_WITHIN:.0f} s"] * bool(left)


# --------------------------------------------------------------------------------------------- start states


@dataclass
class State:
    """A project as a command finds it.

    Attributes:
        folder: the project; trials copy it.
        command: what is run in it.
        after: digests when the command was left alone; none where they depend on a plan that it draws.
        seconds: by workers, how long the command takes to hold the vault, and to write its last file.
    """

    folder: Path
    command: str
    after: dict[str, str] | None = None
    seconds: dict[int, tuple[float, float]] = field(default_factory=dict)

    def copy(self, name: str, workers: int) -> Path:
        """The project of one run."""
        project = self.folder.with_name(name)
        shutil.rmtree(project, ignore_errors=True)
        shutil.copytree(self.folder, project)
        edit(project, "workers = 0", f"workers = {workers}")
        return project

    def measure(self, workers: int) -> tuple[float, float]:
        """Seconds of a run left alone, made at the first call; such runs have to agree about the bytes."""
        if workers not in self.seconds:
            project = self.copy("alone", workers)
            self.seconds[workers] = run(project, self.command)
            if (self.folder / "vault/features/plan.json").is_file():
                found = digests(project)
                if different := differences(found, self.after or found):
                    raise BrokenPromiseError(["two runs left alone:", *different])
                self.after = found
        return self.seconds[workers]


def edit(project: Path, old: str, new: str) -> None:
    config = project / "dpf.toml"
    config.write_text(config.read_text().replace(old, new))


def make_states(folder: Path) -> dict[str, list[State]]:
    """A project, taken from step to step; the start states of each command."""
    project = folder / "project"
    init(project)
    (project / "dpf.toml").write_text(CONFIG)
    generator = np.random.default_rng(0)
    for kind, count in (("private/dark", 170), ("private/light", 170), ("public/any", 80)):
        (project / "images" / kind).mkdir(parents=True)
        for number in range(count):
            picture = generator.integers(0, 55, (32, 32, 3)).astype(np.uint8)
            x, y = generator.integers(0, 20, 2)
            picture[y : y + 12, x : x + 12] += np.uint8(60 if kind == "private/dark" else 200)
            Image.fromarray(picture).save(project / "images" / kind / f"{number}.png")

    def state(name: str, command: str) -> State:
        return State(Path(shutil.copytree(project, folder / name)), command)

    run(project, "train")
    no_plan = state("no-plan", "featurize")
    (no_plan.folder / "vault/survey-private.json").unlink()  # looking for broken images is a part of these trials
    run(project, "featurize")
    plan = state("plan", "featurize")
    without_shards(plan.folder)
    run(project, "fit-poison")
    fitted = state("fitted", "poison")
    run(project, "poison")
    unpublished = state("unpublished", "package")
    edit(project, '"1.0.0"', '"0.9.0"')
    run(project, "package")
    edit(project, '"0.9.0"', '"1.0.0"')
    published = state("published", "package")
    return {"featurize": [plan, no_plan], "poison": [fitted], "package": [unpublished, published]}


# --------------------------------------------------------------------------------------------- trials


def phase(project: Path, command: str) -> str:
    """How far a killed run had come, by its files."""
    vault = project / "vault"
    if command == "package":
        manifest, staging = project / "release/manifest.json", project / ".release.dpf-staging"
        if manifest.is_file() and json.loads(manifest.read_text())["version"] == "1.0.0":
            return "after the swap"
        if not staging.is_dir():
            return "before the staging"
        return "staging whole" if (staging / "SHA256SUMS").is_file() else "staging half copied"
    bank, plan = vault / "features", vault / "features/plan.json"
    if command == "poison":
        bank, plan = vault / "candidates/default/features", vault / "functions/default/candidate.json"
    shards = len(list(bank.glob("*/*.h5")))
    if (bank / "index.json").is_file():
        return "after the index"
    return f"between shards ({shards})" if shards else "before shard 0" if plan.is_file() else "before the plan"


def kill(state: State, project: Path, workers: int, share: float, whole_group: bool) -> tuple[int, str]:
    """Starts a command and kills it at a share of its work (above 1: after its last file), or of its imports (below 0).

    Returns:
        The session whose first process it was, and the phase that it was killed in.
    """
    held, written = state.measure(workers)
    process = start(project, state.command)
    if share < 0:
        time.sleep(-share * held)
    else:
        wait_for_lock(process, project)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(share * (written - held))
    if process.poll() is None:
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
    return process.pid, phase(project, state.command) if process.wait() else "after its end"


def trial(state: State, workers: int, shares: list[float], whole_group: bool) -> list[str]:
    """Kills a command at each of these moments, runs it to the end, and looks; returns the phases of the kills."""
    state.measure(workers)
    before, project = digests(state.folder), state.copy("trial", workers)
    killed, phases, sessions, problems = [], [], [], []
    for share in shares:
        session, seen = kill(state, project, workers, share, whole_group)
        sessions.append((session, time.monotonic() + ORPHANS_END_WITHIN))
        killed.append(digests(project))
        phases.append(seen)
        if state.command == "package":
            problems += wrong_release(project / "release", before, state.after or {})
    try:
        run(project, state.command)
    finally:
        problems += [problem for session in sessions for problem in orphans(*session)]
    found, after = digests(project), state.after
    if after is None:
        shutil.rmtree(project.with_name("reference"), ignore_errors=True)
        alone = without_shards(Path(shutil.copytree(project, project.with_name("reference"))))
        run(alone, state.command)
        after = digests(alone)
    problems += differences(found, after) + leftovers(project)
    problems += [problem for files in killed for problem in half_files(files, before, found)]
    if problems:
        raise BrokenPromiseError([*phases, *problems])
    return phases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="trials")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; by default the system's temporary folder")
    options = parser.parse_args()
    generator, where = random.Random(options.seed), options.folder or Path(tempfile.gettempdir())
    where.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dpf-kill-", dir=where.resolve()) as folder:
        states = make_states(Path(folder))
        counts = {command: Counter[str]() for command in states}
        for number in range(options.kills):
            turn, command = number // len(states), [*states][number % len(states)]
            state, workers = states[command][turn % len(states[command])], 2 * (turn // 2 % 2)
            whole_group = (turn + turn // 2 + turn // 4) % 2 == 0  # with each of the states and workers
            shares = [generator.uniform(0, 1.1) if generator.random() < 0.9 else generator.uniform(-1, 0)]
            shares += [generator.uniform(0, 1.1)] * (generator.random() < 1 / 3)
            moments = " and ".join(f"{share:.0%}" if share >= 0 else "import" for share in shares)
            killed = f"{'all' if whole_group else 'main'} killed at {moments}"
            told = f"{number + 1}/{options.kills} {command} from {state.folder.name}, {workers} workers, {killed}"
            try:
                phases = trial(state, workers, shares, whole_group)
            except BrokenPromiseError as broken:
                print(f"{told}: BROKEN", *broken.args[0], sep="\n  ")
                return 1
            counts[command].update(seen.split(" (")[0] for seen in phases)
            print(f"{told}: {', '.join(phases)}; identical", flush=True)
    for command, seen in counts.items():
        print(f"{command}: {seen.total()} kills: " + ", ".join(f"{count} {name}" for name, count in seen.most_common()))
    print(f"identical: {options.kills} of {options.kills}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
