"""Which records may stand together, and how two rows of them differ. From records alone. No torch.

`comparison.group_records` makes groups of rows; `comparison.compare` returns a difference or a
retention with its interval, and `single.score_interval` one figure alone with its own.
"""

__all__ = ["comparison", "single"]
