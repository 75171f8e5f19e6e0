"""Estimates what a plan costs, on this machine or another: memory, time, tokens, money. No torch.

`expect` looks up the models and tasks of chains and planned cells. `estimate.estimate` computes the
stages of a `workload` on some `hardware`, and adds `advice` from records.
"""

__all__ = ["advice", "estimate", "expect", "hardware", "memory", "recipes", "requests", "workload"]
