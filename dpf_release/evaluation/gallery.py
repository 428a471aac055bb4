"""Pictures for the report: what an attack's strongest way makes of typical rows, and of those it shows most of.

They are taken while an attack is scored, and kept in the vault, so that the page can be made again without attacking.
Pictures are (n, 3, H, W) uint8, for each attack under `original`, `clean`, `attack`, and for the worst 1 % under
`worst original`, `worst clean`, `worst attack`, `worst fitted`; in the file `A1/original` and so on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from dpf_release.core.arrays import Rows
from dpf_release.core.files import make_folder
from dpf_release.evaluation.scoring import WORST, RowScores, affine_fit
from dpf_release.evaluation.targets import Truth
from dpf_release.owner.vault.vault import Vault
from dpf_release.release.attack_report import AttackReport

Pictures = Mapping[str, Tensor]
FILE = "pictures.safetensors"
SHOWN = 8


def spread(count: int) -> Rows:
    """At most eight of `count` positions, evenly spread: typical ones, chosen before anything is known of them."""
    return np.linspace(0, count - 1, min(SHOWN, count)).astype(np.int64)


def pictures_of(
    truth: Truth, scores: RowScores, reconstruct: Callable[[Rows], Tensor], clean: Callable[[Rows], Tensor]
) -> dict[str, Tensor]:
    """What is shown of an attack: eight typical rows, and of the worst 1 % by affine-fit SSIM eight at most.

    `reconstruct` is its strongest way, of positions in `truth.asked`; `clean` the best that is made of unpoisoned rows,
    by their numbers in the clean bank.
    """
    count = len(scores.primary)
    typical = spread(count)
    worst = np.argsort(-scores.primary, kind="stable")[: min(SHOWN, max(1, round(WORST * count)))]
    own = scores.pictures[worst]  # of a row that is made of several, the one that it shows
    originals, shown = truth.read(own), reconstruct(worst).float().clamp(0, 1)
    return {
        "original": truth.read(truth.asked[typical]),
        "clean": as_bytes(clean(truth.asked[typical])),
        "attack": as_bytes(reconstruct(typical)),
        "worst original": originals,
        "worst clean": as_bytes(clean(own)),
        "worst attack": as_bytes(shown),
        "worst fitted": as_bytes(affine_fit(shown, originals.float() / 255)),
    }


def keep_pictures(vault: Vault, name: str, report: AttackReport, code: str, pictures: Pictures) -> None:
    """An attack's pictures into the vault, beside those of other attacks of the same run."""
    others = {key: tensor for key, tensor in read_pictures(vault, name, report).items() if key.split("/")[0] != code}
    if not pictures and not others:
        return
    kept = others | {f"{code}/{key}": tensor.cpu().contiguous() for key, tensor in pictures.items()}
    folder = make_folder(vault.reports(name))
    vault.write_bytes(folder / FILE, save(kept, {"subject": _subject(report)}))


def read_pictures(vault: Vault, name: str, report: AttackReport) -> dict[str, Tensor]:
    """Those of this very run; none where there are none, or of another bank."""
    path = vault.reports(name) / FILE
    if not vault.holds(path):
        return {}
    data = vault.read_bytes(path, "attack")
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return load(data) if header.get("__metadata__", {}).get("subject") == _subject(report) else {}


def _subject(report: AttackReport) -> str:
    keys = {"index_sha256", "featurizer_sha256", "public_images_sha256", "profile", "seed"}
    return json.dumps(report.model_dump(mode="json", include=keys), sort_keys=True)


def as_bytes(pictures: Tensor) -> Tensor:
    """Pictures in [0, 1] as uint8."""
    return (pictures.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
