"""Which records may stand together, and how two rows of them differ. From records alone. No torch.

`comparison.group_records` makes groups of rows; `comparison.compare` returns a difference or a
retention with its interval, and `single.score_interval` one figure alone with its own.
`decision.decide` names the row to take, `front` says which rows are dominated, `measured_rows` what
was measured of one, `items_needed` how many items would decide.
"""

__all__ = ["comparison", "decision", "front", "items_needed", "measured_rows", "single"]
