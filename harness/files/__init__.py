"""Reads what others wrote, bounded and typed; writes whole or not at all; digests of contents. No torch."""
