"""Networks, and the one loop that fits them.

`zoo` builds Φ by name, `tracing` and `hooks` cut it in two at a hook point, `weights` reads and writes its tensors,
`reconstructors` has the paper's decoders ψ, `probes` a classifier of features, `metrics` how alike images are and how
good answers, `training` the loop (`fit`) with its schedule, precision, checkpoints and ranks.

It knows nothing of poisoning, releases and vaults.
"""

from __future__ import annotations
