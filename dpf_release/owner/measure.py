"""What a candidate keeps and what it hides, measured on the vault's side; the second half of `poison`.

`val` is measured from the candidate's bank as it lies on disk. `test` is never released: P is applied to it in memory.
These are the paper's own tests against attackers that P knew. They are a floor, not a claim.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dpf_release.bank.format import INDEX, SplitName
from dpf_release.bank.reader import FeatureBank
from dpf_release.bank.rows import RowSource
from dpf_release.core.arrays import Rows
from dpf_release.core.files import make_folder, sha256_of
from dpf_release.core.ranks import Ranks
from dpf_release.errors import BankError, ConfigError
from dpf_release.images.grid import draw_grid
from dpf_release.models.metrics import bootstrap_interval, l1, mean_absolute_error, psnr, ssim, topk_correct
from dpf_release.models.reconstructors import Reconstructor
from dpf_release.models.weights import load_state
from dpf_release.owner.adversaries import attribute_classifier, attribute_of_rows, straw_man
from dpf_release.owner.fitted import FittedFunction, load_function
from dpf_release.owner.project import Project
from dpf_release.poisoning.objective import AttributeAttacker

RECONSTRUCTED_ROWS = 2000
FIGURE_ROWS = 8
PSNR_LIMIT = 100.0  # of equal pictures it is infinite, which is no number for JSON


def measure(project: Project, name: str = "default") -> dict[str, Any]:
    """Measures a candidate, writes `measurements.json` and `reconstructions.png` under the vault's reports.

    Returns:
        For `val` and `test`: rows; φ2's scores on clean and poisoned rows, with the paired difference and its bootstrap
        95 % interval; for each straw man L1, PSNR, SSIM and |SSIM| of the reconstructions, means over images, clean and
        poisoned; for each attribute classifier the accuracy, clean and poisoned. Under `torchrun` the first rank
        measures, the others return nothing.
    """
    if not project.ranks.is_first:
        return {}
    project = replace(project, ranks=Ranks())
    with project.working(public=True):
        return _measure(project, name)


def measure_task(project: Project, name: str = "default") -> dict[str, Any]:
    """Only what φ2 makes of the candidate's `val`: the same numbers as in `measure`, of the bank as it lies on disk.

    The vault is held by the caller; nothing is written.
    """
    load_function(project, name)  # a candidate of another featurizer, or of rows since written anew, is refused
    report = _Judge(project, name, [], []).compare("val", project.private_bank("val"), _candidate(project, name))
    return dict(report["task"])


def classifier_file(project: Project, name: str) -> bytes:
    """φ2 of a candidate as it would be published: Φ's, or one that was trained on the candidate's rows."""
    if project.config.network.classifier == "trained":
        return project.cut.classifier_file
    path = project.vault.candidate(name) / "model" / "classifier.safetensors"
    return project.vault.read_bytes(path, f"poison --name {name}")


def classifier_of(project: Project, name: str) -> nn.Module:
    """The same as a network, frozen."""
    if project.config.network.classifier == "trained":
        return project.frozen(project.cut.split.classifier)
    network = project.new_classifier()
    network.load_state_dict(load_state(Path("classifier.safetensors"), classifier_file(project, name)))
    return project.frozen(network)


def _candidate(project: Project, name: str) -> FeatureBank:
    """Its `val`, as it lies on disk."""
    return FeatureBank(project.vault.opened(project.vault.candidate(name) / "features", INDEX, "val"), "val")


def _measure(project: Project, name: str) -> dict[str, Any]:
    vault, function, candidate = project.vault, load_function(project, name), _candidate(project, name)
    recipe = vault.read_record(vault.function(name) / "function.json", "fit-poison")["recipe"]
    judge = _Judge(project, name, *([], []) if function.chain.draws_rows else (recipe["straw_men"], recipe["confuse"]))
    clean = project.private_bank("val")
    report: dict[str, Any] = {
        "function": recipe["function"],
        "objective": recipe["objective"] if function.chain.needs_adversaries else None,
        "index_sha256": sha256_of(candidate.folder / INDEX),
        "val": judge.compare("val", clean, candidate),
        "test": _on_test(project, function, judge),
    }
    folder = make_folder(vault.reports(name))
    judge.draw(folder / "reconstructions.png", clean, candidate)
    vault.write_json(folder / "measurements.json", report)
    return report


def _on_test(project: Project, function: FittedFunction, judge: _Judge) -> dict[str, Any]:
    if function.chain.draws_rows:
        return {"not_measured": "rows are drawn from the training images alone"}
    try:
        test = project.private_bank("test")
        secret = hashlib.sha256(function.digest.encode()).digest()  # any secret will do: these rows go nowhere
        plans = function.chain.plan(test, judge.phi_2, secret)
    except (BankError, ConfigError) as error:  # no test split; `recombine` with fewer than k rows of a class
        return {"not_measured": str(error)}
    return judge.compare("test", test, function.chain.on(test, plans))


class _Judge:
    """φ2 and the byproduct attackers, asked about clean and poisoned rows."""

    def __init__(self, project: Project, name: str, straw_men: list[str], attributes: list[str]) -> None:
        self.project = project
        self.draws_rows = load_function(project, name).chain.draws_rows
        self.phi_2 = classifier_of(project, name)
        self.reconstructors = {name: straw_man(project, name) for name in straw_men}
        self.attributes = {column: attribute_classifier(project, column) for column in attributes}

    def compare(self, split: SplitName, clean: FeatureBank, poisoned: RowSource) -> dict[str, Any]:
        answers = self._run(self.phi_2, clean), self._run(self.phi_2, poisoned)
        reconstruction = {
            name: {
                f"{metric}_{kind}": float(values.mean())
                for kind, source in (("clean", clean), ("poisoned", poisoned))
                for metric, values in self._likeness(split, network, source).items()
            }
            for name, network in self.reconstructors.items()
        }
        identified = {
            column: self._identified(split, column, attacker, clean, poisoned)
            for column, attacker in self.attributes.items()
        }
        task = self._task(*answers, clean.targets, poisoned.targets)
        return {"rows": len(clean), "task": task, "reconstruction": reconstruction, "attributes": identified}

    def draw(self, path: Path, clean: FeatureBank, poisoned: RowSource) -> None:
        if not self.reconstructors:
            return
        rows = np.arange(min(FIGURE_ROWS, len(clean)))
        network = next(iter(self.reconstructors.values()))
        grid = {
            "original": self._pictures("val", rows),
            "before": self._batch(network, clean, rows),
            "after": self._batch(network, poisoned, rows),
        }
        self.project.vault.write_bytes(path, draw_grid(grid))

    def _task(
        self, clean: Tensor, poisoned: Tensor, targets: NDArray[Any], targets_poisoned: NDArray[Any]
    ) -> dict[str, Any]:
        pairs = [(clean, torch.from_numpy(targets)), (poisoned, torch.from_numpy(targets_poisoned))]
        wanted, drawn = pairs[0][1], self.draws_rows
        if self.project.config.task.kind == "regression":
            errors = [mean_absolute_error(outputs, of).mean(dim=1).numpy() for outputs, of in pairs]
            return _apart("mae", *errors) if drawn else _paired("mae", *errors)
        right = [topk_correct(outputs, of, 1).float().numpy() for outputs, of in pairs]
        if drawn:
            return _apart("top1", *right)
        report = _paired("top1", *right)
        if clean.shape[1] > 5:
            report["top5_clean"], report["top5_poisoned"] = (
                float(topk_correct(outputs, wanted, 5).float().mean()) for outputs in (clean, poisoned)
            )
        divergence = (clean.softmax(1) * (clean.log_softmax(1) - poisoned.log_softmax(1))).sum(1)
        return report | {"kl": float(divergence.mean()), "kl_95": list(bootstrap_interval(divergence))}

    def _likeness(self, split: SplitName, network: Reconstructor, source: RowSource) -> dict[str, NDArray[Any]]:
        parts: dict[str, list[Tensor]] = {"l1": [], "psnr": [], "ssim": [], "abs_ssim": []}
        for start in range(0, min(len(source), RECONSTRUCTED_ROWS), 256):
            rows = np.arange(start, min(start + 256, len(source), RECONSTRUCTED_ROWS))
            original, reconstruction = self._pictures(split, rows), self._batch(network, source, rows)
            parts["l1"].append(l1(reconstruction, original))
            parts["psnr"].append(psnr(reconstruction, original).clamp_max(PSNR_LIMIT))
            parts["ssim"].append(ssim(reconstruction, original))
            parts["abs_ssim"].append(parts["ssim"][-1].abs())
        return {metric: torch.cat(values).numpy() for metric, values in parts.items()}

    def _identified(
        self, split: SplitName, column: str, attacker: AttributeAttacker, clean: RowSource, poisoned: RowSource
    ) -> dict[str, Any]:
        labels = attribute_of_rows(self.project, column, split)
        known = np.flatnonzero(np.isin(labels, attacker.values))
        if not len(known):
            return {"not_measured": f"no row of {split} has a value of {column!r} that the classifier knows"}
        truth = np.searchsorted(attacker.values, labels[known])
        right = (
            (self._run(attacker.network, source)[known].argmax(1).numpy() == truth).astype(np.float32)
            for source in (clean, poisoned)
        )
        return _paired("top1", *right) | {"rows": len(known), "values": len(attacker.values)}

    def _pictures(self, split: SplitName, rows: Rows) -> Tensor:
        return self.project.private_images.pictures.read(self.project.bank_order[0][split][rows]).float() / 255

    def _run(self, network: nn.Module, source: RowSource) -> Tensor:
        starts = range(0, len(source), 256)
        return torch.cat([self._batch(network, source, np.arange(s, min(s + 256, len(source)))) for s in starts])

    def _batch(self, network: nn.Module, source: RowSource, rows: Rows) -> Tensor:
        features = torch.from_numpy(np.asarray(source.read(rows), np.float32)).to(self.project.device)
        with torch.inference_mode():
            out: Tensor = network(features.contiguous(memory_format=torch.channels_last)).float().cpu()
        return out


def _apart(metric: str, clean: NDArray[Any], drawn: NDArray[Any]) -> dict[str, Any]:
    """As `_paired`, where the rows are not the same: the difference is of means, with its bootstrap 95 % interval."""
    report: dict[str, Any] = {}
    for kind, values in (("clean", clean), ("poisoned", drawn)):
        report |= {f"{metric}_{kind}": float(values.mean()), f"{metric}_{kind}_95": list(bootstrap_interval(values))}
    generator = np.random.default_rng(0)
    means = [generator.choice(values, (2000, len(values))).mean(1) for values in (clean, drawn)]
    low, high = np.quantile(means[0] - means[1], [0.025, 0.975])
    difference = {f"{metric}_difference": float(clean.mean() - drawn.mean())}
    return report | difference | {f"{metric}_difference_95": [float(low), float(high)]}


def _paired(metric: str, clean: NDArray[Any], poisoned: NDArray[Any]) -> dict[str, Any]:
    """Means of a metric on the same rows, and what poisoning costs: clean minus poisoned; each with a 95 % interval."""
    report: dict[str, Any] = {}
    for kind, values in (("clean", clean), ("poisoned", poisoned), ("difference", clean - poisoned)):
        report[f"{metric}_{kind}"] = float(values.mean())
        report[f"{metric}_{kind}_95"] = list(bootstrap_interval(values))
    return report
