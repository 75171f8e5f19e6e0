"""Reads GSM8K's gold answers: the number after `####`, and the solution without marks."""

import re


def final_number(answer: str) -> str:
    """Return the number after `####` of a gold answer, as text."""
    return answer.rpartition("#### ")[2].strip()


def without_marks(answer: str) -> str:
    """Drop the `<<...>>` calculator marks; students train on this form and write it."""
    return re.sub(r"<<[^>]*>>", "", answer)
