"""From a row to what other programs open: what made it, and where its files are.

`row` finds a row and its files, `details` says what made it.
"""

__all__ = ["details", "row"]
