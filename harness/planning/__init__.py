"""From names and settings to rows, and from rows to cells with keys. No torch at import.

`config.RunConfig` contains all settings of a run. `spec` parses what users type, `chain` checks the
order of stages, `rows` builds the methods of each row, `recipes` chooses how they are trained,
`setup` decides what all rows share, `keys` makes the keys of students and cells, and
`plan.make_plan` returns a `Plan` of `cells`. `spelled` writes a configuration as the command that
gives it again.
"""

__all__ = [
    "cells",
    "chain",
    "config",
    "fields",
    "keys",
    "plan",
    "recipes",
    "rows",
    "setup",
    "spec",
    "spelled",
]
