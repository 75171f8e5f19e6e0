"""From names and settings to rows, and from rows to cells with keys. No torch at import.

`config.RunConfig` is what a run is asked to do, `spec` parses what is typed, `chain` knows which
stage may follow which, `rows` builds each row's methods, `setup` decides what all rows have in
common, `plan.make_plan` gives a `Plan` of `cells`.
"""

__all__ = ["cells", "chain", "config", "fields", "keys", "plan", "rows", "setup", "spec"]
