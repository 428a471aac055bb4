"""From candidate to release, and who checks it. `package` alone writes public files.

`package` checks the candidate, asks `gate` which claims may be made, writes the card (`card`; all its words are in
`card_text`), builds the release beside its place and swaps it in (`swap`). `leaks` holds against the vault what is
about to be public. `audit` says of every artefact what it is and which checks passed, `inspect` what a file or
network holds.
"""
