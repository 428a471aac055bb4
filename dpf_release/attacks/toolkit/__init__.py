"""What several attacks share; no attack itself.

`trained` (fit, keep, freeze), `decoder` (from features back to images), `shadows` (functions fitted on Q),
`poisoned_public` (P on Q as a bank), `taps` (inside φ2), `pieces` (which rows lent each other some, and what fits).
"""
