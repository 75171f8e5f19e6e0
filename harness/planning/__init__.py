"""From names and settings to rows, and from rows to cells with keys. No torch at import."""
