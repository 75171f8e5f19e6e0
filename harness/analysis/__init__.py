"""Which records may stand together, and how two rows of them differ. From records alone. No torch.

`comparison.group` makes groups of rows, `comparison.compare` a difference or a retention with its
interval.
"""

__all__ = ["comparison"]
