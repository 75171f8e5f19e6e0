"""What a plan costs before it runs: memory, seconds, tokens, money, on this machine or on another. No torch.

`estimate.estimate` answers, from a `workload` on some `hardware`, with `advice` from records beside it.
"""

__all__ = ["advice", "estimate", "hardware", "workload"]
