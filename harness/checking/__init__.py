"""The checks that every method and every task must pass; `harness.testing` is the way in.

They hold for our methods and tasks and for those of other packages. `method_checks` and
`task_checks` test one thing each, `fresh` runs code in new processes, `trespass` sees which files
are written outside the folders of a job. torch is imported inside functions only.
"""

__all__ = ["fresh", "method_checks", "task_checks", "trespass"]
