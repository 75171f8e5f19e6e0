"""The student's own answers."""

import json
from itertools import islice

import pytest
from distilling import REGISTRY, TASKS, job

from harness.data.source import LocalOrHubData
from harness.models.language_model import open_model
from methods.training.base import full_solution_pairs
from methods.training.rollout import Rollout
from methods.training.rows import encode


def test_rollouts_are_plain_samples_kept_as_drawn_and_repeat_with_seed_and_step(tiny):
    student = open_model(tiny)
    # must not leak in
    student.model.generation_config.top_k, student.model.generation_config.top_p = 1, 0.01
    rows = encode(
        student.tokenizer,
        full_solution_pairs(islice(TASKS["gsm8k-mini"].examples("train", LocalOrHubData()), 4)),
        longest=512,
    )[0]
    always = Rollout(1.0, 3.0, 24, 1)
    first, second = always(student, rows, 1), always(student, rows, 1)
    assert first == second != always(student, rows, 2)
    for written, row in zip(first, rows, strict=True):
        assert (
            written.ids[: written.trained_from] == row.ids[: row.trained_from]
            and 1 <= written.trained_tokens <= 24
        )
    greedy = Rollout(1.0, 1e-4, 24, 1)(student, rows, 1)
    # at temperature 3 a greedy or top-1 answer would be the same for all draws
    assert first != greedy
    assert Rollout(0.0, 1.0, 24, 1)(student, rows, 1) == rows and always.written > 0
    mixed = [Rollout(0.5, 1.0, 4, 1)(student, rows[:1], number) == rows[:1] for number in range(40)]
    assert 8 < sum(mixed) < 32


@pytest.mark.slow
def test_on_policy_counts_what_the_student_wrote(tiny, tmp_path):
    REGISTRY.build("on-policy", {"on_policy_share": 1.0, "batch_size": 4, "longest": 20}).compress(
        job([tiny], tmp_path / "x")
    )
    cost = json.loads((tmp_path / "x" / "cost.json").read_text())
    wrote = cost["notes"]["student_wrote_tokens"]
    assert (
        wrote - 4 * 20 <= cost["trained_tokens"] <= wrote
        and cost["teacher_tokens"] == cost["seen_tokens"]
    )
