"""Our own rows as logged models: records, the items beside them, and what is refused."""

import json

import pytest
from gate_rows import row, score

from harness.errors import HarnessError
from harness.files.lines import signed_line
from harness.records.own_logs import item_lines, model_of_items, model_of_records


def item(number, correct, **changes):
    fields = {
        "task": "gsm8k-mini",
        "item": number,
        "doc_hash": f"d{number}",
        "target_hash": "t",
        "prompt_hash": f"p{number}",
        "correct": {"strict-match": correct},
        "text": str(correct),
        "position": None,
    }
    return {**fields, **changes}


def write(path, items):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(map(signed_line, items)), encoding="utf-8")
    return path


def test_a_record_alone_has_scores_and_no_items():
    model = model_of_records([row("int8", "1100", seed=1), row("int8", "1000", seed=2)], {})
    assert model.name == "int8"
    log = model.runs[2]["gsm8k-mini"]
    assert log.items == ()
    assert log.scores["strict-match"].value == 0.25


def test_the_items_beside_a_record_say_which_they_are(tmp_path):
    record = row("int8", "10")
    path = write(tmp_path / "samples.jsonl", [item(1, False), item(0, True)])
    log = model_of_records([record], {record.key: path}).runs[None]["gsm8k-mini"]
    assert [entry.document for entry in log.items] == ["d0", "d1"]
    short = write(tmp_path / "short.jsonl", [item(0, True)])
    with pytest.raises(HarnessError, match="1 items of gsm8k-mini, and its record has 2"):
        model_of_records([record], {record.key: short})


def test_every_extractor_is_a_figure_the_tasks_own_first():
    scores = (score("1100", outcomes={"numeric": "1111", "strict-match": "1100"}),)
    figures = model_of_records([row("int8", "", scores=scores)], {}).runs[None]["gsm8k-mini"].scores
    assert list(figures) == ["strict-match", "numeric"]
    assert figures["numeric"].value == 1.0
    assert figures["numeric"].numbers == (1.0, 1.0, 1.0, 1.0)


def test_items_alone_are_a_model_too(tmp_path):
    path = write(tmp_path / "cell" / "samples.jsonl", [item(0, True), item(1, False)])
    model = model_of_items(path)
    assert model.name == "cell"
    assert model.runs[None]["gsm8k-mini"].scores["strict-match"].outcomes == {"strict-match": "10"}
    ungraded = write(tmp_path / "samples.jsonl", [item(0, True) | {"correct": {}}])
    [score_] = model_of_items(ungraded).runs[None]["gsm8k-mini"].scores.values()
    assert "record.json" in score_.unpaired


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no item"),
        (signed_line(item(0, True)) * 2, "item 0 of gsm8k-mini stands there twice"),
        (signed_line(item(0, True)).replace("d0", "d9"), "line 1: its digest does not match"),
        (signed_line(item(0, True))[:-9], "line 1"),
        (json.dumps(item(0, True)) + "\n", "it carries no digest"),
        (signed_line({"task": "a", "item": 1}), "item 1: no doc_hash"),
    ],
)
def test_torn_edited_and_foreign_lines_are_refused(tmp_path, text, message):
    path = tmp_path / "samples.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(HarnessError, match=message):
        item_lines(path)
