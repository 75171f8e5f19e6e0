"""Runs a plan: one process per cell makes a student, scores it, times it and writes its record.

`runner.run_plan` starts and watches the processes. `cell` is the program of one process (torch
inside functions only). It reads a `job.CellJob`, which becomes a `loaded.LoadedJob`. `student`
finds or makes the student of each stage, `evaluation` scores it, compares it with the teacher and
times it (`text_distances` is the comparison on texts), and `failure` says in one line why a cell
failed. `teacher_data` lets a teacher write training data. `recomputation` says what a run on an old
store computes again and why. `verify` checks a record, and can score its model again.
"""

__all__ = [
    "cell",
    "evaluation",
    "failure",
    "job",
    "loaded",
    "recomputation",
    "runner",
    "student",
    "teacher_data",
    "text_distances",
    "verify",
]
