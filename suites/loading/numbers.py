"""Reads numbers out of model answers: lm-eval's two GSM8K extractors, and a numeric one of ours."""

import re
from fractions import Fraction

from harness.contract import Grade

HASHES = re.compile(r"#### (\-?[0-9\.\,]+)")  # `strict-match` of lm-eval's gsm8k
# `strict-match` of its gsm8k-cot; as there, the last digit is lost where no period follows
SENTENCE = re.compile(r"The answer is (\-?[0-9\.\,]+).")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
# A sign (also the typographic minus) before or after a currency, digits with or without a whole
# part, and the denominator of a fraction.
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


def strict_match(text: str, pattern: re.Pattern[str] = HASHES) -> str | None:
    """Return the first number in the form of `pattern`, as lm-eval's `strict-match` filters do."""
    numbers = pattern.findall(text)
    return numbers[0].strip() if numbers else None


def flexible_extract(text: str) -> str | None:
    """Return the last number-like part, as lm-eval's `flexible-extract` filter does."""
    matches = _FLEXIBLE.findall(text)
    return next(group for group in matches[-1] if group).strip() if matches else None


def stated_number(text: str) -> str | None:
    """Return the number that an answer states: after `####`, "answer is" or boxed, else the last.

    It is compared as a number, so that `$18.00` and `18` are equal. This separates a change of form
    from a loss of ability, which lm-eval's two extractors do not.
    """
    text = _DATE.sub(lambda date: date[0].replace("/", " "), text)
    for pattern in (_STATED, _BOXED):
        match = pattern.search(text)
        if match:
            return _plain_number(match)
    matches = list(_NUMBER.finditer(text))
    return _plain_number(matches[-1]) if matches else None


def _plain_number(match: re.Match[str]) -> str:
    """Return a number without its currency, with a plain minus."""
    sign = "-" if match["sign"] or match["minus"] else ""
    return f"{sign}{match['digits']}{''.join((match['below'] or '').split())}"


def _read_number(text: str) -> Fraction | None:
    """Read a number such as 1,800.50, .5, -3 or 1/2; None for any other text."""
    match = _NUMBER.fullmatch(text.strip().rstrip("."))
    if match is None:
        return None
    numerator, _, denominator = _plain_number(match).replace(",", "").partition("/")
    return Fraction(numerator) / Fraction(denominator or "1")


def _equal_numbers(answer: str | None, gold: str) -> bool:
    """Tell whether two texts are the same number."""
    value = None if answer is None else _read_number(answer)
    return value is not None and value == _read_number(gold)


def grade_number(
    gold: str, text: str, *, strict_pattern: re.Pattern[str] = HASHES
) -> tuple[Grade, ...]:
    """Grade an answer with the three extractors; strict, the one of the score, comes first.

    `strict_pattern` is that of the strict one.
    """
    strict, flexible, number = (
        strict_match(text, strict_pattern),
        flexible_extract(text),
        stated_number(text),
    )
    return (
        Grade(extractor="strict-match", extracted=strict, correct=_equal_texts(strict, gold)),
        Grade(
            extractor="flexible-extract", extracted=flexible, correct=_equal_texts(flexible, gold)
        ),
        Grade(extractor="numeric", extracted=number, correct=_equal_numbers(number, gold)),
    )


def _equal_texts(answer: str | None, gold: str) -> bool:
    """Tell whether two texts are equal, as lm-eval's gsm8k compares them."""
    return answer is not None and _normalise(answer) == _normalise(gold)
