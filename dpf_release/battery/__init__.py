"""The attack battery: what attackers get out of a candidate, and what that means for the claims of its release."""

from dpf_release.battery.public import publish_page
from dpf_release.battery.run import attack
from dpf_release.battery.terminal import print_attacks

__all__ = ["attack", "print_attacks", "publish_page"]
