"""How many items would decide, if the task has as many."""

import pytest
from claim_rows import score
from gate_rows import marks

from harness.gate.rules import items_needed, items_needed_among


@pytest.mark.parametrize(
    ("needed", "task", "limited", "expected"),
    [
        (1_200, "gsm8k", True, (1_200, 1_319, "about 1,200 items would decide")),
        (
            213_966,
            "mmlu",
            True,
            (None, 14_042, "it would take more than mmlu has (14,042): this task cannot decide it"),
        ),
        (
            1_320,
            "gsm8k",
            False,
            (None, 100, "it would take more than gsm8k has (100): this task cannot decide it"),
        ),
        (5_000, "somebody's", True, (5_000, None, "about 5,000 items would decide")),
        (
            5_000,
            "somebody's",
            False,
            (None, 100, "it would take more than somebody's has (100): this task cannot decide it"),
        ),
        (None, "gsm8k", True, (None, 1_319, "")),
    ],
)
def test_never_more_items_than_the_task_has(needed, task, limited, expected):
    assert items_needed(needed, score(marks(80, 100), task), limited) == expected


def test_several_tasks_and_documents_are_counted_too():
    assert (
        items_needed_among(9, 8, "a and b").text
        == "it would take more than a and b have (8): these tasks cannot decide it"
    )
    assert items_needed(50, score(marks(2, 4), "wikitext"), True, unit="documents") == (
        50,
        62,
        "about 50 documents would decide",
    )
