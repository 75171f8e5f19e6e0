"""Which records may stand together, and how two rows of them differ. From records alone. No torch.

`comparison.group_records` makes groups of rows; `comparison.compare` returns a difference or a
retention with its interval.
"""

__all__ = ["comparison"]
