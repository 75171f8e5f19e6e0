"""Figures with intervals: retention, flips, means, figures of a whole corpus. Pure functions, no torch."""
