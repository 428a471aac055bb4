"""`audit`: every artefact of a release and of its vault, and every check of the release as it is now."""

from dpf_release.audit.page import write_page
from dpf_release.audit.report import Artefact, Audit, audit, project_of
from dpf_release.audit.terminal import print_audit

__all__ = ["Artefact", "Audit", "audit", "print_audit", "project_of", "write_page"]
