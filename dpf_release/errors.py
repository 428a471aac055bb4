"""The package's one exception root; the command line catches it and nothing else."""

from __future__ import annotations

from collections.abc import Sequence


class DPFReleaseError(Exception):
    """A user's mistake or bad input: the message says what was expected, what was found, what to do."""

    exit_code = 1


class ConfigError(DPFReleaseError):
    """`dpf.toml` or an option does not say something that can be done."""


class VaultError(DPFReleaseError):
    """The vault lacks what a command needs, or holds something that does not fit."""


class ImageError(DPFReleaseError):
    """Images are missing, unreadable, or labelled in a way that cannot be used."""


class HookError(DPFReleaseError):
    """A network cannot be cut where it was asked to be."""


class WeightsError(DPFReleaseError):
    """A weights file is not what the network needs, or not a format that is safe to read."""


class StorageError(DPFReleaseError):
    """The disk is full or read-only, or another run works in the same folder."""


class RankError(DPFReleaseError):
    """One of the processes that work together ended, or they do not fit together."""


class SigningError(DPFReleaseError):
    """A key cannot be made, read, or be used where it lies."""


class BankError(DPFReleaseError):
    """A feature bank cannot be written, or is not format 1."""


class TrainingError(DPFReleaseError):
    """A training cannot go on."""


class RefusedError(DPFReleaseError):
    """A check before publication said no; nothing was published."""

    exit_code = 3


class VerificationError(DPFReleaseError):
    """A release is not what its manifest says.

    Attributes:
        problems: every finding, one sentence each.
    """

    exit_code = 3

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class NotGrantedError(DPFReleaseError):
    """An attack needs something that this project does not have: it is not applicable."""
