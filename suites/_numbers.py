"""Reads numbers out of model answers: lm-eval's two GSM8K extractors and a numeric one, as pure functions."""

import re
from decimal import Decimal, InvalidOperation

from harness.contract import Grade

HASHES = re.compile(r"#### (\-?[0-9\.\,]+)")  # `strict-match` of lm-eval's gsm8k
SENTENCE = re.compile(r"The answer is (\-?[0-9\.\,]+).")  # of its gsm8k-cot; without a period after it the last digit is lost, as there
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_BOXED = re.compile(r"\\boxed\{\s*\$?(-?[0-9][0-9,]*(?:\.[0-9]+)?)")
_STATED = re.compile(r"(?:####|answer is:?)\s*\$?\s*(-?[0-9][0-9,]*(?:\.[0-9]+)?)", re.IGNORECASE)
_ANY = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?")


def final_number(answer: str) -> str:
    """Return what stands after `####` in a gold answer."""
    return answer.rpartition("#### ")[2].strip()


def without_marks(answer: str) -> str:
    """Drop the `<<...>>` calculator marks: the form in which rationales are trained and written."""
    return re.sub(r"<<[^>]*>>", "", answer)


def _normal(text: str) -> str:
    """Apply lm-eval's `regexes_to_ignore` of gsm8k and its `ignore_case`."""
    for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(pattern, "", text)
    return text.lower()


def strict(text: str, stated: re.Pattern[str] = HASHES) -> str | None:
    """Return the first number that stands in the form `stated`, as lm-eval's `strict-match` filters do."""
    found = stated.findall(text)
    return found[0].strip() if found else None


def flexible(text: str) -> str | None:
    """Return the last number-like run, as lm-eval's `flexible-extract` filter does."""
    found = _FLEXIBLE.findall(text)
    return next(part for part in found[-1] if part).strip() if found else None


def numeric(text: str) -> str | None:
    """Return the number that an answer states: the first of `####`, boxed, "answer is", else its last number.

    Unlike the two of lm-eval it is compared as a number, so `$18.00` and `18` are equal and format drift is
    told apart from lost ability.
    """
    for pattern in (_STATED, _BOXED):
        found = pattern.search(text)
        if found:
            return found[1]
    every = _ANY.findall(text)
    return every[-1] if every else None


def _equal(left: str | None, right: str) -> bool:
    try:
        return left is not None and Decimal(left.replace(",", "")) == Decimal(right.replace(",", ""))
    except InvalidOperation:
        return False


def grade_number(gold: str, text: str, *, stated: re.Pattern[str] = HASHES) -> tuple[Grade, ...]:
    """Grade one answer with the three extractors; strict, the score's own, first. `stated` is the strict one's pattern."""
    found_strict, found_flexible, found_number = strict(text, stated), flexible(text), numeric(text)
    return (
        Grade(
            extractor="strict-match", extracted=found_strict, correct=found_strict is not None and _normal(found_strict) == _normal(gold)
        ),
        Grade(
            extractor="flexible-extract",
            extracted=found_flexible,
            correct=found_flexible is not None and _normal(found_flexible) == _normal(gold),
        ),
        Grade(extractor="numeric", extracted=found_number, correct=_equal(found_number, gold)),
    )
