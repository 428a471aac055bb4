"""`python -m dpf_release` is `dpf-release`."""

from dpf_release.cli import main

main()
