"""Poisoning functions P: features → features of the same shape. Each is one class in one file.

`interface` says what a function is; `plan` what it is built for, draws, and its rows are made of; `context` what it
is given to learn from; `objective` what it minimises; `chain` makes one of its name, alone or behind others;
`fitting` fits and plans stage by stage, for whoever fits one (the owner on S, attackers and the public page on Q);
`reference` lists all with their parameters. Then the functions: `stationary` (noise, filters, identity), `recombine`,
`class_gaussian`, `deep` (`dpf`).

A new function is a new file, imported below; from outside the package it needs no more than its name. It knows
nothing of vaults, releases and attackers.
"""

from dpf_release.poisoning import (  # each registers itself
    class_gaussian as class_gaussian,
)
from dpf_release.poisoning import (
    deep as deep,
)
from dpf_release.poisoning import (
    recombine as recombine,
)
from dpf_release.poisoning import (
    stationary as stationary,
)
