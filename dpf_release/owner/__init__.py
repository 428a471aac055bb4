"""The owner's steps, one a file, and what they share.

The steps in their order: `init`, `train`, `featurize`, `fit_poison`, `poison`, `measure`, `retract`.

`config` is `dpf.toml` (its template is `dpf.toml` beside it), `project` the configuration, the vault and the ranks of
a run. What the vault holds, and how it is read: `private_images` (S and Q), `cut_network` (Φ in two), `private_bank`
(φ1(S)), `fitted` (P), `banks` (what φ1(S) and a candidate have in common), `adversaries` (whom P is trained against).
`removal` is what each kind of member is told of rows that go: each does without them itself (`drop_rows`), and how a
recombined row is made anew is its function's business. `workbench` and `kept` are all that those who attack a
candidate see of a project. `vault` is the private folder.

It knows nothing of attacks that were run, and publishes nothing: `publish` alone does.
"""
