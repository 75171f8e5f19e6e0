"""The JSON schema of a record's file, for programs of other languages, made from its model."""

from typing import Any

from harness.records.conditions import Conditions
from harness.records.record import SCHEMA, RunRecord

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_DIGEST = {
    "type": "string",
    "pattern": "^[0-9a-f]{64}$",
    "description": "sha256 of everything else in the file, as canonical JSON",
}


def record_schema() -> dict[str, Any]:
    """Return the schema (draft 2020-12) of the files that this version writes.

    It holds fields, types, bounds, and which must be there. A file has the conditions among the
    record's own fields, and its digest beside them. A number may be `Infinity` or `NaN`, as Python
    writes them.
    """
    model_schema = RunRecord.model_json_schema(by_alias=True)
    fields, conditions = model_schema["properties"], model_schema["$defs"].pop(Conditions.__name__)
    del fields["conditions"]
    required = [name for name in model_schema["required"] if name != "conditions"]
    schema = {
        "$schema": DIALECT,
        "title": f"Record of compression-harness, schema {SCHEMA}",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "schema": {"const": SCHEMA},
            **{name: field for name, field in fields.items() if name != "schema"},
            **conditions["properties"],
            "digest": _DIGEST,
        },
        "required": sorted({"schema", "digest", *required, *conditions["required"]}),
        "$defs": model_schema["$defs"],
    }
    in_lines: dict[str, Any] = _with_descriptions_on_one_line(schema)
    return in_lines


def _with_descriptions_on_one_line(part: Any) -> Any:
    """Return a schema whose descriptions are the docstrings' words, however those are wrapped."""
    if isinstance(part, list):
        return [_with_descriptions_on_one_line(member) for member in part]
    if not isinstance(part, dict):
        return part
    lines = {name: _with_descriptions_on_one_line(member) for name, member in part.items()}
    if isinstance(lines.get("description"), str):
        lines["description"] = " ".join(lines["description"].split())
    return lines
