"""Poisoning functions P: features → features of the same shape. Each is one class in one file.

`interface` says what a function is; `plan` what it is built for, draws, and its rows are made of; `context` what it
is given to learn from; `objective` what it minimises; `chain` makes one of its name, alone or behind others, fits and
plans it stage by stage (for the owner on S, for attackers and the public page on Q), and lists all with their
parameters. Then the functions: `stationary` (noise, filters, identity), `recombine`,
`class_gaussian`, `mixture` (by a public `procedure` in `components` of Q: `noisy_classes` of `moments` under a bound,
`groups` without), `deep` (`dpf`).

A new function is a new file, imported below; from outside the package it needs no more than its name. It knows
nothing of vaults, releases and attackers.
"""

from dpf_release.poisoning import class_gaussian, deep, mixture, recombine, stationary  # noqa: F401, each registers itself
