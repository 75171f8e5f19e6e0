"""`harness check`: does every row keep what it claims, and what it once had? From records and a
baseline alone. No torch.

`check.check` judges records by `rules.Rules` and returns findings; `update` moves a baseline,
`output` writes verdicts for people and machines, `inputs` parses what users ask of a check.
"""

__all__ = [
    "baseline_tables",
    "check",
    "claim",
    "frozen",
    "frozen_documents",
    "frozen_items",
    "inputs",
    "output",
    "passed",
    "pooled",
    "rules",
    "speed",
    "update",
]
