"""A record file: signed, of a schema that is known, read back from every older one."""

import json
import re
from pathlib import Path

import pytest
from made_records import RECORDS, TEACHERS, numbered

from harness.records import record
from harness.records.record import BadRecord, Cost, SharedCost
from harness.records.store import read_records
from harness.reporting import report


def test_a_record_that_was_edited_by_hand_is_refused(tmp_path):
    record.write_record(tmp_path / "a.json", RECORDS[0])
    assert read_records(tmp_path) == ([RECORDS[0]], [])
    text = (tmp_path / "a.json").read_text()
    (tmp_path / "a.json").write_text(
        text.replace('"tokens_per_answer": 31.5', '"tokens_per_answer": 21.5')
    )
    [problem] = read_records(tmp_path)[1]
    assert "a.json: edited after it was written" in problem
    (tmp_path / "a.json").write_text(re.sub(r',\s*"digest": "\w{64}"\s*}\s*$', "}", text))
    assert "edited after it was written" in read_records(tmp_path)[1][0]
    # an older schema has no digest
    (tmp_path / "a.json").write_text(text.replace(f'"schema": {record.SCHEMA}', '"schema": 5'))
    assert "edited after it was written" in read_records(tmp_path)[1][0]


def test_every_older_schema_is_read(tmp_path):
    data = json.loads(json.dumps(RECORDS[0].model_dump(mode="json", by_alias=True)))
    for schema in range(1, record.SCHEMA):
        old = {**data, "schema": schema}
        # files hold their own digest since schema 6
        signed = {"digest": record._digest(old)} if schema >= record._FIRST_SIGNED_SCHEMA else {}
        (tmp_path / f"{schema}.json").write_text(json.dumps({**old, **signed}))
    records, problems = read_records(tmp_path)
    assert (
        not problems
        and len(records) == record.SCHEMA - 1
        and {one.schema_number for one in records} == {record.SCHEMA}
    )


def test_a_field_that_no_schema_knows_is_refused(tmp_path):
    data = json.loads(RECORDS[0].model_dump_json(by_alias=True))
    (tmp_path / "x.json").write_text(json.dumps({**data, "schema": 5, "accuracy": 1.0}))
    with pytest.raises(BadRecord, match="accuracy"):
        record.read_record(tmp_path / "x.json")


def test_costs_of_stages_add_up():
    one = Cost(
        seen_tokens=10,
        seconds=2.0,
        flops=5.0,
        peak_bytes=7,
        shared=(SharedCost(key="k", seconds=1.0),),
        notes={"a": 1},
    )
    two = Cost(
        seconds=3.0, peak_bytes=9, shared=(SharedCost(key="k", seconds=1.0),), notes={"b": 2}
    )
    both = one + two
    assert (both.seen_tokens, both.seconds, both.flops, both.peak_bytes) == (10, 5.0, 5.0, 9)
    assert len(both.shared) == 1 and both.notes == {"a": 1, "b": 2} and both.energy_joules is None


def test_records_without_parts_are_read_and_said_unpaired(tmp_path):
    old = numbered(
        "teacher",
        TEACHERS,
        values={},
        unpaired="f1 is one figure of all items together",
        metric="f1",
    )
    record.write_record(tmp_path / "old.json", old)
    data = json.loads((tmp_path / "old.json").read_text())
    data.pop("digest")
    for score in data["scores"]:
        for name in ("form", "statistics", "signed"):
            score.pop(name)
    data["digest"] = record._digest(data)
    (tmp_path / "old.json").write_text(json.dumps(data))
    read = record.read_record(tmp_path / "old.json")
    assert read.scores[0].form == "" and "f1 is one figure" in report.markdown([read])


def test_every_committed_record_is_signed_and_none_is_read_without_its_digest(tmp_path):
    paths = sorted(Path(__file__).parents[2].glob("results/*/records/*.json"))
    assert len(paths) > 150
    for path in paths:
        data = json.loads(path.read_text(encoding="utf-8"))
        assert data["schema"] >= record._FIRST_SIGNED_SCHEMA and len(data["digest"]) == 64, path
    del data["digest"]
    for schema in (record.SCHEMA, record.SCHEMA - 1):
        (tmp_path / "x.json").write_text(json.dumps({**data, "schema": schema}))
        with pytest.raises(BadRecord, match="has a digest, and it has none"):
            record.read_record(tmp_path / "x.json")


def test_a_record_that_says_an_older_schema_than_its_fields_is_refused(tmp_path):
    whole = RECORDS[0].model_dump(mode="json", by_alias=True)
    whole["scores"][0]["metric"] = "exact_match"
    for schema in (1, 5):
        (tmp_path / "x.json").write_text(json.dumps({**whole, "schema": schema}))
        with pytest.raises(BadRecord, match=f"says schema {schema}, and metric came with schema"):
            record.read_record(tmp_path / "x.json")


@pytest.mark.parametrize("schema", [[], {}, "7", 7.0, None, True, 0, -1, 99, 10**17])
def test_a_schema_that_is_no_number_of_ours_is_said(schema, tmp_path):
    whole = RECORDS[0].model_dump(mode="json", by_alias=True)
    (tmp_path / "x.json").write_text(json.dumps({**whole, "schema": schema}))
    with pytest.raises(BadRecord, match="schema"):
        record.read_record(tmp_path / "x.json")
