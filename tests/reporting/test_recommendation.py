"""What a recommendation says, for people and for programs, and which questions are refused."""

import json

import pytest
from gate_rows import SAME, TEACHES, flipped, marks, row

from harness.analysis.comparison import group_records
from harness.analysis.decision import Question, decide
from harness.errors import HarnessError
from harness.reporting.recommendation import (
    answer_text,
    asked_text,
    decision_json,
    decision_text,
    refuse_question,
)

RECORDS = [TEACHES, SAME]


def answered(records, **asked):
    return decide(group_records(records), Question(**{"keep": 0.95, **asked}))


def test_a_named_row():
    decision = answered(RECORDS)
    assert answer_text(decision) == "take int8: the smallest of 1 that hold"
    text = decision_text(decision)
    assert "asked: the smallest row that keeps 95 % on every task" in text
    assert "Holm over 1 rows" in text
    written = json.loads(decision_json(decision))
    assert (written["answer"], written["row"], written["exit_code"]) == ("take", "int8", 0)
    assert written["candidates"][0]["tasks"][0]["retention"]["low"] > 0.95


def test_nothing_that_can_be_named():
    lossy = row("int4", flipped(marks(800), lose=300))
    assert answer_text(answered([TEACHES, lossy])).startswith("no row can: each is shown to miss")
    undecided = row("int4", flipped(marks(800), lose=45, win=10))
    text = answer_text(answered([TEACHES, undecided]))
    assert text.startswith("cannot tell: ")
    assert text.endswith("(nearest: int4)")
    assert "teachers and controls" in answer_text(answered([TEACHES]))


def test_everything_that_was_asked_is_said():
    question = Question(
        keep=0.02, points=True, memory=2**33, faster=2, smaller=3, tasks=("a", "b"), take="fastest"
    )
    assert asked_text(question) == (
        "the fastest row that loses less than 2 points on a and b, within 8.00 GiB, at 2 times the "
        "teacher's decode speed, 3 times smaller on disk"
    )


def test_labels_of_others_reach_no_terminal():
    wild = row("int8\x1b[31m", flipped(marks(800), lose=5))
    assert "\x1b" not in decision_text(answered([TEACHES, wild]))
    assert "\\u001b" not in decision_json(answered([TEACHES, wild]))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"alpha": 0.6}, "--alpha 0.6"),
        ({"faster": 0.0}, "--faster 0: give a ratio"),
        ({"smaller": -1.0}, "--smaller -1"),
        ({"tasks": ("gsm8k",)}, "gsm8k"),
        ({"rows": ("int9",)}, "int9"),
    ],
)
def test_questions_that_cannot_be_answered_are_refused(asked, message):
    with pytest.raises(HarnessError, match=message):
        refuse_question(Question(**{"keep": 0.95, **asked}), RECORDS)


def test_records_without_a_teacher_are_refused():
    with pytest.raises(HarnessError, match="no teacher that succeeded"):
        refuse_question(Question(keep=0.95), [SAME])


def test_a_reason_that_all_rows_share_is_said_once():
    """`--on` a task that nobody scored, or a teacher at chance: not the same words in each row."""
    other = row("int4", flipped(marks(800), lose=5))
    decision = answered([TEACHES, SAME, other], tasks=("unseen",))
    text = decision_text(decision)
    assert text.count("unseen was not scored") == 2  # under the table, and in the answer
    assert "every row: unseen was not scored" in text
    own = answered([TEACHES, SAME, row("int4", flipped(marks(800), lose=300))])
    assert "every row" not in decision_text(own)
