"""Chosen tokens and chosen rows: exactly as many as were asked for, those that score highest, the
same share of each task.
"""

import pytest
import torch
from distilling import REGISTRY, TASKS, gradient_of, job, rows_of

from harness.data.examples import training_examples
from harness.errors import HarnessError
from harness.models.language_model import open_model
from methods.training.base import full_solution_pairs
from methods.training.positions import Positions
from methods.training.rows import batch_of, encode
from methods.training.selection import Selection
from methods.training.teachers import LiveTeacher, TrainedPositionLogits


@pytest.mark.parametrize("score", ["kl", "entropy", "excess", "random"])
def test_all_tokens_chosen_is_no_choice_and_the_split_changes_nothing(small, score):
    model, source = small("Llama").model, [LiveTeacher(small("Llama", hidden_size=64))]
    rows = rows_of(8)
    plain, expected = gradient_of(model, rows, 8)
    all_loss, gradient = gradient_of(
        model, rows, 8, sources=source, selection=Selection(1.0, score, 1)
    )
    assert all_loss == pytest.approx(plain, rel=1e-6) and torch.allclose(
        gradient, expected, atol=1e-6
    )
    half = Selection(0.5, score, 1)
    value, all_loss = gradient_of(model, rows, 8, sources=source, selection=half)
    split_value, split = gradient_of(model, rows, 3, sources=source, selection=half)
    assert split_value == pytest.approx(value, rel=1e-6) and torch.allclose(
        split, all_loss, atol=1e-6
    )


@pytest.mark.parametrize("score", ["kl", "entropy", "excess", "random"])
def test_exactly_the_counted_tokens_of_each_row_are_chosen_and_they_score_highest(small, score):
    opened, teacher = small("Llama"), LiveTeacher(small("Llama", hidden_size=64))
    rows = rows_of(5)
    batch = batch_of(rows, 1)
    positions = Positions(
        TrainedPositionLogits(opened.model)(batch),
        batch.labels_N,
        (teacher.read(batch, None),),
        batch,
    )
    selection = Selection(0.4, score, 7)
    kept, scores = selection.kept_positions(positions, 2), selection._scores(positions, 2)
    assert torch.equal(kept, kept.sort().values)
    chosen = torch.zeros_like(positions.labels_N, dtype=torch.bool).index_fill(0, kept, True)
    start = 0
    for row in rows:
        row_mask, row_scores = (
            chosen[start : start + row.trained_tokens],
            scores[start : start + row.trained_tokens],
        )
        assert (
            int(row_mask.sum())
            == selection.tokens_kept(row)
            == max(1, int(0.4 * row.trained_tokens + 0.5))
        )
        assert (
            row.trained_tokens == int(row_mask.sum())
            or row_scores[row_mask].min() >= row_scores[~row_mask].max()
        )
        start += row.trained_tokens
    if score == "random":
        assert torch.equal(kept, selection.kept_positions(positions, 2)) and not torch.equal(
            kept, selection.kept_positions(positions, 3)
        )


@pytest.mark.slow
def test_rows_are_ranked_by_what_the_setting_says(tiny, tmp_path):
    task_job = job([tiny], tmp_path / "x")
    examples = training_examples(TASKS, task_job.source, rows=12)
    short, *_ = REGISTRY.build("selective", {"by": "short"})._rank(task_job, examples)
    lengths = [
        row.trained_tokens
        for row in encode(open_model(tiny).tokenizer, full_solution_pairs(short), longest=512)[0]
    ]
    assert lengths == sorted(lengths)
    sure, rows, *_ = REGISTRY.build("selective", {"by": "confidence"})._rank(task_job, examples)
    opened = open_model(tiny)

    def loss(example):
        batch = batch_of(
            encode(opened.tokenizer, full_solution_pairs([example]), longest=512)[0], 1
        )
        with torch.no_grad():
            return float(
                torch.nn.functional.cross_entropy(
                    TrainedPositionLogits(opened.model)(batch), batch.labels_N
                )
            )

    losses = [loss(example) for example in sure]
    assert losses == pytest.approx(sorted(losses), abs=2e-3) and len(rows) == 12
    solved_first, _, notes, shared = REGISTRY.build("selective", {"by": "correct"})._rank(
        task_job, examples
    )
    assert 6 < notes["teacher_solves"] <= 12 and {example.prompt for example in solved_first} == {
        example.prompt for example in examples
    }
    assert shared[0]["tokens"] > 100  # what the teacher wrote for the choice is a cost of the row


@pytest.mark.parametrize(
    ("method", "settings"), [("selective", {"by": "long"}), ("selective-random", {"unit": "rows"})]
)
def test_chosen_rows_are_the_same_share_of_each_task(method, settings, tiny, tmp_path):
    method_object = REGISTRY.build(method, {**settings, "share": 0.25, "batch_size": 4})
    chosen = []
    object.__setattr__(
        method_object, "distil", lambda task_job, examples, **_: chosen.extend(examples)
    )
    method_object.compress(job([tiny], tmp_path / "x", rows=24))
    assert [sum(example.task == task for example in chosen) for task in TASKS] == [3, 3]


@pytest.mark.slow
def test_answers_that_choose_rows_are_written_by_the_named_teacher(
    tiny, specialist, tmp_path, monkeypatch
):
    from methods.training import traces

    writers, plain = [], traces.teacher_traces
    monkeypatch.setattr(
        traces,
        "teacher_traces",
        lambda *a, **given: writers.append(given["teacher"].name) or plain(*a, **given),
    )
    given = job([tiny, specialist], tmp_path / "x")
    examples = training_examples(TASKS, given.source, rows=8)
    *_, shared = REGISTRY.build("selective", {"by": "correct", "teacher": "tiny-math"})._rank(
        given, examples
    )
    assert writers == ["tiny-math"]
    *_, others = REGISTRY.build("selective", {"by": "correct"})._rank(given, examples)
    assert others[0]["key"] != shared[0]["key"]


@pytest.mark.parametrize("share", [0, 1.5])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(HarnessError, match="share"):
        REGISTRY.build("selective", {"share": share})
