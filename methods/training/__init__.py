"""What trained methods share: rows, loss terms, teachers, the loop."""
