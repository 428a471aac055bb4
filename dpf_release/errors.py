"""The package's one exception root; the command line catches it and nothing else."""

from __future__ import annotations

from collections.abc import Sequence


class DPFReleaseError(Exception):
    """A user's mistake or bad input: the message says what was expected, what was found, what to do.

    Example:
        >>> from dpf_release import DPFReleaseError, Release
        >>> try:
        ...     Release.open("nowhere")
        ... except DPFReleaseError as error:
        ...     print(type(error).__name__, error.exit_code)
        VerificationError 3
    """

    exit_code = 1


class ConfigError(DPFReleaseError):
    """`dpf.toml` or an option does not say something that can be done.

    Example:
        >>> from dpf_release import Project
        >>> Project.open("my-release/dpf.toml", {"train.epochs": 0})
        Traceback (most recent call last):
        ConfigError: ...
    """


class VaultError(DPFReleaseError):
    """The vault lacks what a command needs, or holds something that does not fit.

    Example:
        >>> from dpf_release import Project, poison
        >>> poison(Project.open("my-release/dpf.toml"), name="never-fitted")
        Traceback (most recent call last):
        VaultError: ...
    """


class ImageError(DPFReleaseError):
    """Images are missing, unreadable, or labelled in a way that cannot be used.

    Example:
        >>> from dpf_release import Project, train
        >>> train(Project.open("my-release/dpf.toml", {"images.private.path": "nowhere"}), restart=True)
        Traceback (most recent call last):
        ImageError: ...
    """


class HookError(DPFReleaseError):
    """A network cannot be cut where it was asked to be.

    Example:
        >>> from dpf_release import Project, featurize
        >>> featurize(Project.open("my-release/dpf.toml", {"network.hook": "conv9_9"}))
        Traceback (most recent call last):
        HookError: ...
    """


class WeightsError(DPFReleaseError):
    """A weights file is not what the network needs, or not a format that is safe to read.

    Example:
        >>> from dpf_release import Project, train
        >>> train(Project.open("my-release/dpf.toml", {"network.weights": "dpf.toml"}), restart=True)
        Traceback (most recent call last):
        WeightsError: ...
    """


class StorageError(DPFReleaseError):
    """The disk is full or read-only, or another run works in the same folder.

    Example:
        >>> from dpf_release import Project, featurize
        >>> project = Project.open("my-release/dpf.toml")
        >>> with project.working():  # a run holds the vault
        ...     featurize(Project.open("my-release/dpf.toml"))
        Traceback (most recent call last):
        StorageError: ...
    """


class RankError(DPFReleaseError):
    """One of the processes that work together ended, or they do not fit together.

    Example:
        >>> from dataclasses import replace
        >>> from dpf_release import Project, package
        >>> project = Project.open("my-release/dpf.toml")
        >>> package(replace(project, ranks=replace(project.ranks, world_size=2)))
        Traceback (most recent call last):
        RankError: ...
    """


class SigningError(DPFReleaseError):
    """A key cannot be made, read, or be used where it lies.

    Example:
        >>> from pathlib import Path
        >>> from dpf_release import verify
        >>> verify(Path("my-release/release"), public_key=Path("my-release/dpf.toml"))
        Traceback (most recent call last):
        SigningError: ...
    """


class BankError(DPFReleaseError):
    """A feature bank cannot be written, or is not format 1.

    Example:
        >>> from pathlib import Path
        >>> from dpf_release import FeatureBank
        >>> FeatureBank(Path("my-release/release/features"), "test")  # is never released
        Traceback (most recent call last):
        BankError: ...
    """


class TrainingError(DPFReleaseError):
    """A training cannot go on.

    Example:
        >>> from dpf_release import TrainingError
        >>> raise TrainingError("the loss is not a number")
        Traceback (most recent call last):
        TrainingError: ...
    """


class RefusedError(DPFReleaseError):
    """A check before publication said no; nothing was published.

    Example:
        >>> from dpf_release import Project, package
        >>> package(Project.open("my-release/dpf.toml", {"claims.reconstruction": True}))
        Traceback (most recent call last):
        RefusedError: ...
    """

    exit_code = 3


class VerificationError(DPFReleaseError):
    """A release is not what its manifest says.

    Attributes:
        problems: every finding, one sentence each.

    Example:
        >>> from dpf_release import Release
        >>> Release.open("nowhere")
        Traceback (most recent call last):
        VerificationError: ...
    """

    exit_code = 3

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class NotGrantedError(DPFReleaseError):
    """An attack needs something that this project does not have: it is not applicable.

    Example:
        >>> from dpf_release import NotGrantedError
        >>> raise NotGrantedError("there is no other release")
        Traceback (most recent call last):
        NotGrantedError: ...
    """
