"""Reads GSM8K's gold answers: the number behind `####`, and the worked solution without its
calculator marks.
"""

import re


def final_number(answer: str) -> str:
    """Return what stands after `####` in a gold answer."""
    return answer.rpartition("#### ")[2].strip()


def without_marks(answer: str) -> str:
    """Drop the `<<...>>` calculator marks: the form in which rationales are trained and written."""
    return re.sub(r"<<[^>]*>>", "", answer)
