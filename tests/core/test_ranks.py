"""Several processes on one project, as `torchrun` starts them: the same bytes, and no harm where one of them dies."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bare_banks import digests, leftovers, without_shards
from commands import run_warm
from dpf_release.core.ranks import Ranks
from dpf_release.errors import VaultError
from dpf_release.owner.featurize import featurize
from dpf_release.owner.poison import write_candidate
from dpf_release.owner.project import Project
from dpf_release.publish.package import package
from dpf_release.release.release import Release

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"}


def two_ranks(*command: str, folder: Path, before: str = "") -> list[tuple[int, str, str]]:
    """Two ranks of a command, without the seconds that `torchrun` and two imports of torch take.

    Returns:
        Of each: exit status, standard output and standard error.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    return [(status, out, err) for status, _, out, err in run_warm(command, folder, before, ranks)]


def run_two_ranks(*command: str, folder: Path) -> tuple[str, str]:
    """What two ranks of a command that ends well printed."""
    statuses, out, err = zip(*two_ranks(*command, folder=folder), strict=True)
    assert statuses == (0, 0), err
    return "".join(out), "".join(err)


def ranks_of(agent: int) -> dict[int, int]:
    """Returns rank → process id of the processes that a `torchrun` started."""
    found = {}
    for path in Path("/proc").iterdir():
        if not path.name.isdigit():
            continue
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            variables = dict(
                pair.split(b"=", 1) for pair in (path / "environ").read_bytes().split(b"\0") if b"=" in pair
            )
        except OSError:  # it has just ended
            continue
        if parent == agent and b"RANK" in variables:
            found[int(variables[b"RANK"])] = int(path.name)
    return found


def is_held(folder: Path) -> bool:
    """Whether any process holds the lock of a folder; a file that nobody holds is no lock."""
    if not (folder / ".lock").exists():
        return False
    with (folder / ".lock").open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


# Banks.


def test_two_ranks_write_the_bytes_of_one(project_folder: Path) -> None:
    vault = project_folder / "vault"
    before = without_shards(vault / "features")
    candidate = without_shards(vault / "candidates" / "default" / "features")
    out, err = run_two_ranks("featurize", folder=project_folder)
    assert "To write (rank 0 of 2): 60 rows in 3 of 3 shards" in err  # of 119 in 6
    assert out.count("Wrote ") == 1  # the first rank alone prints
    assert digests(vault / "features") == before
    out, _ = run_two_ranks("poison", folder=project_folder)
    assert digests(vault / "candidates" / "default" / "features") == candidate
    assert out.count("px2s4 ssim") == 2  # val and test, once
    assert json.loads((vault / "reports" / "default" / "measurements.json").read_text())["val"]["rows"] == 12
    assert not leftovers(project_folder)
    assert set(before.values()).isdisjoint(candidate.values())


SLOW = """
import os, sys, time
from dpf_release.images.dataset import Pictures
stream = Pictures.stream
def slow(self, batches):
    for item in stream(self, batches):
        time.sleep(0.1)
        yield item
Pictures.stream = slow
from dpf_release.cli.main import main
sys.argv = ["dpf-release", "featurize"]
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0])
def test_a_rank_that_is_killed_ends_the_run_and_the_next_goes_on_to_the_same_bytes(
    project_folder: Path, victim: int
) -> None:
    features = project_folder / "vault" / "features"
    before = without_shards(features)
    (project_folder / "slow.py").write_text(SLOW)
    with (project_folder / "log").open("w") as log:
        agent = subprocess.Popen(
            [*TORCHRUN, "slow.py"], cwd=project_folder, stdout=log, stderr=log, env=ENVIRONMENT, text=True
        )
        try:
            deadline = time.monotonic() + 60
            while len(list(features.glob("*/shard-*.h5"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert is_held(project_folder / "vault")
            os.kill(ranks_of(agent.pid)[victim], signal.SIGKILL)
            assert agent.wait(timeout=30) != 0
        finally:
            agent.kill()
            agent.wait()
    kept = {name: digest for name, digest in digests(features).items() if name.endswith(".h5")}
    assert 2 <= len(kept) < 6
    assert kept.items() < before.items()  # whole shards, nothing else
    assert not (features / "index.json").exists()
    assert not is_held(project_folder / "vault")
    featurize(Project.open(project_folder / "dpf.toml"))
    assert digests(features) == before
    assert not leftovers(project_folder)


# Trainings.


@pytest.mark.slow
def test_what_two_ranks_trained_and_fitted_is_of_use(project_folder: Path) -> None:
    config = project_folder / "dpf.toml"
    config.write_text(config.read_text().replace("epochs = 12", "epochs = 2"))  # of ψ
    before = digests(project_folder / "vault")
    out, _ = run_two_ranks("train", "--restart", "--epochs", "2", folder=project_folder)
    assert out.count("val: top-1") == 1
    featurize(Project.open(config), restart=True)
    out, _ = run_two_ranks("fit-poison", "--restart", "--epochs", "12", folder=project_folder)
    assert out.count("Fitted default") == 1
    after = digests(project_folder / "vault")
    changed = {name for name in before if after.get(name) != before[name]}
    assert changed >= {
        "network/phi.safetensors",
        "reconstructors/px2s4.safetensors",
        "functions/default/state.safetensors",
    }
    assert not [name for name in after if "checkpoint" in name]
    assert not leftovers(project_folder)
    project = Project.open(config)
    with pytest.raises(VaultError, match=r"candidate\.json"):  # what is there is of the function before
        package(project)
    write_candidate(project)
    package(project, second_function="for a test")  # the vault has published another function's release
    assert len(Release.open(project_folder / "release").bank("train")) == 95


# Everything else that needs ranks, in one start: each result is asserted on by a test below.
TOGETHER = """
import json, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from dpf_release.models import training
from dpf_release.errors import DPFReleaseError
from dpf_release.publish.package import package
from dpf_release.owner.project import Project
from dpf_release.owner.fit_poison import fit_poison
from dpf_release.owner.train import train
from dpf_release.core.ranks import Ranks
from dpf_release.models.training import Recipe, fit

torch.set_num_threads(1)
training.CHECKPOINT_EVERY_SECONDS = -1.0
ranks, out, found = Ranks.of_torchrun(), Path(sys.argv[1]), {}
found["rank"] = [ranks.rank, ranks.world_size, ranks.is_first]
found["share"] = list(range(7))[ranks.share(7)]
found["total"] = ranks.total(np.array([1, 10 * ranks.rank])).tolist()
found["any"] = ranks.total(np.array([True, ranks.is_first])).tolist()
found["from_first"] = ranks.from_first(np.array([7.0 - 5 * ranks.rank])).tolist()
done = []
ranks.once(lambda: done.append(1))
found["once"] = len(done)


def refusal(work):
    try:
        work()
    except DPFReleaseError as error:
        return [type(error).__name__, str(error)]
    return None


def project(**overrides):
    return Project.open(Path("dpf.toml"), {key.replace("__", "."): value for key, value in overrides.items()})


found["package"] = refusal(lambda: package(project()))
found["train 15"] = refusal(lambda: train(project(train__batch_size=15), restart=True))
found["fit-poison 15"] = refusal(lambda: fit_poison(project(poison__batch_size=15), restart=True))


class Toy:
    def __init__(self, rows=18, fail_at=-1):
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 1))
        draw = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(rows, 3, 2, 2, generator=draw)
        self.wanted = self.inputs.mean(dim=(1, 2, 3))[:, None] * 5
        self.read, self.fail_at = [], fail_at

    def read_batch(self, rows, generator):
        if len(self.read) == self.fail_at:
            raise ConnectionResetError("the disk is gone")
        self.read.append(rows.tolist())
        return self.inputs[rows], self.wanted[rows]

    def fit(self, ranks, recipe, **options):
        loss = lambda network, batch: {"loss": F.mse_loss(network(batch[0]), batch[1])}
        device = torch.device("cpu")
        history = fit(
            self.network, len(self.inputs), self.read_batch, loss, recipe, title="t", device=device, ranks=ranks,
            **options,
        )
        weights = torch.cat([parameter.detach().flatten() for parameter in self.network.parameters()]).tolist()
        return {"weights": weights, "read": self.read, "losses": [epoch["loss"] for epoch in history.epochs]}


recipe = Recipe(epochs=3, batch_size=4, learning_rate=0.02, optimizer="sgd", bf16="off")
found["fit together"] = Toy().fit(ranks, recipe)
found["fit alone"] = Toy().fit(Ranks(), recipe)
found["fit alone, other batch"] = Toy().fit(Ranks(), replace(recipe, batch_size=2))
checkpoint = out / "checkpoint.safetensors"
for fail_at in (2, 6):
    checkpoint.unlink(missing_ok=True) if ranks.is_first else None
    ranks.wait()
    cut = Toy(fail_at=fail_at)
    try:
        cut.fit(ranks, recipe, checkpoint=checkpoint)
    except ConnectionResetError:
        ranks.wait()
    found[f"fit resumed {fail_at}"] = Toy().fit(ranks, recipe, checkpoint=checkpoint)
found["fit 5"] = refusal(lambda: Toy().fit(ranks, replace(recipe, batch_size=5)))
few = Toy(rows=2)
found["fit few"] = refusal(lambda: found.update(few=few.fit(ranks, recipe))) or found["few"]
found["fit few alone"] = Toy(rows=2).fit(Ranks(), recipe)
(out / f"{ranks.rank}.json").write_text(json.dumps(found))
sys.exit()
"""


@pytest.fixture(scope="module")
def together(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    out = tmp_path_factory.mktemp("together")
    project = Path(shutil.copytree(finished, out / "shapes"))
    ended = two_ranks(str(out), folder=project, before=TOGETHER)
    assert [status for status, _, _ in ended] == [0, 0], ended
    vaults = digests(finished / "vault"), digests(project / "vault")
    lost = sorted(name for name, digest in vaults[0].items() if vaults[1].get(name) != digest)
    return [json.loads((out / f"{rank}.json").read_text()) | {"lost": lost} for rank in (0, 1)]


@pytest.mark.slow
def test_ranks_know_who_they_are_and_what_the_others_have(together: list[dict[str, Any]]) -> None:
    assert [found["rank"] for found in together] == [[0, 2, True], [1, 2, False]]
    assert [found["share"] for found in together] == [[0, 2, 4, 6], [1, 3, 5]]
    for found in together:
        assert found["total"] == [2, 10]
        assert found["any"] == [2, 1]
        assert found["from_first"] == [7.0]
    assert [found["once"] for found in together] == [1, 0]
    alone = Ranks()
    assert (alone.rank, alone.world_size, alone.is_first) == (0, 1, True)
    assert alone.total(np.array([3])).tolist() == alone.from_first(np.array([3])).tolist() == [3]
    assert list(range(7))[alone.share(7)] == list(range(7))


@pytest.mark.slow
def test_what_one_process_must_do_is_refused_to_several(together: list[dict[str, Any]]) -> None:
    for found in together:
        kind, message = found["package"]
        assert kind == "RankError"
        assert "expected one process for this step, found several. Run it without torchrun." in message


@pytest.mark.slow
def test_a_batch_that_the_ranks_cannot_share_is_refused_by_name(together: list[dict[str, Any]]) -> None:
    for found in together:
        for key, title in (
            ("train 15", "train"),
            ("fit-poison 15", "poison"),
        ):
            kind, message = found[key]
            assert kind == "ConfigError"
            assert f"batch_size that 2 ranks can share equally, found 15 under [{title}]. Set it to 14." in message
        assert found["fit 5"][0] == "ConfigError"


@pytest.mark.slow
def test_what_several_ranks_are_refused_costs_nothing(together: list[dict[str, Any]]) -> None:
    assert together[0]["lost"] == []  # in spite of --restart


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns_from_the_same_batches(together: list[dict[str, Any]]) -> None:
    first, second = (found["fit together"] for found in together)
    alone, other = together[0]["fit alone"], together[0]["fit alone, other batch"]
    assert [one + two for one, two in zip(first["read"], second["read"], strict=True)] == alone["read"]
    assert {len(rows) for rows in first["read"]} == {2}
    np.testing.assert_allclose(first["weights"], alone["weights"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(first["losses"], alone["losses"], rtol=1e-4)
    assert first["weights"] == second["weights"]
    assert np.abs(np.array(other["weights"]) - alone["weights"]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("fail_at", [2, 6])
def test_two_ranks_cut_off_and_resumed_end_as_those_that_were_not(together: list[dict[str, Any]], fail_at: int) -> None:
    for found in together:
        whole, resumed = found["fit together"], found[f"fit resumed {fail_at}"]
        assert resumed["read"] == whole["read"][fail_at:]
        assert resumed["weights"] == whole["weights"]
        assert resumed["losses"] == whole["losses"]


@pytest.mark.slow
def test_fewer_rows_than_a_batch_are_shared_all_the_same(together: list[dict[str, Any]]) -> None:
    for found in together:
        assert isinstance(found["fit few"], dict), found["fit few"]
        np.testing.assert_allclose(found["fit few"]["weights"], found["fit few alone"]["weights"], rtol=1e-4, atol=1e-6)


# Without `torchrun`, which would end the other rank before it can speak.
DYING = """
import os, signal, sys
import torch
import torch.nn.functional as F
from torch import nn
from dpf_release.errors import RankError
from dpf_release.core.ranks import Ranks
from dpf_release.models.training import Recipe, fit

torch.set_num_threads(1)
ranks, asked = Ranks.of_torchrun(), 0

def read_batch(rows, generator):
    global asked
    asked += 1
    if asked == 6 and ranks.rank == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.randn(len(rows), 3, 8, 8), torch.randn(len(rows), 1)

network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 1))
loss = lambda network, batch: {"loss": F.mse_loss(network(batch[0]), batch[1])}
try:
    recipe, device = Recipe(9, 4, 0.01, bf16="off"), torch.device("cpu")
    fit(network, 64, read_batch, loss, recipe, title="t", device=device, ranks=ranks)
except RankError as error:
    print(error)
    sys.exit(1)
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_whose_neighbour_dies_in_a_training_says_so(tmp_path: Path, victim: int) -> None:
    ended = two_ranks(str(victim), folder=tmp_path, before=DYING)
    assert ended[victim][0] == -signal.SIGKILL
    status, out, error = ended[1 - victim]
    assert status == 1, error
    assert "another rank ended, or cannot be reached" in out, error
