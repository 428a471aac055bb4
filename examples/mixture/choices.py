"""What `mixture` draws from, chosen on public images alone: docs/measurements/mixture-choices.json.

    python examples/mixture/choices.py --vault /tmp/mixture/pretrained/vault

Three classes of Q stand for S, the others for Q; a small network is trained on the rows that are drawn for them, and
tested on clean features that no statistic has seen. The vault is one of `run.py`, with its features of Q.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from settings import DELTA, MEASUREMENTS
from torch import Tensor, nn

from dpf_release.bank.reader import FeatureBank
from dpf_release.core.privacy import Mechanism
from dpf_release.poisoning import moments
from dpf_release.poisoning.components import Components, principal_components
from dpf_release.poisoning.groups import Coordinates, clusters
from dpf_release.poisoning.mixture import SHARES
from dpf_release.poisoning.moments import Noise
from dpf_release.poisoning.noisy_classes import NoisyClasses
from dpf_release.poisoning.procedure import Procedure

FILE = MEASUREMENTS / "mixture-choices.json"
SEEDS, HELD_OUT, RATE = 2, 0.2, 0.1
Numbers = NDArray[np.float64]
Gaussian = tuple[int, float, Numbers, Numbers]  # class, share of its rows, mean, covariance
SHARES_TRIED = (SHARES, (0.1, 0.3, 0.6), (0.02, 0.1, 0.88), (0.05, 0.6, 0.35))


class Pretended:
    """Q, of which three classes stand for S."""

    def __init__(self, vault: Path, epochs: int) -> None:
        self.epochs = epochs
        stored = FeatureBank(vault / "public_features", "train")
        bank = stored.before_relu()
        self.features = np.concatenate([features for _, features in bank.batches(2000)])
        self.rectified = bool((stored.read([0]) != bank.read([0])).any())
        classes = np.unique(np.asarray(bank.targets), return_inverse=True)[1]
        mine = np.random.default_rng(0).permutation(np.flatnonzero(classes < 3))
        held_out = int(HELD_OUT * len(mine))
        self.test, self.train, self.public = mine[:held_out], np.sort(mine[held_out:]), np.flatnonzero(classes >= 3)
        self.classes = classes.astype(np.int64)

    def clean(self, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        """Features as they are released."""
        found: NDArray[np.float16] = self.features[rows]
        return np.maximum(found, 0) if self.rectified else found

    def score(self, features: NDArray[np.float16], labels: NDArray[np.int64]) -> list[float]:
        """Accuracy on clean features, of a network trained on these; for each seed."""
        test, wanted = self.clean(self.test), self.classes[self.test]
        return [accuracy(features, labels, test, wanted, self.epochs, seed) for seed in range(SEEDS)]

    def drawn(self, space: Components, gaussians: Iterable[Gaussian]) -> list[float]:
        """The same of rows drawn from Gaussians."""
        generator, each = np.random.default_rng(1), len(self.train) // 3
        rows, labels = list[NDArray[np.float16]](), list[int]()
        for label, share, mean, covariance in gaussians:
            values, vectors = np.linalg.eigh(covariance)
            noise = generator.standard_normal((round(share * each), len(mean)))
            points = mean + noise @ (vectors * np.sqrt(np.maximum(values, 0))).T
            features = space.features(points).numpy().reshape(-1, *self.features.shape[1:])
            rows.append((np.maximum(features, 0) if self.rectified else features).astype(np.float16))
            labels += [label] * len(noise)
        return self.score(np.concatenate(rows), np.array(labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vault", type=Path, required=True)
    parser.add_argument("--name", default="pretrained", help="of the experiment that the vault is of")
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    results = known.setdefault(options.name, {})
    pretended = Pretended(options.vault, options.epochs)
    for name, scores in measured(pretended, results):
        results[name] = [round(100 * score, 1) for score in scores]
        MEASUREMENTS.mkdir(parents=True, exist_ok=True)
        FILE.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        print(f"{name}: {results[name]}", flush=True)


def measured(of: Pretended, done: dict[str, list[float]]) -> Iterator[tuple[str, list[float]]]:
    """Each choice that is not done, by name."""
    labels = of.classes[of.train]
    if "clean" not in done:
        yield "clean", of.score(of.clean(of.train), labels)
    for components in (512, 256, 1024):
        if components > len(of.public) // 4:
            continue
        space, private, public = _coordinates(of, components)
        exact = [(private.z[labels == label], label) for label in range(3)]
        if components == 512:
            yield from _clips(of, space, private, public, done)
            yield from _of_each_noise(of, space, private, public, done)
        for covariance in ("of each class", "common"):
            name = f"{components} components, exact, covariance {covariance}"
            if name not in done:
                own = [np.cov(rows.T) for rows, _ in exact]
                used = own if covariance == "of each class" else [np.mean(own, axis=0)] * 3
                yield name, of.drawn(space, [(label, 1.0, rows.mean(0), used[label]) for rows, label in exact])
        name = f"{components} components, exact, 8 groups, common covariance"
        if name not in done:
            yield name, of.drawn(space, _groups(exact))
        for epsilon in (1, 4):
            for shares in SHARES_TRIED:
                name = f"{components} components, epsilon {epsilon}, shares {shares}"
                if name not in done and (components == 512 or shares == SHARES):
                    yield name, of.drawn(space, _noisy(space, private, public, epsilon, shares))


def _noisy(
    space: Components,
    private: Coordinates,
    public: Coordinates,
    epsilon: float,
    shares: tuple[float, float, float] = SHARES,
) -> list[Gaussian]:
    """What `mixture` draws from under a bound."""
    noise = Noise(*Mechanism.calibrated(epsilon, DELTA, shares, "image").noise.values())
    procedure = Procedure.of_public(space, public.z, public.classes, 1, 0)
    return list(NoisyClasses.learned(private, procedure, noise, np.empty((0, 2))).gaussians())


def _clips(
    of: Pretended, space: Components, private: Coordinates, public: Coordinates, done: dict[str, list[float]]
) -> Iterator[tuple[str, list[float]]]:
    """How many rows are clipped: more bias, or more noise."""
    chosen = moments.CLIP_SHARE
    for epsilon in (1, 4):
        for share in (0.99, 0.75, 0.5, 0.25):
            name = f"512 components, epsilon {epsilon}, {share:.0%} of Q not clipped"
            if name not in done:
                moments.CLIP_SHARE = share
                found = _noisy(space, private, public, epsilon)
                moments.CLIP_SHARE = chosen
                yield name, of.drawn(space, found)


def _of_each_noise(
    of: Pretended, space: Components, private: Coordinates, public: Coordinates, done: dict[str, list[float]]
) -> Iterator[tuple[str, list[float]]]:
    """What the noise of the means costs, and what that of the covariance does."""
    rows = [private.z[private.classes == label] for label in range(3)]
    means, within = [some.mean(0) for some in rows], np.mean([np.cov(some.T) for some in rows], axis=0)
    for epsilon in (1, 4):
        found = _noisy(space, private, public, epsilon)
        for name, drawn in {
            "means noisy, covariance exact": [(label, share, mean, within) for label, share, mean, _ in found],
            "means exact, covariance noisy": [
                (label, share, means[label], covariance) for label, share, _, covariance in found
            ],
        }.items():
            name = f"512 components, epsilon {epsilon}, {name}"
            if name not in done:
                yield name, of.drawn(space, drawn)


def _coordinates(of: Pretended, components: int) -> tuple[Components, Coordinates, Coordinates]:
    size = int(np.prod(of.features.shape[1:]))

    def reader(rows: NDArray[np.int64]) -> Callable[[NDArray[np.int64]], NDArray[np.float16]]:
        return lambda numbers: of.features[rows[numbers]]

    space = principal_components(reader(of.public), len(of.public), size, components)

    def coordinates(rows: NDArray[np.int64]) -> Coordinates:
        z = space.coordinates(reader(rows), len(rows))
        return Coordinates(z, of.classes[rows], np.empty((len(rows), 0)), np.arange(len(rows)), 3)

    return space, coordinates(of.train), coordinates(of.public)


def _groups(exact: list[tuple[Numbers, int]]) -> list[Gaussian]:
    parts, within = list[tuple[int, float, Numbers]](), np.zeros(2 * exact[0][0].shape[1:])
    for rows, label in exact:
        group = clusters(rows, 8, 0)
        for number in np.unique(group):
            mine = rows[group == number]
            parts.append((label, len(mine) / len(rows), mine.mean(0)))
            within += len(mine) / sum(len(of) for of, _ in exact) * np.cov(mine.T)
    return [(label, share, mean, within) for label, share, mean in parts]


def accuracy(
    features: NDArray[np.float16],
    labels: NDArray[np.int64],
    test: NDArray[np.float16],
    wanted: NDArray[np.int64],
    epochs: int,
    seed: int,
    batch: int = 128,
) -> float:
    """Share of `test` that a small network finds which was trained on `features` (n, C, h, w)."""
    return share_right(trained(features, labels, int(wanted.max()) + 1, epochs, seed, batch), test, wanted)


def trained(
    features: NDArray[np.float16], labels: NDArray[np.int64], outputs: int, epochs: int, seed: int, batch: int = 128
) -> nn.Module:
    """A network of three layers."""
    torch.manual_seed(seed)
    channels = features.shape[1]
    network = nn.Sequential(
        *(nn.Conv2d(channels, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU()),
        *(nn.Conv2d(128, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, outputs)),
    )
    optimizer = torch.optim.SGD(
        network.parameters(), RATE * (batch / 128) ** 0.5, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    steps = epochs * (len(labels) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE * (batch / 128) ** 0.5, total_steps=steps + 1)
    for _ in range(epochs):
        for some in torch.randperm(len(labels))[: steps // epochs * batch].split(batch):
            loss = F.cross_entropy(network(_tensor(features[some.numpy()])), torch.from_numpy(labels[some.numpy()]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


@torch.inference_mode()
def share_right(network: nn.Module, test: NDArray[np.float16], wanted: NDArray[np.int64]) -> float:
    """Share of rows whose class a network finds."""
    found = torch.cat([network(_tensor(test[first : first + 1000])) for first in range(0, len(test), 1000)])
    return float((found.argmax(1).numpy() == wanted).mean())


def _tensor(features: NDArray[np.float16]) -> Tensor:
    return torch.from_numpy(features.astype(np.float32))


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"{time.monotonic() - started:.0f} s")
