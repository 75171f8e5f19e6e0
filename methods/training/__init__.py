"""What trained methods share: rows, loss terms, teachers, the loop.

A method derives from `base.Trained` or `distilled.Distilled` (both load without torch) and asks
inside `compress` for `terms`, `losses`, `traces` or `rollout`. The loop is `loop.fit`;
`teacher_cache` keeps what a teacher says.
"""

__all__ = [
    "base",
    "distilled",
    "divergences",
    "embedded_teachers",
    "loop",
    "losses",
    "meter",
    "noise",
    "optimizer",
    "positions",
    "preparation",
    "rollout",
    "rows",
    "selection",
    "settings",
    "sources",
    "state",
    "stepper",
    "taps",
    "teacher_cache",
    "teachers",
    "term_progress",
    "terms",
    "traces",
    "trainer",
    "training_log",
    "tuning",
    "validation",
]
