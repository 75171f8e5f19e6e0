"""Checks that every method and every task must pass, ours and those of other packages;
`harness.testing` is their door.

`method_checks` and `task_checks` look at one thing each, `fresh` asks processes that know nothing
of this one, `trespass` sees what is written outside. torch inside functions.
"""

__all__ = ["fresh", "method_checks", "task_checks", "trespass"]
