"""The attacker's side: what each holds (`threat_models`), what it answers (`interface`), and one file for each attack.

An attack is `aNN_NAME.py`, registered by importing it below; no attack imports another. What several share lies in
`toolkit`: decoders, shadow functions (`shadows`), P(φ1(Q)) (`poisoned_public`), and the keeping of what was trained
(`trained`). Beside the attacks a decoder of φ2's answers is shown (`a02_deep_tap.Outputs`).

Nothing here imports the vault, the private images or the owner's P: an attack receives what its threat model holds,
and no more; a test holds that. It is scored elsewhere, by who holds the truth.
"""

from dpf_release.attacks import (  # noqa: F401, each registers itself
    a00_leaked_vault,
    a01_clean_decoders,
    a02_deep_tap,
    a03_shadow,
    a04_alignment,
    a05_linkage,
    a06_known_pairs,
    a07_optimisation,
    a08_attribute,
    a09_two_releases,
    a10_membership,
    a12_jigsaw,
    a13_drawn_rows,
)
