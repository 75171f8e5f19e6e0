"""What every column of every table means, from the one table of quantities."""

from harness.records.columns import QUANTITIES

_TERMS = {
    quantity: quantity.header if quantity.term is None else quantity.term for quantity in QUANTITIES
}
GLOSSARY = {term: quantity.help for quantity, term in _TERMS.items() if term}


def glossary() -> str:
    """Return the meaning of every column, one a line."""
    width = max(map(len, GLOSSARY))
    return "\n".join(f"{term:{width}}  {meaning}" for term, meaning in GLOSSARY.items())
