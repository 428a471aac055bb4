"""`python -m dpf_release` is `dpf-release`."""

from __future__ import annotations

from dpf_release.cli.main import main

main()
