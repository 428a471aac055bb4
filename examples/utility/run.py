"""What drawn rows are worth beside other classes (U4): docs/measurements/utility-NAME.json.

    python examples/utility/run.py cifar10-u4 --config /tmp/mixture/cifar10/dpf.toml

The project is one of `examples/mixture/run.py`, with its features. One classifier of three layers tells S's classes and
Q's apart; a fifth of Q and S test judge. S's side: clean rows, own images, or drawn rows; Q's side: its real rows, or
rows drawn by the same procedure, as a user draws them (`release.draw`). What is done already is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).parents[1] / "mixture"))
from choices import share_right, trained  # noqa: E402
from settings import DELTA, MEASUREMENTS  # noqa: E402

from dpf_release import Project, featurize, fit_poison  # noqa: E402
from dpf_release.bank.reader import FeatureBank  # noqa: E402
from dpf_release.bank.rows import RowSource, Select  # noqa: E402
from dpf_release.owner.fitted import load_function  # noqa: E402
from dpf_release.poisoning.mixture import Draw, drawn_anew  # noqa: E402

FUNCTIONS = {
    "epsilon 4": f"mixture:epsilon=4,delta={DELTA}",
    "no bound, 8 groups": "mixture:epsilon=inf,groups=8",
    "epsilon 1": f"mixture:epsilon=1,delta={DELTA}",
}
OWN, HELD_OUT = (10, 100), 0.2
Labelled = tuple[NDArray[np.float16], NDArray[np.int64]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["cifar10-u4"])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    file = MEASUREMENTS / f"utility-{options.name}.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    project = Project.open(options.config)
    featurize(project)
    sides = Sides.of(project)
    for seed in range(options.seeds):
        for name, rows in sides.each(project, partial(_is_done, results, seed)):
            network = trained(*rows, 2 * sides.classes, options.epochs, seed)
            found = [round(100 * share_right(network, *of), 1) for of in (sides.test, sides.private_test)]
            results.setdefault(name, []).append(found)  # of all classes, of S's
            file.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
            print(f"{name}: {results[name][-1]}", flush=True)


def _is_done(results: dict[str, list[list[float]]], seed: int, name: str) -> bool:
    return seed < len(results.get(name, []))


@dataclass(frozen=True, eq=False)
class Sides:
    """Rows of S (classes 0 to K) and of Q (K to 2 K), for training and for judging."""

    classes: int  # K
    private: Labelled
    own: list[Labelled]  # of each class of S, a half of its test rows
    private_test: Labelled  # the other half
    public: RowSource  # of Q, to train on, before the last ReLU
    others: Labelled  # the same as they are, with their labels here
    test: Labelled  # both sides, as many of each

    @classmethod
    def of(cls, project: Project) -> Sides:
        """From the vault of a project, of which S test and a fifth of Q judge."""
        public = FeatureBank(project.vault.root / "public_features", "train")
        with project.working():
            private, test = (_all(project.private_bank(split)) for split in ("train", "test"))
        classes, generator = int(private[1].max()) + 1, np.random.default_rng(0)
        of_class = [generator.permutation(np.flatnonzero(test[1] == label)) for label in range(classes)]
        judging = np.concatenate([rows[len(rows) // 2 :] for rows in of_class])
        order = generator.permutation(len(public))
        training = np.sort(order[int(HELD_OUT * len(order)) :])
        others = _all(Select(public, np.sort(order[: len(judging)])))  # fewer than are held out
        assert len(judging) <= HELD_OUT * len(order)
        private_test = test[0][judging], test[1][judging]
        mine = _all(Select(public, training))
        return cls(
            classes,
            private,
            [(test[0][rows[: len(rows) // 2]], test[1][rows[: len(rows) // 2]]) for rows in of_class],
            private_test,
            Select(public.before_relu(), training),
            (mine[0], mine[1] + classes),
            _joined(private_test, (others[0], others[1] + classes)),
        )

    def each(self, project: Project, done: Callable[[str], bool]) -> Iterator[tuple[str, Labelled]]:
        """What is not done: its name, and the rows and labels to train on."""
        if not done("clean beside real"):
            yield "clean beside real", _joined(self.private, self.others)
        for m in OWN:
            if not done(name := f"own {m} beside real"):
                yield name, _joined(*[(rows[:m], labels[:m]) for rows, labels in self.own], self.others)
        for number, (function, spec) in enumerate(FUNCTIONS.items()):
            beside, both = f"{function}, drawn beside real", f"{function}, drawn on both sides"
            if done(beside) and done(both):
                continue
            if not (project.vault.function(f"u4-{number}") / "state.safetensors").exists():
                fit_poison(project, name=f"u4-{number}", function=spec)
            fitted = load_function(project, f"u4-{number}")
            procedure = fitted.chain.procedure
            assert procedure is not None
            with project.working():
                drawn = _all(fitted.chain.on(project.private_bank("train"), fitted.plans["train"]))
            if not done(beside):
                yield beside, _joined(drawn, self.others)
            if not done(both):
                theirs, labels = _all(drawn_anew(procedure, project.cut.record.feature_shape, self.public, Draw()))
                yield both, _joined(drawn, (theirs, labels + self.classes))


def _all(rows: RowSource) -> Labelled:
    parts = [rows.read(some).astype(np.float16) for some in np.array_split(np.arange(len(rows)), 20)]
    return np.concatenate(parts), np.asarray(rows.targets, np.int64)


def _joined(*parts: Labelled) -> Labelled:
    return np.concatenate([rows for rows, _ in parts]), np.concatenate([labels for _, labels in parts])


if __name__ == "__main__":
    main()
