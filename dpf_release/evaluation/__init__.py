"""The attack battery: what attackers get out of a candidate, and what that means for the claims of its release."""
