"""Models on disk and in memory: names resolved, opened, shaped, packed, saved. torch inside functions, but for `packed`."""
