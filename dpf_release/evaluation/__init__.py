"""What attackers get out of a candidate, scored against the truth; and what a downstream user gets.

`suite` runs the attacks of a profile (`profiles`) on a `targets.Target`: `views` grants each what its threat model
holds, `query_images` draws what it looks for, `harness` puts it between baseline and ceiling and tries it on
`controls` (and `control_network`). `truth` has the private images in pools, `scoring` and `score_*` compare answers
with them, `verdicts` decides (limits themselves are keys of `[gate]`, `owner.config`), `failed_attacks` forgets none
that failed. `utility` and `classifiers` measure U1 to U3, `frontier` compares several functions, `report` tells:
numbers, plots, page, terminal.

It writes into the vault only; whether a release may be made is asked in `publish.gate`.
"""
