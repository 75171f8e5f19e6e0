"""Runs a plan: a process for each cell, which makes a student, scores it, times it and writes its
record.

`runner.run_plan` spawns and watches cells. `cell` is the program of one (torch inside functions
only): it is told a `job.CellJob`, which is `loaded`; `student` makes or finds what each stage
gives, `evaluation` scores, compares and times it, `failure` says in a line why a cell came to
nothing. `anew` says what a run on an old store computes again and why, `verify` checks a record,
and asks its model anew.
"""

__all__ = ["anew", "cell", "evaluation", "failure", "job", "loaded", "runner", "student", "verify"]
