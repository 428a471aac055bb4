"""The owner's steps, one a file, and what they share.

The steps in their order: `init`, `train` (Φ), `featurize` (φ1(S)), `fit_poison` (P), `poison` (the candidate bank),
`measure` (what it keeps and hides), `retract` (images out of all of it).

`config` reads `dpf.toml` (every key with its default, also the limits under `[gate]`; `init` writes the file from the
template here), `project` is the configuration, the vault and the ranks of a run, and what these describe, φ1(S) among
it. `adversaries` trains whom P is trained against: the straw men (reconstructors ψ on Q) and attribute classifiers.
What else the vault holds is read by `private_images` (S and Q), `cut_network` (Φ in two) and `fitted` (P); `banks` is
what φ1(S) and a candidate bank have in common.

A retraction: `retract` checks and notes it, then asks each kind of file in the vault to do without the rows, each by
its own function `drop_rows` (`fitted`, `poison`, `bank.drop_rows`); a `banks.Removal` tells them which. How a row that
was mixed of several images is made anew, its poisoning function says (`drop_rows` in `poisoning.recombine`).

`workbench` is the part of a project that `evaluation` gets to see. `vault` is the private folder. Attacks are run
elsewhere, and `publish` alone makes anything public.
"""
