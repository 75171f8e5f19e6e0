"""The truth on disk: a record a cell, what stands beside it, baselines, and other projects' forms.

No torch. `record.RunRecord` with `record.read_record` and `record.write_record`, `store.Store` of a
user's cells, `samples` beside a record, `columns` (every quantity, of the type in `quantity`),
`baseline` (the file), `environment` of a process, `model_card` and `export` for others.
`lm_eval_logs` and `own_logs` read what was logged of every item (`logged_items`).
"""

__all__ = [
    "baseline",
    "columns",
    "conditions",
    "consistency",
    "environment",
    "export",
    "json_schema",
    "lm_eval_logs",
    "logged_items",
    "model_card",
    "own_logs",
    "quantity",
    "record",
    "samples",
    "store",
]
