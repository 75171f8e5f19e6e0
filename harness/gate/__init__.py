"""`harness check`: does every row keep what it claims, and what a baseline holds of it? No torch.

`check.check` judges records by `rules.Rules`, against a baseline if there is one, and returns
findings. `compare.compare_models` holds the logs of two models against each other; its sides are
read by `compare_inputs`. `update` moves a baseline, `output` writes verdicts for people and
machines, `inputs` parses what users give.
"""

__all__ = [
    "baseline_tables",
    "check",
    "claim",
    "compare",
    "compare_inputs",
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
