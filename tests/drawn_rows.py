"""What those who attack drawn rows need of a project, in memory: images of Gaussian features, no network trained."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attackers import Memory
from dpf_release.attacks.threat_models import Budget, Kept, Remembered
from dpf_release.bank.rows import Concat
from dpf_release.evaluation.drawn_controls import drawn_from
from dpf_release.evaluation.targets import Target, Truth, draw_truth, held
from dpf_release.evaluation.views import Setting
from dpf_release.images.decode import Preprocess
from dpf_release.owner.workbench import Workbench
from dpf_release.poisoning.context import Split
from dpf_release.poisoning.plan import Contributors, FeatureSpec

SIZE, SHAPE = (16, 16), (48, 4, 4)
LIMITS = {"auc": 0.6, "tpr": 0.03, "top1": 0.05, "leakage": 0.1, "re_identification": 0.05}


class BeforeReLU(nn.Module):
    """Normalised images (n, 3, 16, 16) → (n, 48, 4, 4): a rotation of their numbers."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.turn = nn.Buffer(torch.linalg.qr(torch.randn(768, 768, generator=generator)).Q)

    def forward(self, images: Tensor) -> Tensor:
        return (images.flatten(1) @ self.turn).unflatten(1, SHAPE)


@dataclass
class Bank:
    """Rows before the ReLU, which is applied unless `before_relu` was asked for."""

    stored: NDArray[np.float16]
    targets: NDArray[Any]
    rectified: bool = True

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def ids(self) -> NDArray[np.uint8]:
        return np.random.default_rng(1).integers(0, 256, (len(self), 16), np.uint8)

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        return np.maximum(self.stored[rows], 0) if self.rectified else self.stored[rows]

    def before_relu(self) -> Bank:
        return Bank(self.stored, self.targets, rectified=False)


class Images:
    """Images in memory, with splits: `train`, `val` (none), `test`."""

    digest = "images"

    def __init__(self, images: Tensor, targets: NDArray[Any], splits: NDArray[np.str_], persons: list[str]) -> None:
        self.images, self.splits = images, splits
        self.table = SimpleNamespace(targets=targets, attributes={"person": persons})
        self.pictures = SimpleNamespace(read=lambda rows: images[torch.from_numpy(np.asarray(rows))])

    def rows(self, split: str) -> NDArray[np.int64]:
        return np.flatnonzero(self.splits == split)


def drawn_images(labels: NDArray[np.int64], seed: int) -> Tensor:
    """(n, 3, 16, 16) uint8: around a mean for each label, with variances that fall off as those of features do."""
    axes = np.linalg.qr(np.random.default_rng(0).standard_normal((768, 768)))[0]
    scale = 3 / np.sqrt(1 + np.arange(768))
    means = np.random.default_rng(7).standard_normal((int(labels.max()) + 1, 768)) * scale * 0.5
    points = means[labels] + np.random.default_rng(seed).standard_normal((len(labels), 768)) * scale
    pixels = 0.5 + 0.1 * points @ axes
    return torch.from_numpy(np.clip(np.round(255 * pixels), 0, 255).astype(np.uint8)).unflatten(1, (3, *SIZE))


def workbench(each: int = 1000, group: str | None = None, public: int = 1600) -> Workbench:
    """S of two classes with `each` images of train and as many of test, two images a person; and other images Q."""
    preprocess, before = Preprocess(SIZE, None, (0.5, 0.5, 0.5), (0.1, 0.1, 0.1)), BeforeReLU().eval()
    phi_1 = nn.Sequential(before, nn.ReLU()).eval()
    torch.manual_seed(0)
    phi_2 = nn.Sequential(nn.Flatten(), nn.Linear(768, 2)).eval()

    def stored(images: Tensor) -> NDArray[np.float16]:
        with torch.no_grad():
            found: NDArray[np.float16] = before(preprocess.normalise(images)).numpy().astype(np.float16)
        return found

    labels = np.tile(np.repeat([0, 1], each), 2)
    splits = np.repeat(["train", "test"], 2 * each)
    private = Images(drawn_images(labels, 1), labels, splits, [str(number // 2) for number in range(4 * each)])
    others = np.arange(public) % 2 + 2
    of_public = Images(drawn_images(others, 2), others, np.full(public, "train"), [])
    of_public.splits[-public // 10 :] = "val"
    mine, theirs = private.rows("train"), of_public.rows("train")
    train = Bank(stored(private.images[mine]), labels[mine])
    bank = Bank(stored(of_public.images[theirs]), others[theirs])
    rows = SimpleNamespace(
        rows=Concat([train]),
        bank_id="bank",
        table_rows=mine,
        images=private,
        pictures=lambda numbers: private.pictures.read(mine[numbers]),
    )
    memory = Memory()
    found: Any = SimpleNamespace(
        phi_1=phi_1,
        phi_2=phi_2,
        before_relu=before,
        features=FeatureSpec(SHAPE, True),
        preprocess=preprocess,
        task="classification",
        device=torch.device("cpu"),
        bf16="off",
        featurizer_sha256="1",
        classifier_sha256="2",
        public=of_public,
        kept=Kept(memory.load, memory.save, memory.checkpoint),
        limits=LIMITS,
        attribute=None,
        group=group,
        private_bank=lambda split: train,
        public_bank=lambda: bank,
        private=rows,
    )
    return found  # type: ignore[no-any-return]


def setting_of(workbench: Workbench, target: Target, rows: int = 1000) -> Setting:
    truth: Truth = draw_truth(workbench, target, rows, 0)
    remembered = {"train": Remembered(), "val": Remembered()}
    return Setting(workbench, truth, Budget(1000, 1, 0), 0, remembered)


def mixture_target(workbench: Workbench, spec: str) -> Target:
    """A bank that a mixture draws from all of S train."""
    train = workbench.private_bank("train")
    mine = Split(train, workbench.private.pictures, train.before_relu())
    rows, chain = drawn_from(workbench, spec, mine, bytes(32))
    mechanism = chain.mechanism("image")
    return Target(
        spec,
        held(rows),
        lambda rows: (rows, np.arange(len(rows))),
        lambda rows: Contributors.nobody(),
        spec,
        function=spec,
        draws_rows=True,
        learned=chain.state(),
        bound_mu=mechanism.mu if mechanism else None,
    )
