"""The public folder as a format, and its reader: what a downstream user and an auditor run.

`manifest` (which files, in which roles), `model_record` (what rebuilds φ1 and φ2), `attack_report` (numbers only),
`croissant`, `signing`. To check one: `tree` (a stranger's folder, no link followed), `verify` (every digest),
`safetensors_check`, `contents` (each file is what its role asks for; in a `child_process` with limits),
`checked_files` (what was read already). To use one: `release` (`Release.open`), `featurize` (φ1 of images of one's
own), `train` (a classifier on rows).

A release is hostile input here: checked before it is parsed, bounded before anything is allocated. It knows nothing
of vaults.
"""
