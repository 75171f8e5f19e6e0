"""Answers of an export against those of its row: counted by hand, within a declared tolerance."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.deploying import rescoring
from harness.deploying.rescoring import Rescoring, score_export
from harness.errors import HarnessError
from harness.scoring.items import ItemRow


def answer(item, *, right=True, text="A", task="t", **changes):
    fields = dict.fromkeys(("prompt_hash", "target_hash", "group", "gold", "stop"), "")
    return ItemRow(
        task=task, item=item, doc_hash=f"d{item}", text=text, extracted={}, tokens=1,
        correct={"acc": right}, **{**fields, **changes},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("items", "agreeing", "passed"),
    [(50, 48, True), (50, 47, False), (10, 10, True), (10, 9, False)],
)
def test_so_many_items_may_disagree_as_the_tolerance_says(items, agreeing, passed):
    found = Rescoring(items, agreeing, 0, 0.04, "gsm8k item 7")
    verdict = f"{'within' if passed else 'OUTSIDE'} the tolerance of {items // 25}"
    assert found.passed is passed
    assert f"{agreeing} as in its record, {items - agreeing} not ({verdict}); the" in str(found)


def scored(monkeypatch, old, new, primary="acc"):
    record = SimpleNamespace(scores=[SimpleNamespace(task="t", primary=primary)])
    row = SimpleNamespace(record=record, file=lambda name: name)
    conditions = SimpleNamespace(task_names=("t", "u", "v"))
    job = SimpleNamespace(cache=None, conditions=conditions)
    asked = {}
    monkeypatch.setattr(rescoring, "require_answers", lambda row: job)
    monkeypatch.setattr(rescoring, "read_rows", lambda path: old)
    monkeypatch.setattr(rescoring, "resolve_outside", lambda name, cache: name)

    def score_checkpoint(job, checkpoint, *, limit, progress):
        asked["limit"] = limit
        return new

    monkeypatch.setattr(rescoring, "score_checkpoint", score_checkpoint)
    found = score_export(row, Path("DIR"), items=50, tolerance=0.04, progress=print)
    assert asked == {"limit": 17}  # 50 over three tasks, rounded up
    return found


def test_grades_are_compared_item_by_item_and_answers_word_for_word(monkeypatch):
    old = [answer(0), answer(1), answer(2, right=False), answer(3)]
    new = [answer(0), answer(1, text="B"), answer(2, right=False, text="C"), answer(3, right=False)]
    found = scored(monkeypatch, old, [*new])
    assert (found.items, found.agreeing, found.same_answers) == (4, 3, 2)
    assert found.first == "t item 3" and not found.passed


def test_a_number_of_an_item_may_differ_by_two_per_cent(monkeypatch):
    def document(item, value):
        return replace(answer(item), correct={}, log_probabilities=(value,), words=5.0)

    old = [document(0, -100.0), document(1, -100.0), document(2, -100.0)]
    new = [document(0, -101.9), document(1, -102.1), document(2, -98.1)]
    found = scored(monkeypatch, old, new, primary="")
    assert (found.agreeing, found.first) == (2, "t item 1")


def test_other_items_than_the_records_are_refused(monkeypatch):
    with pytest.raises(HarnessError, match="item 0 is another one now than in the row's record"):
        scored(monkeypatch, [answer(0)], [replace(answer(0), doc_hash="other")])
    with pytest.raises(HarnessError, match="item 5 is another one"):
        scored(monkeypatch, [answer(0)], [answer(5)])


def test_a_gguf_file_is_scored_with_the_students_own_tokenizer(random_model, tmp_path, monkeypatch):
    other = tmp_path / "unpacked"
    shutil.copytree(random_model.path, other)
    (other / "tokenizer.json").write_text("as transformers reads it")
    checkpoint = replace(random_model, path=other)
    monkeypatch.setattr(rescoring, "resolve_outside", lambda name, cache: checkpoint)
    row = SimpleNamespace(model=random_model.path)
    job = SimpleNamespace(cache=tmp_path)
    with rescoring._opened_form(tmp_path / "a.gguf", row, job) as opened:
        assert opened.digest == random_model.digest  # weights of the file, tokenizer of the student
        place = opened.path
    assert not place.exists()
    with rescoring._opened_form(tmp_path / "a", row, job) as opened:
        assert opened.path == other
