"""Checks that every method and every task must pass, ours and those of other packages; `harness.testing` is their door."""
