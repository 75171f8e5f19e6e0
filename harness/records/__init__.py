"""The truth on disk: a record a cell, what stands beside it, baselines, and other projects' forms of them. No torch."""
