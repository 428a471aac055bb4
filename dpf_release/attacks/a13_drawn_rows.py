"""A13: whether an image was among those whose statistics rows were drawn from; the rows belong to no image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from dpf_release.attacks.interface import Attack, Likeness, Links, Reconstructions, register
from dpf_release.attacks.threat_models import BATCH, DrawnRows, LeakedFunction, ReleaseView, batches
from dpf_release.attacks.toolkit.coefficients import Space, space_of
from dpf_release.attacks.toolkit.densities import Gaussian, log_kernel_density, log_mixture, nearest
from dpf_release.core.arrays import Rows
from dpf_release.errors import NotGrantedError
from dpf_release.poisoning.chain import build_chain, draws_rows
from dpf_release.poisoning.mixture import Mixture
from dpf_release.poisoning.plan import FeatureSpec

CLASS_ROWS = 2000  # of a class, whose coordinates are recovered
PUBLIC_ROWS = 5000  # of Q, that neighbours and kernels are compared with
NUMBERS_AT_ONCE = 2**26  # of the rows of a class, in memory together
COUNTS = (32, 128)  # of components that likelihoods are of, beside all
NEAR, NEIGHBOURS, KERNELS = 5, 32, 16  # the neighbour that counts; components that it is sought in; of kernels
GROUPS, GROUP_COMPONENTS = 8, 64  # of rows of a class, and in how many components they are found
HALVES, LEAST_OF_HALF = 8, 100  # of Q, that likelihoods are calibrated by; images of a class, for it to have its own
NEAREST_OF_GROUP = 50  # images of Q, whose mean stands for a group
PRIOR = 20.0  # rows that Q's covariance counts for beside those of a class

Scores = dict[str, Tensor]  # way → (n,) of the queries of a class, higher: rather a member


@dataclass(frozen=True, eq=False)
class Public:
    """Q in coordinates that have unit variance there.

    Attributes:
        points: (n, K).
        labels: (n,) that φ2 gives them; all 0 of regression.
        seed: of what is drawn.
    """

    points: Tensor
    labels: Rows
    seed: int
    known: dict[int, list[Gaussian]] = field(default_factory=dict)  # by class

    @cached_property
    def covariance(self) -> Tensor:
        """(K, K)."""
        return self.points.double().T.cov(correction=0)

    @cached_property
    def gaussian(self) -> Gaussian:
        """Of all of Q."""
        return Gaussian.of(self.points.double().mean(0), self.covariance)

    @cached_property
    def sample(self) -> Tensor:
        """Some of it, (m, K)."""
        return self.points[: min(len(self.points), PUBLIC_ROWS)]

    def references(self, label: int) -> list[Gaussian]:
        """Of random halves, of those images that φ2 gives the label; where they are few, of all."""
        if label not in self.known:
            generator = np.random.default_rng([self.seed, 14])
            halves = [generator.permutation(len(self.points))[: len(self.points) // 2] for _ in range(HALVES)]
            found = []
            for half in halves:
                mine = half[self.labels[half] == label]
                chosen = torch.from_numpy(mine if len(mine) >= LEAST_OF_HALF else half)
                found.append(Gaussian.fitted(self.points[chosen], self.covariance, PRIOR, 1 / HALVES))
            self.known[label] = found
        return self.known[label]


@register
class Membership(Attack):
    """Query images beside drawn rows of their class: how near, how likely under statistics of the rows, and of Q."""

    code, title, claim, version = "A13", "membership of drawn rows", "linkage", 1
    view, answers = DrawnRows, Links
    planted = ("mixture-400", "mixture-200-plain", "mixture-copies")

    def run(self, view: ReleaseView) -> Links:
        """All ways; no rows are linked. Each is compared within its class: in its own median and spread there."""
        assert isinstance(view, DrawnRows)
        space = space_of(view)
        public = Public(space.whitened(space.public), _labels(view, len(space.public)), view.seed)
        points = _points(view, lambda before: space.whitened(space.of_features(before)))
        flat = _Flat.of(view, public.labels) if space.rectified else None

        def scores(label: int, mine: Rows) -> Scores:
            rows = _sample(view, label)
            drawn = _coordinates(view, space, rows)
            found = {"nearest row": _nearest_row(view, mine, label)}
            found |= _distances(points[mine], drawn, public) | _likelihoods(points[mine], drawn, public, label)
            if flat is not None:
                found["likelihood after the ReLU"] = flat.likelihood(_coordinates(view, flat.space, rows), mine)
            return found

        return _links(view, scores)


class ClassAndGroup(Attack):
    """The mean of those images of Q that are nearest the centre of a row's group: what class and group give away.

    A reference and no attack: shown beside the label-only baseline, never subtracted, never gated; not registered.
    Groups are the attacker's own, found in the rows of a class.
    """

    code, title, claim, planted = "class and group", "what class and group give away", None, ()

    def run(self, view: ReleaseView) -> Reconstructions:
        """Of classes; of regression there are no groups, and all rows are one class."""
        targets, space = np.asarray(view.bank.targets), space_of(view)
        labels = targets if targets.ndim == 1 else np.zeros(len(targets), np.int64)
        public = space.whitened(space.public)[:, :GROUP_COMPONENTS]
        means, group_of = list[Tensor](), np.zeros(len(view.asked), np.int64)
        for label in np.unique(labels[view.asked]):
            places = np.flatnonzero(labels[view.asked] == label)
            rows = np.concatenate([view.asked[places], np.flatnonzero(labels == label)[:CLASS_ROWS]])
            points = _coordinates(view, space, rows)[:, :GROUP_COMPONENTS]
            found = KMeans(min(GROUPS, len(rows)), n_init=2, random_state=view.seed).fit(points.numpy())
            group_of[places] = len(means) + found.labels_[: len(places)]
            for centre in torch.from_numpy(found.cluster_centers_).float():
                near = (public - centre).square().sum(1).argsort()[:NEAREST_OF_GROUP]
                means.append((view.public.read(near.numpy()).float() / 255).mean(0))
        images = torch.stack(means)
        return Reconstructions({"class and group": lambda places: images[torch.from_numpy(group_of[places])]})


@dataclass(frozen=True, eq=False)
class _Flat:
    """Rows and queries after the ReLU, in components of Q after the ReLU: a plain fit, that recovers nothing first."""

    space: Space
    public: Public
    points: Tensor  # (n, K) of the queries

    @classmethod
    def of(cls, view: DrawnRows, labels: Rows) -> _Flat:
        space = space_of(view, after_relu=True)
        points = _points(view, lambda before: space.whitened(space.of_features(before.relu())))
        return cls(space, Public(space.whitened(space.public), labels, view.seed), points)

    def likelihood(self, drawn: Tensor, mine: Rows) -> Tensor:
        """Of some queries under a Gaussian of drawn rows, less that under Q's."""
        fitted = Gaussian.fitted(drawn, self.public.covariance, PRIOR)
        return fitted.log_density(self.points[mine]) - self.public.gaussian.log_density(self.points[mine])


@register
class LeakedMembership(Attack):
    """The same for someone who has the statistics themselves: the likelihood under what rows are drawn from."""

    code, title, claim, version = "A13L", "membership by the leaked function", None, 1
    view, answers = LeakedFunction, Links
    planted = ("mixture-400",)

    def run(self, view: ReleaseView) -> Links:
        """With several numbers of components, against Q, against Q's halves, and against the other queries.

        Raises:
            NotGrantedError: it is not known what this function draws from.
        """
        assert isinstance(view, LeakedFunction)
        function, space = _leaked(view), space_of(view)
        seen = function.space.of(space.components.features(space.public.numpy()))
        scale = seen.std(0).clamp_min(1e-6)
        public = Public(seen / scale, _labels(view, len(seen)), view.seed)
        points = _points(view, lambda before: function.space.of(before) / scale)
        parts: dict[int, list[Gaussian]] = {}
        for label, share, centre, covariance in function.gaussians():
            of = torch.from_numpy(covariance) / scale.double() / scale.double()[:, None]
            parts.setdefault(label, []).append(Gaussian.of(torch.from_numpy(centre) / scale, of, share))

        def scores(label: int, mine: Rows) -> Scores:
            of_class = parts.get(label) or [part for some in parts.values() for part in some]
            return _against("exact likelihood", of_class, points[mine], public, label)

        return _links(view, scores)


def _leaked(view: LeakedFunction) -> Mixture:
    stage = None
    if draws_rows(view.function):
        chain = build_chain(view.function, FeatureSpec(view.feature_shape, view.non_negative))
        chain.load(view.learned)
        stage = chain.stages[0]
    if not isinstance(stage, Mixture):
        raise NotGrantedError("it is not known from which distributions this function draws its rows")
    return stage


def _links(view: DrawnRows, scores: Callable[[int, Rows], Scores]) -> Links:
    """Scores of all queries, class by class."""
    ways: dict[str, np.ndarray] = {}
    for label in np.unique(view.labels):
        mine = np.flatnonzero(view.labels == label)
        for name, found in scores(int(label), mine).items():
            values = found.double().nan_to_num(0, 1e30, -1e30).numpy()
            low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
            ways.setdefault(name, np.zeros(len(view.labels), np.float32))[mine] = (values - middle) / (
                high - low + 1e-9
            )
    return Links({name: Likeness(None, values) for name, values in ways.items()}, drawn=True)


def _points(view: DrawnRows, look: Callable[[Tensor], Tensor]) -> Tensor:
    """What a look makes of the query images' features before the last ReLU, (n, K)."""
    some = batches(np.arange(len(view.pictures)))
    return torch.cat([look(view.features_before_relu(view.pictures.read(numbers))) for numbers in some])


def _labels(view: ReleaseView, count: int) -> Rows:
    """What φ2 makes of the first images of Q, (count,)."""
    if view.task == "regression":
        return np.zeros(count, np.int64)
    found = [view.answers(view.features_of(view.public, some)).argmax(1).cpu() for some in batches(np.arange(count))]
    return torch.cat(found).numpy()


def _sample(view: DrawnRows, label: int) -> Rows:
    rows = np.flatnonzero(view.bins == label)
    return np.sort(np.random.default_rng([view.seed, 15, label]).permutation(rows)[:CLASS_ROWS])


def _coordinates(view: ReleaseView, space: Space, rows: Rows) -> Tensor:
    """(n, K) of rows of the bank, in deviations of Q."""
    return torch.cat([space.whitened(space.of_rows(view.rows(some))) for some in batches(rows)])


def _nearest_row(view: DrawnRows, queries: Rows, label: int) -> Tensor:
    """Distance to the nearest of all rows of the class, against that to the nearest image of Q."""
    rows, found = np.flatnonzero(view.bins == label), []
    most = max(BATCH, NUMBERS_AT_ONCE // int(np.prod(view.feature_shape)))  # others want another pass over the rows
    for first in range(0, len(queries), most):
        some = [view.features(view.pictures.read(part)) for part in batches(queries[first : first + most])]
        points = torch.cat(some).flatten(1)
        near = torch.stack([nearest(points, view.rows(part).flatten(1)) for part in batches(rows)]).amin(0)
        public = [nearest(points, features.flatten(1)) for features in view.public_features(PUBLIC_ROWS)]
        found.append(_log_ratio(torch.stack(public).amin(0), near).cpu())
    return torch.cat(found)


def _log_ratio(public: Tensor, drawn: Tensor) -> Tensor:
    return public.clamp_min(1e-6).log() - drawn.clamp_min(1e-6).log()


def _distances(points: Tensor, rows: Tensor, public: Public) -> Scores:
    """Nearest rows in coordinates, and ratios of densities (DOMIAS: van Breugel et al. 2023)."""
    sample = public.sample
    return {
        "nearest row, coordinates": _log_ratio(nearest(points, sample), nearest(points, rows)),
        "density ratio, neighbours": _log_ratio(
            nearest(points[:, :NEIGHBOURS], sample[:, :NEIGHBOURS], NEAR),
            nearest(points[:, :NEIGHBOURS], rows[:, :NEIGHBOURS], NEAR),
        ),
        "density ratio, kernels": log_kernel_density(points[:, :KERNELS], rows[:, :KERNELS])
        - log_kernel_density(points[:, :KERNELS], sample[:, :KERNELS]),
    }


def _likelihoods(points: Tensor, rows: Tensor, public: Public, label: int) -> Scores:
    """Under a Gaussian of the rows of the class, and under Gaussians of groups of them."""
    one = [Gaussian.fitted(rows, public.covariance, PRIOR)]
    found = _against("likelihood", one, points, public, label)
    count = min(GROUPS, len(rows) // 50)
    if count > 1:
        of = KMeans(count, n_init=2, random_state=public.seed).fit_predict(rows[:, :GROUP_COMPONENTS].numpy())
        parts = [rows[torch.from_numpy(of == group)] for group in range(count)]
        within = one[0].root @ one[0].root.T
        groups = [Gaussian.fitted(part, within, PRIOR, len(part) / len(rows)) for part in parts if len(part)]
        found |= _against(f"likelihood of {GROUPS} groups", groups, points, public, label)
    return found


def _against(name: str, parts: list[Gaussian], points: Tensor, public: Public, label: int) -> Scores:
    """Log likelihood under a mixture, less that under what it is compared with.

    Q: with several numbers of components. Random halves of Q (as RMIA, Zarifzadeh et al. 2024, has reference models),
    and the other half of the queries, whose density is that of the class itself: with all components.
    """
    found = {}
    for count in _counts(points.shape[1]):
        some = points[:, :count]
        drawn = log_mixture([part.leading(count) for part in parts], some)
        found[f"{name}, {count} components"] = drawn - public.gaussian.leading(count).log_density(some)
    found[f"{name}, calibrated"] = drawn - log_mixture(public.references(label), points)
    found[f"{name}, against other queries"] = drawn - _of_other_queries(points, public)
    return found


def _counts(kept: int) -> Iterator[int]:
    yield from (count for count in COUNTS if count < kept)
    yield kept


def _of_other_queries(points: Tensor, public: Public) -> Tensor:
    """(n,) log density of each query under a Gaussian of that half of the queries which it is not in."""
    order = torch.from_numpy(np.random.default_rng([public.seed, 16]).permutation(len(points)))
    out = torch.zeros(len(points), dtype=torch.float64)
    for mine, others in ((order[::2], order[1::2]), (order[1::2], order[::2])):
        if len(mine) and len(others):
            weight = max(PRIOR, points.shape[1] / 4)
            out[mine] = Gaussian.fitted(points[others], public.covariance, weight).log_density(points[mine])
    return out
