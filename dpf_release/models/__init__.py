"""Networks, and the one loop that fits them.

`zoo` builds Φ by name, `tracing` and `hooks` cut it in two at a hook point, `weights` reads and writes its tensors,
`reconstructors` has the paper's decoders ψ (untrained), `probes` a classifier of features, `metrics` how alike images
are and how good answers, `training` the loop (`fit`) with its schedule, precision, checkpoints and ranks.

A loss lies where its network is trained: of Φ in `owner.train`, of ψ and attribute classifiers in
`owner.adversaries`, of P in `poisoning.objective`, of attackers' decoders in `attacks.toolkit.decoder`, of a user's
classifier in `release.train`.
"""

from __future__ import annotations
