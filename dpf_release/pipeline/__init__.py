"""The owner's steps, one public function each; a command of the same name calls it."""

from dpf_release.pipeline.banks import featurize, featurize_new, write_candidate
from dpf_release.pipeline.fitting import fit_poison
from dpf_release.pipeline.measuring import measure
from dpf_release.pipeline.network import train
from dpf_release.pipeline.project import Project
from dpf_release.pipeline.retracting import read_names, retract
from dpf_release.pipeline.start import init

__all__ = [
    "Project",
    "featurize",
    "featurize_new",
    "fit_poison",
    "init",
    "measure",
    "read_names",
    "retract",
    "train",
    "write_candidate",
]
