"""Scores a model on tasks: requests, batches, shared prefixes, answers, items, figures. torch inside functions."""
