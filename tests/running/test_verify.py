"""`harness verify`: a record and everything beside it agree, and the first thing that does not is
named.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import harness
from harness.files.lines import signed_line
from harness.files.writing import read_signed, write_signed
from harness.running.verify import verify

STUDY = Path(__file__).parents[2] / "results" / "embedded" / "records"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A store with a teacher and a student, scored on a few items."""
    folder = tmp_path_factory.mktemp("verified")
    run = harness.run(
        ["int8"],
        "mini",
        limit=4,
        noise=0,
        grid="none",
        controls=False,
        out=folder / "runs",
        cache=folder / "cache",
    )
    assert run.succeeded
    return folder / "runs"


@pytest.fixture
def store(finished, tmp_path):
    """A copy that a test may spoil; the weights are looked for where they were made, so that they
    are checked too.
    """
    return shutil.copytree(finished, tmp_path / "runs")


def records_in(place, label="int8"):
    return [
        path
        for path in (place / "cells").glob("*/record.json")
        if json.loads(path.read_text())["label"] == label
    ]


def test_what_was_just_made_is_whole(finished):
    for path in (finished / "cells").glob("*/record.json"):
        result = verify(path)
        assert result.difference == "" and result.checked[-1].startswith(
            "the weights of teacher tiny"
        ), result


def test_committed_records_are_checked_against_themselves():
    result = verify(next(iter(sorted(STUDY.glob("*.json")))))
    assert result.difference == "" and result.checked == ("its digest and its figures",)


def edited(line, **changes):
    """Edit a line of answers as one would who signs it again: only what stands elsewhere
    can tell.
    """
    return signed_line(
        {**{name: value for name, value in json.loads(line).items() if name != "digest"}, **changes}
    ).rstrip("\n")


def first_line(path, change):
    first, *others = path.read_text(encoding="utf-8").split("\n")
    path.write_text("\n".join([change(first), *others]), encoding="utf-8")


def rewritten(path, old, new):
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


def signed_parts(cell, **changes):
    write_signed(cell / "parts.json", {**read_signed(cell / "parts.json"), **changes})


SPOILS = {
    "the record is edited": (
        lambda cell: rewritten(cell / "record.json", "int8", "int4"),
        "edited",
    ),
    "the record is torn": (
        lambda cell: (cell / "record.json").write_text("{"),
        "not a whole JSON file",
    ),
    "an answer is edited": (
        lambda cell: first_line(cell / "samples.jsonl", lambda line: edited(line, text="another")),
        "the stored answers",
    ),
    "an outcome is flipped": (
        lambda cell: first_line(
            cell / "samples.jsonl",
            lambda line: edited(
                line,
                correct={name: not right for name, right in json.loads(line)["correct"].items()},
            ),
        ),
        " in the record (",
    ),
    "an answer is gone": (
        lambda cell: first_line(cell / "samples.jsonl", lambda line: ""),
        "answers are stored, the record says",
    ),
    "the answers are gone": (
        lambda cell: (cell / "samples.jsonl").unlink(),
        "samples.jsonl is missing",
    ),
    "the answers are no JSON": (
        lambda cell: first_line(cell / "samples.jsonl", lambda line: "[1, 2]"),
        "samples.jsonl cannot be read",
    ),
    "what was told is torn": (
        lambda cell: (cell / "job.json").write_text("{"),
        "job.json cannot be read",
    ),
    "what was told is of another": (
        lambda cell: (cell / "job.json").write_text('{"cell": {"key": "0"}}'),
        "job.json belongs to another",
    ),
    "the parts are edited": (
        lambda cell: rewritten(cell / "parts.json", "lm-eval", "lm-evil"),
        "parts.json cannot be read",
    ),
    "the parts are another cell's": (
        lambda cell: signed_parts(cell, students=["0"]),
        "parts.json belongs to another key",
    ),
    "the folder is another cell's": (
        lambda cell: cell.rename(cell.with_name("0" * 24)),
        "its key is",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILS.values(), ids=SPOILS)
def test_the_first_difference_is_named(spoil, message, store):
    [record] = records_in(store)
    spoil(record.parent)
    place = record if record.exists() else store / "cells" / ("0" * 24) / "record.json"
    assert message in verify(place).difference


def test_weights_that_changed_are_named(finished, store):
    from harness.running.job import CellJob

    [record] = records_in(store)
    job = json.loads((record.parent / "job.json").read_text())
    mine = store / "students" / Path(job["stage_folders"][-1]).name
    (record.parent / "job.json").write_text(json.dumps({**job, "stage_folders": [str(mine)]}))
    assert verify(record).difference == ""
    with (mine / "student" / "config.json").open("a") as stream:
        stream.write(" ")
    assert verify(record).difference.startswith("student: the weights in")
    assert (
        CellJob.model_validate_json((record.parent / "job.json").read_text()).cell.label == "int8"
    )


def test_the_command_says_each_record_and_exits_with_1_where_one_differs(store):
    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-P", "-m", "harness.cli", "verify", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
        )

    [record] = records_in(store)
    (record.parent / "samples.jsonl").unlink()
    result = command(store)
    assert (
        result.returncode == 1
        and "DIFFERS: samples.jsonl is missing" in result.stdout
        and "2 records, 1 differ" in result.stdout
    )
    nowhere = command(store / "nowhere")
    assert nowhere.returncode == 2 and len(nowhere.stderr.splitlines()) == 1


def test_scores_are_computed_again_where_that_is_asked_for(finished, monkeypatch):
    import harness.running.evaluation

    [record] = records_in(finished)
    assert verify(record, score=True).checked[-1] == "its scores, computed again"
    original = harness.running.evaluation.score_again

    def otherwise(job):
        first, *others = original(job)
        name, marks = next(iter(first.outcomes.items()))
        flipped = {**first.outcomes, name: ("0" if marks[0] == "1" else "1") + marks[1:]}
        return [first.model_copy(update={"outcomes": flipped}), *others]

    monkeypatch.setattr(harness.running.evaluation, "score_again", otherwise)
    assert "item 0 is " in verify(record, score=True).difference
