"""What attackers get out of a candidate bank, scored against the truth; and what a downstream user gets.

`suite` runs the attacks of a profile (`profiles`) on a `targets.Target`: `views` grants each what its threat model
holds, `query_images` draws what it looks for, `harness` compares it with baseline and ceiling and tries it on
`controls` and `control_network`, which it must break. `truth` has the private images in pools, `scoring` and
`score_*` compare answers with them, `verdicts` says pass, fail or inconclusive, `failed_attacks` keeps those that
failed. The limits are numbers in `owner.config`.

`utility` and `classifiers` measure what a bank is worth (U1 to U3), `frontier` compares several functions, `report`
tells it. Everything is written into the vault; whether a release may be made is asked in `publish.gate`.
"""
