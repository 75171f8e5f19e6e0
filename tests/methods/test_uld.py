"""Students of another tokenizer: aligned positions, the two ways out, and who refuses."""

import json
import math
from itertools import islice

import pytest
from distilling import REGISTRY, TASKS, job

from harness.data.source import LocalOrHubData
from harness.errors import HarnessError
from harness.models.language_model import open_model
from methods.training.base import full_solution_pairs
from methods.uld import aligned_rows


def test_equal_tokenizers_align_every_position(tiny):
    tokenizer = open_model(tiny).tokenizer
    pairs = full_solution_pairs(islice(TASKS["gsm8k-mini"].examples("train", LocalOrHubData()), 5))
    rows, _ = aligned_rows(tokenizer, tokenizer, pairs, longest=512)
    assert all(
        row.teacher_tokens.pairs
        == tuple((position, position) for position in range(row.trained_tokens))
        for row in rows
    )


def test_aligned_positions_stand_behind_the_same_text_in_both_tokenizers(tiny, other_tokenizer):
    tokenizer = open_model(tiny).tokenizer
    text = " Mia hat 3 Äpfel – und 12 €.\n#### 12"
    [row], _ = aligned_rows(tokenizer, other_tokenizer, [("Frage:", text)], longest=512)
    assert len(row.teacher_tokens.pairs) > 5
    for position, teacher_position in row.teacher_tokens.pairs:
        texts = [
            tokenizer.decode(list(ids[start : start + count]), clean_up_tokenization_spaces=False)
            for tokenizer, ids, start, count in (
                (tokenizer, row.ids, row.trained_from, position),
                (
                    other_tokenizer,
                    row.teacher_tokens.ids,
                    row.teacher_tokens.trained_from,
                    teacher_position,
                ),
            )
        ]
        assert texts[0] == texts[1] and text.startswith(texts[0])
    assert row.teacher_tokens.pairs[0] == (0, 0) and row.teacher_tokens.pairs[-1] == (
        row.trained_tokens - 1,
        len(row.teacher_tokens.ids) - row.teacher_tokens.trained_from - 1,
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["uld", "cot"])
def test_a_student_of_another_tokenizer_is_trained_by_both_ways_out(
    method, tiny, foreign, tmp_path
):
    first_job = job(
        [tiny], tmp_path / "x", student=str(foreign.path), student_base=foreign, tokens=6_000
    )
    student = REGISTRY.build(method, {"batch_size": 4, "learning_rate": 1e-2}).compress(first_job)
    cost = json.loads((tmp_path / "x" / "cost.json").read_text())
    lines = [
        json.loads(line) for line in (tmp_path / "x" / "training.jsonl").read_text().splitlines()
    ]
    losses = [line["validation_ce"] for line in lines if "validation_ce" in line]
    assert losses[-1] < math.log(300) - 0.5 and student.digest != foreign.digest
    if method == "uld":
        second_job = job(
            [tiny], tmp_path / "y", student=str(foreign.path), student_base=foreign, tokens=6_000
        )
        REGISTRY.build(
            method, {"batch_size": 4, "micro_batch_size": 1, "learning_rate": 1e-2}
        ).compress(second_job)
        split = json.loads((tmp_path / "y" / "cost.json").read_text())["notes"]["terms"]
        assert split["uld"]["last"] == pytest.approx(
            cost["notes"]["terms"]["uld"]["last"], rel=1e-3
        )
        notes = cost["notes"]
        assert (
            0.1 * notes["positions"] < notes["aligned"] < notes["positions"]
            and notes["terms"]["uld"]["last"] > 0
        )


@pytest.mark.slow
def test_other_methods_refuse_another_tokenizer_and_name_the_two_ways_out(tiny, foreign, tmp_path):
    for method in ("response", "feature", "attention", "selective", "on-policy"):
        with pytest.raises(
            HarnessError, match=r"different vocabularies.*--methods cot .*--methods uld"
        ):
            REGISTRY.build(method, {}).compress(
                job([tiny], tmp_path / method, student=str(foreign.path), student_base=foreign)
            )
