"""Reads what a user typed after `--train-data` and `--calibration`. No torch."""

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from harness.data.teacher_sets import parse_teacher_set
from harness.data.training_sets import FORMS, PREFIX, TrainingSet
from harness.errors import HarnessError


def parse_training_sets(
    texts: Iterable[str], *, option: str = "--train-data"
) -> tuple[TrainingSet, ...]:
    """Read `FILE`, `FILE=WEIGHT`, `ORG/NAME` or `ORG/NAME:SPLIT=WEIGHT`, one for each set.

    For `--train-data`, `teacher` and `teacher:free` are read too. Raises `HarnessError` for a file
    that is not there, a weight that is none, and a set that is named twice.
    """
    sets = [_parsed_set(text, option) for text in texts]
    for index, training_set in enumerate(sets):
        if training_set.place in {other.place for other in sets[:index]}:
            raise HarnessError(f"--train-data names {training_set.place} twice; name it once")
    names = [training_set.name for training_set in sets]
    if double := next((name for name in names if names.count(name) > 1), ""):
        raise HarnessError(
            f"two files of --train-data are called {double.removeprefix(PREFIX)}; rename one, so "
            "that records can tell them apart"
        )
    return tuple(sets)


def _parsed_set(text: str, option: str) -> TrainingSet:
    if option == "--train-data" and (typed := parse_teacher_set(text)):
        return replace(typed.data, weight=_weight(typed.weight, text, option))
    place, _, weight = text.rpartition("=") if "=" in text else (text, "", "1")
    if Path(text).exists():  # a file whose name holds an equals sign
        place, weight = text, "1"
    training_set = TrainingSet(place, _weight(weight, text, option))
    if training_set.is_file and not Path(place).is_file():
        raise HarnessError(
            f"{option} {place}: there is no such file; give a file of JSON lines "
            f"({FORMS}), or a data set of the Hub as ORG/NAME"
        )
    return training_set


def _weight(typed: str, text: str, option: str) -> float:
    try:
        value = float(typed)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise HarnessError(
            f"{option} {text}: {typed!r} is no weight; write FILE=0.7, or leave it out"
        )
    return value
