"""`harness check`: does every row keep what it claims, and what it once had? From records and a baseline alone. No torch."""
