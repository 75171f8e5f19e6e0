"""The model card beside a student: what the Hub reads of it; it names no path of this machine."""

from pathlib import Path

import pytest

from harness.models.checkpoint import folder_digest
from harness.records.model_card import card_text, write_card
from harness.records.record import read_record

RECORDS = Path(__file__).parents[2] / "results" / "embedded" / "records"


@pytest.fixture(scope="module")
def record():
    return next(
        one
        for path in sorted(RECORDS.glob("*.json"))
        if (one := read_record(path)).method == "response"
    )


def test_the_hub_reads_name_base_and_scores(record):
    from huggingface_hub import ModelCard

    card = ModelCard(card_text(record))
    assert card.data.base_model == ["tiny"] and record.method in card.data.tags
    [score] = record.scores
    [result] = card.data.eval_results
    assert (
        result.dataset_type == score.task
        and result.metric_value == pytest.approx(score.value)
        and result.metric_name == score.primary
    )
    assert (
        f"{100 * score.value:.1f} %" in card.text
        and record.student.digest in card.text
        and f"seed {record.seed}" in card.text
    )


def test_a_path_is_shown_by_its_last_part_and_a_trial_is_called_one(record):
    base = record.student_base.model_copy(update={"name": "/home/somebody/models/mine"})
    text = card_text(record.model_copy(update={"student_base": base, "limited": True}))
    assert "mine" in text and "/home" not in text and "TRIAL" in text


def test_a_card_is_no_part_of_the_models_identity(record, random_model, tmp_path):
    import shutil

    folder = tmp_path / "student"
    shutil.copytree(random_model.path, folder)
    before = folder_digest(folder)
    assert write_card(folder, record).name == "README.md" and folder_digest(folder) == before
