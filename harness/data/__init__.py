"""Where tasks find their items, and the guard that keeps evaluation text out of training data. No torch at import."""
