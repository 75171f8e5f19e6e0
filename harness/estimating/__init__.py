"""What a plan costs before it runs: memory, seconds, tokens, money, on this machine or on another.
No torch.

`expect` looks models and tasks up for chains and planned cells; `estimate.estimate` answers, from a
`workload` on some `hardware`, with `advice` from records beside it.
"""

__all__ = ["advice", "estimate", "expect", "hardware", "workload"]
