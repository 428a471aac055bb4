"""What a release must not tell: every check that needs the vault to compare with.

`private_facts` runs all of them: `text` (names, paths, secrets), `tensors` (private weights), `near_rows` (rows of
φ1(S) up to scale and noise), `drawn` (ids, and the source's order). `findings` is what they share.
"""
