"""What every column of every table means, from the one table of quantities."""

from harness.records.columns import QUANTITIES

GLOSSARY = {
    word: one.help for one in QUANTITIES if (word := one.header if one.term is None else one.term)
}


def glossary() -> str:
    """Return the meaning of every column."""
    width = max(map(len, GLOSSARY))
    return "\n".join(f"{name:{width}}  {meaning}" for name, meaning in GLOSSARY.items())
