"""The attack battery: what attackers get out of a candidate, and what that means for the claims of its release."""

from dpf_release.battery.frontier import compare
from dpf_release.battery.public import publish_page
from dpf_release.battery.run import attack
from dpf_release.battery.terminal import print_attacks, print_frontier

__all__ = ["attack", "compare", "print_attacks", "print_frontier", "publish_page"]
