"""How many items would decide, and whether a task has as many."""

from gate_rows import score

from harness.analysis.items_needed import items_needed, items_needed_among, task_items


def test_a_whole_task_has_no_more_items_than_were_scored():
    whole = score("10" * 50)
    assert task_items(whole, limited=False) == 100
    assert items_needed(101, whole, limited=False).needed is None
    assert "cannot decide it" in items_needed(101, whole, limited=False).text


def test_a_sample_says_how_many_would_do():
    assert items_needed(101, score("10", task="unlisted"), limited=True).needed == 101
    assert task_items(score("10", task="unlisted"), limited=True) is None
    assert task_items(score("10", task="gsm8k"), limited=True) == 1_319


def test_several_tasks_are_named():
    text = items_needed_among(500, 300, "a and b").text
    assert text == "it would take more than a and b have (300): these tasks cannot decide it"
