"""The attacker's side: what each holds (`threat_models`), what it answers (`interface`), and one file for each attack.

An attack is `aNN_NAME.py`, registered by importing it below; no attack imports another. What several share lies in
`toolkit`: decoders, shadow functions (`shadows`), P(φ1(Q)) (`poisoned_public`), and the keeping of what was trained
(`trained`). `reference_outputs` is a decoder of φ2's answers, shown beside the attacks.

Nothing here imports the vault, the private images or the owner's P: an attack receives what its threat model holds,
and no more; a test holds that. It is scored elsewhere, by who holds the truth.
"""

from dpf_release.attacks import (  # each registers itself
    a00_leaked_vault as a00_leaked_vault,
)
from dpf_release.attacks import (
    a01_clean_decoders as a01_clean_decoders,
)
from dpf_release.attacks import (
    a02_deep_tap as a02_deep_tap,
)
from dpf_release.attacks import (
    a03_shadow as a03_shadow,
)
from dpf_release.attacks import (
    a04_alignment as a04_alignment,
)
from dpf_release.attacks import (
    a05_linkage as a05_linkage,
)
from dpf_release.attacks import (
    a06_known_pairs as a06_known_pairs,
)
from dpf_release.attacks import (
    a07_optimisation as a07_optimisation,
)
from dpf_release.attacks import (
    a08_attribute as a08_attribute,
)
from dpf_release.attacks import (
    a09_two_releases as a09_two_releases,
)
from dpf_release.attacks import (
    a10_membership as a10_membership,
)
from dpf_release.attacks import (
    a12_jigsaw as a12_jigsaw,
)
