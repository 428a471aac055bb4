"""What several attacks share; no attack itself.

`trained` (fit, keep, freeze), `decoder` and `clean_decoders` (from features back to images), `shadows` (functions
fitted on Q, of P's own kind too), `poisoned_public` (P on Q as a bank), `taps` (inside φ2), `matcher`, `pieces` and
`alignment_map`.
"""
