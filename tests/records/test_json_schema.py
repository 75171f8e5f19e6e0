"""The JSON schema of a record is fresh, and every committed record conforms once it was read."""

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest

from harness.records import record
from harness.records.json_schema import record_schema

ROOT = Path(__file__).parents[2]
COMMITTED = sorted((ROOT / "results").rglob("records/*.json"))
SCHEMA = json.loads((ROOT / "docs" / "record.schema.json").read_text())
SILENT = {"title", "description", "default", "$defs", "$schema"}
TYPES = {"string": str, "boolean": bool, "array": list, "object": dict, "null": type(None)}
BOUNDS = {
    "minimum": lambda value, limit: value >= limit,
    "maximum": lambda value, limit: value <= limit,
    "exclusiveMinimum": lambda value, limit: value > limit,
    "minItems": lambda value, limit: len(value) >= limit,
    "maxItems": lambda value, limit: len(value) <= limit,
    "pattern": lambda value, limit: re.search(limit, value) is not None,
}


def is_of(kind, value):
    if kind in ("number", "integer"):
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and (kind == "number" or whole)
        )
    return isinstance(value, TYPES[kind])


def wrong(value, schema, place=""):
    """Return what does not conform, place by place; an unknown keyword is an error of this test."""
    if "type" in schema and not is_of(schema["type"], value):
        return [f"{place}: {value!r} is no {schema['type']}"]
    problems = []
    for keyword, stated in schema.items():
        if keyword in SILENT or keyword == "additionalProperties":
            continue
        if keyword == "$ref":
            problems += wrong(value, SCHEMA["$defs"][stated.rpartition("/")[2]], place)
        elif keyword == "anyOf":
            problems += (
                []
                if any(not wrong(value, choice, place) for choice in stated)
                else [f"{place}: none of anyOf"]
            )
        elif keyword in ("const", "enum"):
            problems += (
                []
                if value in (stated if keyword == "enum" else [stated])
                else [f"{place}: {value!r} is not {stated}"]
            )
        elif keyword == "type":
            pass  # looked at first
        elif keyword in BOUNDS:
            problems += (
                []
                if BOUNDS[keyword](value, stated)
                else [f"{place}: {value!r} is against {keyword} {stated}"]
            )
        elif keyword == "required":
            problems += [f"{place}: no {name}" for name in stated if name not in value]
        elif keyword == "properties":
            problems += [
                line
                for name in value
                if name in stated
                for line in wrong(value[name], stated[name], f"{place}.{name}")
            ]
        elif keyword == "prefixItems":
            problems += [
                line
                for item, kind in zip(value, stated, strict=False)
                for line in wrong(item, kind, f"{place}[]")
            ]
        elif keyword == "items":
            rest = value[len(schema.get("prefixItems", ())) :]
            problems += (
                [line for item in rest for line in wrong(item, stated, f"{place}[]")]
                if isinstance(stated, dict)
                else []
            )
        else:
            raise AssertionError(f"{place}: the keyword {keyword} is not known here")
    others = schema.get("additionalProperties", True)
    if others is not True and isinstance(value, dict):
        more = [name for name in value if name not in schema.get("properties", {})]
        problems += [f"{place}: unknown {name}" for name in more] if others is False else []
        problems += [
            line
            for name in more
            if others
            for line in wrong(value[name], others, f"{place}.{name}")
        ]
    return problems


def written(read, folder):
    """Return the file of a record, as this version writes it."""
    record.write_record(folder / "written.json", read)
    return json.loads((folder / "written.json").read_text())


def test_the_committed_schema_is_that_of_the_model():
    assert record_schema() == SCHEMA, "type: python docs/generate.py"
    assert SCHEMA["properties"]["schema"] == {"const": record.SCHEMA}


def test_committed_records_of_every_schema_conform_once_they_were_read(tmp_path):
    assert len(COMMITTED) > 150
    for path in COMMITTED:
        assert wrong(written(record.read_record(path), tmp_path), SCHEMA) == [], path


def old_record():
    data = json.loads(COMMITTED[0].read_text())
    return {name: value for name, value in data.items() if name != "digest"}


@pytest.mark.parametrize("schema", range(1, record.SCHEMA + 1))
def test_a_record_of_each_schema_conforms(schema, tmp_path):
    data = {**old_record(), "schema": schema}
    if schema >= 10:
        data["inherited_settings"] = data.pop("handed_on")
    if schema < record._FIRST_SIGNED_SCHEMA:  # their scores had fewer fields
        data["scores"] = [
            {name: value for name, value in score.items() if name not in record._LATER_FIELDS}
            for score in data["scores"]
        ]
    signed = {"digest": record._digest(data)} if schema >= record._FIRST_SIGNED_SCHEMA else {}
    (tmp_path / "old.json").write_text(json.dumps({**data, **signed}))
    assert wrong(written(record.read_record(tmp_path / "old.json"), tmp_path), SCHEMA) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"label": None}, ".label: None is no string"),
        ({"status": "fine"}, ".status: 'fine' is not"),
        ({"accuracy": 1.0}, ": unknown accuracy"),
        ({"schema": 8}, ".schema: 8 is not"),
        ({"scores": [{"task": "a"}]}, ".scores[]: no version"),
        ({"budget_tokens": "many"}, ".budget_tokens: 'many' is no integer"),
        ({"seconds": "1"}, ".seconds: '1' is no number"),
        ({"digest": "x"}, ".digest: 'x' is against pattern"),
        ({"teachers": {}}, ".teachers: {} is no array"),
    ],
)
def test_what_is_no_record_does_not_conform(change, problem, tmp_path):
    data = written(record.read_record(COMMITTED[0]), tmp_path)
    assert wrong(data, SCHEMA) == []
    assert any(problem in line for line in wrong({**data, **change}, SCHEMA)), wrong(
        {**data, **change}, SCHEMA
    )


def test_a_file_lacks_nothing_that_the_schema_requires(tmp_path):
    data = written(record.read_record(COMMITTED[0]), tmp_path)
    assert set(data) == set(SCHEMA["properties"])
    for name in SCHEMA["required"]:
        assert wrong({field: value for field, value in data.items() if field != name}, SCHEMA) == [
            f": no {name}"
        ]


def test_another_validator_says_the_same(tmp_path):
    if importlib.util.find_spec("jsonschema") is None:
        pytest.skip("jsonschema is not installed")
    from jsonschema import Draft202012Validator

    Draft202012Validator.check_schema(SCHEMA)
    for path in COMMITTED:
        data = written(record.read_record(path), tmp_path)
        assert Draft202012Validator(SCHEMA).is_valid(data), path
        assert not Draft202012Validator(SCHEMA).is_valid(
            {**data, "seconds": "long"}
        ) and not math.isnan(data["seconds"])
