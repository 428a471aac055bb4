"""A poisoning function from outside the package, in one file: two networks, fitted in two stages.

    python examples/own_function.py --out /tmp/own-function

On scikit-learn's digits it goes from `fit-poison` to `package`, and is attacked on the way, also by shadow functions of
its own kind (A3), which the attacker fits on the public digits. In a project of your own, lay this file beside
`dpf.toml`, and name it there: `function = "own_function:Squeezed:channels=4"`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dpf_release import PoisoningFunction, Project, attack, featurize, fit_poison, package, poison, train
from dpf_release.attacks.interface import ATTACKS
from dpf_release.bank.rows import RowSource
from dpf_release.cli.demo import new_project
from dpf_release.core.parameters import Parameter, Value
from dpf_release.poisoning.context import FitContext
from dpf_release.poisoning.interface import State
from dpf_release.poisoning.plan import FeatureSpec, Plan

ACCEPTED_RISK = "An example: the images are public, and the attacks were cut short."


class Squeezed(PoisoningFunction):
    """Keeps what fits through a few channels; a network trained against the adversaries then restores φ2's answers."""

    learned_secret, needs_adversaries = True, True
    parameters = (Parameter("channels", 8, 1, 4096, "that a row is squeezed through"),)
    channels: int

    def __init__(self, features: FeatureSpec, **values: Value) -> None:
        super().__init__(features, **values)
        wide = features.shape[0]
        self.squeeze = nn.Sequential(nn.Conv2d(wide, self.channels, 1), nn.ReLU(), nn.Conv2d(self.channels, wide, 1))
        last = nn.ReLU() if features.non_negative else nn.Identity()
        self.restore = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1), nn.ReLU(), nn.Conv2d(wide, wide, 3, padding=1), last
        )

    def fit(self, context: FitContext) -> dict[str, float]:
        """First the squeezing network, to lose as little as it can; then, behind it, the other, by the objective."""

        def lost(network: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
            return {"loss": F.mse_loss(network(batch[0]).float(), batch[0])}

        context.fit(self.squeeze, lost, name="squeeze")
        objective, squeeze = context.objective(), self.squeeze

        def behind(network: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
            return objective(lambda features: network(squeeze(features)), batch)

        return context.fit(self.restore, behind, name="restore")

    def state(self) -> State:
        """The weights of both."""
        parts = {"squeeze": self.squeeze, "restore": self.restore}
        return {f"{part}.{name}": value for part, of in parts.items() for name, value in of.state_dict().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes the weights of both."""
        for part, network in (("squeeze.", self.squeeze), ("restore.", self.restore)):
            network.load_state_dict({name.removeprefix(part): v for name, v in state.items() if name.startswith(part)})

    def apply(self, rows: np.ndarray, source: RowSource, plan: Plan) -> NDArray[np.float32]:
        """Rows through both networks."""
        device = next(self.squeeze.parameters()).device
        with torch.inference_mode():
            features = torch.from_numpy(np.asarray(source.read(rows), np.float32)).to(device)
            poisoned: NDArray[np.float32] = self.restore(self.squeeze(features)).contiguous().cpu().numpy()
        return poisoned

    def statement(self) -> str:
        """See `PoisoningFunction.statement`."""
        return f"Each row is the features of one image, squeezed through {self.channels} channels by a secret network."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("own-function"), help="a new folder")
    parser.add_argument("--images", type=int, default=3000, help="that each training of an attacker is shown")
    options = parser.parse_args()
    project: Project = new_project(options.out)
    train(project)
    featurize(project)
    fit_poison(project, name="squeezed", function="own_function:Squeezed:channels=4")
    poison(project, name="squeezed")
    report = attack(project, "squeezed", "standard", only=["A1", "A3"], images=options.images)
    for result in report.attacks:
        leakage = "not defined" if result.leakage is None else f"{result.leakage.value:.2f}"
        print(
            f"{result.code} {ATTACKS[result.code].title}: leakage {leakage}, {result.verdict}: {', '.join(result.ways)}"
        )
    manifest = package(project, "squeezed", accept_risk=ACCEPTED_RISK)
    print(f"Published {manifest.name} {manifest.version} in {options.out / 'release'}")


if __name__ == "__main__":
    main()
