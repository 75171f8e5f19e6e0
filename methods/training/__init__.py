"""What trained methods share: rows, loss terms, teachers, the loop.

A method derives from `base.Trained` or `distilled.Distilled` (both load without torch), and imports
`terms`, `losses`, `traces` or `rollout` inside `compress`. The loop is `loop.fit`; `teacher_cache`
keeps a teacher's distributions.
"""

__all__ = [
    "base",
    "batch_loss",
    "chunked_logits",
    "cost",
    "distilled",
    "divergences",
    "embedded_teachers",
    "loop",
    "lora",
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
    "trace_filter",
    "traces",
    "trainer",
    "training_log",
    "tuning",
    "validation",
]
