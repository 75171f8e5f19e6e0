"""Reads numbers out of model answers: lm-eval's two GSM8K extractors and a numeric one, as pure
functions.
"""

import re
from fractions import Fraction

from harness.contract import Grade

HASHES = re.compile(r"#### (\-?[0-9\.\,]+)")  # `strict-match` of lm-eval's gsm8k
# of its gsm8k-cot; without a period after it the last digit is lost, as there
SENTENCE = re.compile(r"The answer is (\-?[0-9\.\,]+).")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
# A sign (also the typographic minus) before or behind a currency, digits with or without a whole
# part, and a fraction's denominator.
_AMOUNT = (
    r"(?P<sign>[-\u2212]?)(?:[$€£]\s*)?(?P<minus>[-\u2212]?)(?P<digits>[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?P<below>\s*/\s*[1-9][0-9]*(?![0-9.,/]*[0-9/]))?"
)
_DATE = re.compile(r"[0-9]+/[0-9]+/[0-9]+")
_BOXED = re.compile(r"\\boxed\{\s*" + _AMOUNT)
_STATED = re.compile(r"(?:####|answer is:?)\s*" + _AMOUNT, re.IGNORECASE)
_NUMBER = re.compile(_AMOUNT)


def _normalise(text: str) -> str:
    """Apply lm-eval's `regexes_to_ignore` of gsm8k and its `ignore_case`."""
    for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(pattern, "", text)
    return text.lower()


def strict_match(text: str, stated: re.Pattern[str] = HASHES) -> str | None:
    """Return the first number that stands in the form `stated`, as lm-eval's `strict-match` filters
    do.
    """
    found = stated.findall(text)
    return found[0].strip() if found else None


def flexible_extract(text: str) -> str | None:
    """Return the last number-like run, as lm-eval's `flexible-extract` filter does."""
    found = _FLEXIBLE.findall(text)
    return next(part for part in found[-1] if part).strip() if found else None


def stated_number(text: str) -> str | None:
    """Return the number that an answer states: the first of `####`, boxed, "answer is", else its
    last number.

    Unlike the two of lm-eval it is compared as a number, so `$18.00` and `18` are equal and format
    drift is told apart from lost ability.
    """
    text = _DATE.sub(lambda date: date[0].replace("/", " "), text)
    for pattern in (_STATED, _BOXED):
        found = pattern.search(text)
        if found:
            return _plain_number(found)
    every = list(_NUMBER.finditer(text))
    return _plain_number(every[-1]) if every else None


def _plain_number(found: re.Match[str]) -> str:
    """Return a number without its currency, with a plain minus."""
    sign = "-" if found["sign"] or found["minus"] else ""
    return f"{sign}{found['digits']}{''.join((found['below'] or '').split())}"


def _read_number(text: str) -> Fraction | None:
    """Read a number as it is written: 1,800.50, .5, -3, 1/2; None where it is none."""
    found = _NUMBER.fullmatch(text.strip().rstrip("."))
    if found is None:
        return None
    above, _, below = _plain_number(found).replace(",", "").partition("/")
    return Fraction(above) / Fraction(below or "1")


def _equal_numbers(left: str | None, right: str) -> bool:
    value = None if left is None else _read_number(left)
    return value is not None and value == _read_number(right)


def grade_number(gold: str, text: str, *, stated: re.Pattern[str] = HASHES) -> tuple[Grade, ...]:
    """Grade one answer with the three extractors; strict, the score's own, first. `stated` is the
    strict one's pattern.
    """
    found_strict, found_flexible, found_number = (
        strict_match(text, stated),
        flexible_extract(text),
        stated_number(text),
    )
    return (
        Grade(
            extractor="strict-match",
            extracted=found_strict,
            correct=found_strict is not None and _normalise(found_strict) == _normalise(gold),
        ),
        Grade(
            extractor="flexible-extract",
            extracted=found_flexible,
            correct=found_flexible is not None and _normalise(found_flexible) == _normalise(gold),
        ),
        Grade(
            extractor="numeric", extracted=found_number, correct=_equal_numbers(found_number, gold)
        ),
    )
