"""Scores made of logged items agree with what a record would hold."""

import pytest

from harness.records.consistency import READING_CONTEXT
from harness.records.logged_items import (
    FigureName,
    LoggedModel,
    LoggedTask,
    score_of_documents,
    score_of_numbers,
)
from harness.records.record import TaskScore

NAME = FigureName("acc", "acc")


@pytest.mark.parametrize(
    ("numbers", "unit", "hits"),
    [([1.0, 0.0, 1.0], "share", True), ([0.5, 1.0], "share", False), ([3.0, 9.5], "number", False)],
)
def test_a_score_of_numbers_is_consistent(numbers, unit, hits):
    score = score_of_numbers("letters", NAME, numbers, digest="d")
    assert TaskScore.model_validate(score.model_dump(), context=READING_CONTEXT) == score
    assert (score.unit, score.hit_or_miss) == (unit, hits)
    assert score.numbers == tuple(numbers)


def test_a_score_of_documents_is_consistent():
    score = score_of_documents(
        "pages", "bits_per_byte", [(-4.0, 2.0)], 2 / 0.6931471805599453, digest=""
    )
    assert TaskScore.model_validate(score.model_dump(), context=READING_CONTEXT) == score
    assert score.lower_is_better


def test_a_model_has_the_tasks_of_all_its_runs():
    task = LoggedTask("a", "", (), {})
    assert LoggedModel("m", {1: {"a": task, "b": task}, 2: {"a": task}}).tasks == ["a"]
