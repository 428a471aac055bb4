"""What attackers get out of a candidate bank, scored against the truth; and what a downstream user gets.

`suite` runs the attacks of a profile (`profiles`) on a `targets.Target`: `views` grants each what its threat model
holds, `harness` compares it with baseline and ceiling and tries it on
`controls`, which it must break. `scoring` and `score_*` compare answers with the truth, `verdicts` says pass, fail or
inconclusive, `failed_attacks` keeps those that failed. The limits are numbers in `owner.config`.

`utility` and `classifiers` measure what a bank is worth (U1 to U3), `frontier` compares several functions, `report`
tells it. Everything is written into the vault; whether a release may be made is asked in `publish.gate`.
"""
