"""Reads what others wrote, bounded and typed; writes whole or not at all; digests of contents.

No torch. `untrusted` and `lines` read, `writing` writes and signs, `digests` names contents,
`places` checks folders before they are used, `problems` says the system's errors in one line.
"""

__all__ = [
    "closure",
    "digests",
    "leftovers",
    "lines",
    "places",
    "problems",
    "syntax",
    "untrusted",
    "writing",
]
