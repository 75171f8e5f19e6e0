"""`harness check` and `harness baseline`: exit codes, files, and every mistake in one line."""

import json
import random
from xml.etree import ElementTree

import pytest
from gate_rows import ENVIRONMENT, SAME, TEACHES, flipped, frozen, harness, marks, row

from harness.errors import HarnessError
from harness.gate import check as gate_check
from harness.gate.check import check
from harness.gate.rules import Rules
from harness.records.baseline import read_baseline, write_baseline
from harness.records.conditions import ModelReference
from harness.records.record import write_record


def test_a_store_is_judged_by_its_newest_run(tmp_path):
    """A store keeps every older success; a newer failure of the same row must not hide
    behind it.
    """
    broken = row("int8", "", scores=(), status="failed", reason="out of memory", key="new")
    for record in (TEACHES, SAME, broken):
        write_record(tmp_path / "cells" / record.key[:24] / "record.json", record)
    (tmp_path / "runs").mkdir()
    for name, keys in (
        ("20260101-000000-1", ["teacher-None", "int8-None"]),
        ("20260102-000000-1", ["teacher-None", "new"]),
    ):
        (tmp_path / "runs" / f"{name}.json").write_text(json.dumps({"kind": "run", "cells": keys}))
    done = harness("check", tmp_path, "--margin", "0.9")
    assert done.return_value == 4 and "out of memory" in done.output
    assert (
        harness(
            "check", tmp_path / "runs" / "20260101-000000-1.json", "--margin", "0.9"
        ).return_value
        == 0
    )


def test_two_records_of_one_row_and_seed_are_refused(place):
    write_record(place / "again.json", row("int8", marks(100), key="again"))
    done = harness("check", place)
    assert "two records of int8; name one run's file" in str(done.exception)
    with pytest.raises(HarnessError, match="two records of int8"):
        check([SAME, SAME], Rules(margin=0.9))


def test_a_defect_of_ours_is_no_regression(place, monkeypatch, capsys):
    from harness.cli import app as cli_app

    monkeypatch.setattr(gate_check, "check", lambda *given, **named: 1 / 0)
    monkeypatch.setattr("sys.argv", ["harness", "check", str(place)])
    with pytest.raises(SystemExit) as ended:
        cli_app.main()
    assert ended.value.code == 2 and "ZeroDivisionError" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_one_line(place, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file, and a folder is needed" in str(
        harness("check", place, "--junit", tmp_path / "file" / "j.xml").exception
    )
    (place / "folder.json").mkdir()
    assert "folder.json: a folder stands where a file should be" in str(
        harness("check", place).exception
    )


def test_exit_codes_and_files(place, tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    done = harness(
        "check", place, "--junit", tmp_path / "j.xml", "--json", tmp_path / "v.json", "--annotate"
    )
    assert done.return_value == 0 and "passed: 1 passed" in done.output
    assert ElementTree.parse(tmp_path / "j.xml").getroot().get("failures") == "0"
    assert json.loads((tmp_path / "v.json").read_text())["rules"]["margin"] == 0.95
    assert "### compression-harness: passed" in (tmp_path / "summary.md").read_text()
    assert harness("check", place, "--margin", "0.999").return_value == 3
    write_record(place / "int8.json", row("int8", flipped(marks(800), lose=200)))
    done = harness("check", place, "--annotate")
    assert done.return_value == 1 and "::error title=int8" in done.output


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--margin", "95"], "--margin 95: give the share"),
        (["--margin", "much"], "--margin much"),
        (["--alpha", "2"], "--alpha 2: give a share"),
        (["--tolerance", "-1"], "--tolerance -1: give points"),
        (
            ["--baseline", "nothing.json"],
            "no baseline at nothing.json; type: harness baseline update",
        ),
        (["--measured", "nothing.json"], "not a file of harness measure"),
    ],
)
def test_bad_input_is_one_line(place, given, said):
    done = harness("check", place, *given)
    assert said in str(done.exception) and "\n" not in str(done.exception)


def test_an_empty_folder_and_a_torn_record_are_named(tmp_path, place):
    (tmp_path / "empty").mkdir()
    assert "no records in" in str(harness("check", tmp_path / "empty").exception)
    (place / "torn.json").write_text("{")
    assert "torn.json: not a whole JSON file" in str(harness("check", place).exception)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0.95", (0.95, False)),
        ("95%", (0.95, False)),
        ("2points", (0.02, True)),
        ("1.5 pp", (0.015, True)),
    ],
)
def test_margins_are_read(text, found):
    from harness.gate.inputs import parse_margin

    assert parse_margin(text) == pytest.approx(found)


def test_a_baseline_is_frozen_shown_compared_and_moved(place, tmp_path):
    path = tmp_path / "b.json"
    done = harness(
        "baseline", "update", place, "--baseline", path, "--reason", "first", "--margin", "0.9"
    )
    assert done.return_value == 0 and "2 rows frozen" in done.output, done.exception
    before = path.read_bytes()
    assert (
        harness(
            "baseline",
            "update",
            place,
            "--baseline",
            tmp_path / "again.json",
            "--reason",
            "first",
            "--margin",
            "0.9",
        ).return_value
        == 0
    )
    assert (tmp_path / "again.json").read_bytes() == before  # the same records give the same bytes
    frozen = read_baseline(path)
    assert (
        frozen.margin == 0.9
        and frozen.rows[1].scores[0].outcomes == SAME.scores[0].outcomes["strict-match"]
    )
    assert harness("check", place, "--baseline", path).return_value == 0
    shown = harness("baseline", "show", path).output
    assert "int8" in shown and "first" in shown and "90 % must be kept" in shown
    write_record(
        place / "int8.json", row("int8", flipped(SAME.scores[0].outcomes["strict-match"], lose=60))
    )
    diff = harness("baseline", "diff", path, place).output
    assert "60/0" in diff and "0.8000 -> 0.7400" in diff
    checked = harness("check", place, "--baseline", path)
    assert checked.return_value == 1 and "60 lost and 0 won" in checked.output
    refused = harness("baseline", "update", place, "--baseline", path, "--reason", "worse")
    assert "does not move" in str(refused.exception) and path.read_bytes() == before
    assert (
        harness(
            "baseline",
            "update",
            place,
            "--baseline",
            path,
            "--reason",
            "worse, and why",
            "--accept-regression",
        ).return_value
        == 0
    )
    moved = read_baseline(path)
    assert [change.reason for change in moved.history] == [
        "first",
        "worse, and why",
    ] and moved.history[1].accepted == ("int8 gsm8k-mini [frozen]",)
    assert moved.margin == 0.9


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"limited": True}, "run it again without --limit"),
        (
            {"environment": ENVIRONMENT.model_copy(update={"dirty": True})},
            "working tree with changes",
        ),
        ({"status": "failed", "reason": "nan at step 3", "scores": ()}, "nan at step 3"),
        ({"teachers": (ModelReference(name="o", digest="o"),)}, "2 different teachers"),
    ],
)
def test_no_baseline_is_made_of_what_nobody_should_trust(place, tmp_path, changes, said):
    write_record(place / "response.json", row("response", marks(700)).model_copy(update=changes))
    done = harness("baseline", "update", place, "--baseline", tmp_path / "b.json", "--reason", "x")
    assert said in str(done.exception) and not (tmp_path / "b.json").exists()


def test_rows_of_another_teacher_never_join_a_baseline(place, tmp_path):
    path = tmp_path / "b.json"
    write_record(place / "int4.json", row("int4", marks(790)))
    harness("baseline", "update", place, "--baseline", path, "--reason", "first")
    other = ModelReference(name="other", digest="o", weight_bytes=4_000)
    for label in ("teacher", "int8", "int4"):
        write_record(place / f"{label}.json", row(label, marks(800), teachers=(other,)))
    done = harness(
        "baseline", "update", place, "--baseline", path, "--reason", "x", "--rows", "int4"
    )
    assert "another teacher than these records" in str(done.exception)


def test_frozen_rows_are_dropped_only_when_asked(place, tmp_path):
    path = tmp_path / "b.json"
    write_record(place / "int4.json", row("int4", marks(790)))
    harness("baseline", "update", place, "--baseline", path, "--reason", "first")
    (place / "int4.json").unlink()
    done = harness("baseline", "update", place, "--baseline", path, "--reason", "fewer")
    assert "holds int4, of which there is no record" in str(done.exception)
    assert (
        harness(
            "baseline", "update", place, "--baseline", path, "--reason", "fewer", "--drop"
        ).return_value
        == 0
    )
    assert {frozen_row.label for frozen_row in read_baseline(path).rows} == {"teacher", "int8"}


def test_a_reason_is_asked_for(place, tmp_path):
    assert "--reason is empty" in str(
        harness("baseline", "update", place, "--baseline", tmp_path / "b.json").exception
    )


def test_an_edited_baseline_is_found(tmp_path):
    path = tmp_path / "b.json"
    write_baseline(path, frozen(SAME, margin=0.95))
    path.write_text(path.read_text().replace('"margin": 0.95', '"margin": 0.5'))
    assert "edited by hand" in str(harness("check", tmp_path, "--baseline", path).exception)


def test_a_baseline_of_one_row_moves_that_row_alone(place, tmp_path):
    path = tmp_path / "b.json"
    write_record(place / "int4.json", row("int4", marks(790)))
    harness("baseline", "update", place, "--baseline", path, "--reason", "first")
    write_record(place / "int4.json", row("int4", marks(795)))
    write_record(place / "int8.json", row("int8", marks(799)))
    assert (
        harness(
            "baseline",
            "update",
            place,
            "--baseline",
            path,
            "--reason",
            "better int4",
            "--rows",
            "int4",
        ).return_value
        == 0
    )
    values = {
        frozen_row.label: frozen_row.scores[0].value for frozen_row in read_baseline(path).rows
    }
    assert values == {"teacher": 0.8, "int4": 0.795, "int8": 0.8}


def test_ten_methods_fit_into_git(tmp_path):
    draw = random.Random(1)
    rows = [row(f"m{at}", "".join(draw.choice("01") for _ in range(1319))) for at in range(10)]
    write_baseline(tmp_path / "b.json", frozen(TEACHES, *rows))
    assert (tmp_path / "b.json").stat().st_size < 200_000
