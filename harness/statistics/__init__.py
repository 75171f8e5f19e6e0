"""Figures with intervals: retention, flips, means, figures of a whole corpus.

Pure functions, no torch. `stats.retention_interval` of paired hits, `means` of paired numbers over
items and runs, `corpus` of figures that all items make together, `token_distances` of tokens in
several texts, `intervals.Interval` and how sources of error join.
"""

__all__ = ["corpus", "figures", "intervals", "means", "pooled", "stats", "token_distances"]
