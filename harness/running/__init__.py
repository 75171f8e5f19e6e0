"""Runs a plan: a process for each cell, which makes a student, scores it, times it and writes its record.

`runner.run_plan` spawns and watches cells, `job.CellJob` is what a cell is told, `cell` is the program of one (torch inside its functions
only), `anew` says what a run on an old store computes again and why, `verify` checks a record, and asks its model anew.
"""

__all__ = ["anew", "cell", "job", "runner", "verify"]
