"""Runs a plan: a process for each cell, which makes a student, scores it, times it and writes its record."""
