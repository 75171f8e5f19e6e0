"""Find what `harness compare` was given: logs of lm-eval, or rows of ours. No torch."""

from collections.abc import Sequence
from pathlib import Path

from harness.errors import HarnessError, unknown
from harness.gate.inputs import records_of
from harness.records.lm_eval_logs import lm_eval_files, read_lm_eval_model
from harness.records.logged_items import LoggedModel
from harness.records.own_logs import model_of_items, model_of_records
from harness.records.record import RunRecord, read_record
from harness.records.samples import evidence_of

_ROW_MARK = "#"


def read_logged_model(text: str) -> LoggedModel:
    """Read one side of a comparison.

    That is a `samples_*.jsonl` of lm-eval, a `results_*.json` with the logs beside it, or its
    folder; or ours: `PLACE#ROW` of a run file, a store or a study (`#ROW` may be left out where
    there is one row), a cell's folder, its record, or its `samples.jsonl`. Raises `HarnessError`
    for anything else.
    """
    path = Path(text)
    place, row = (path, "") if path.exists() else _split_row(text)
    if not place.exists():
        raise HarnessError(
            f"{place}: no such file or folder; give a samples_*.jsonl of lm-eval, its folder, or a "
            "run of ours with its row (results/runs#int8)"
        )
    files = [] if row else lm_eval_files(place)
    if files:
        return read_lm_eval_model(files)
    if place.suffix == ".jsonl":
        return _model_of_jsonl(place)
    if (place / "record.json").is_file():
        place /= "record.json"
    if place.name == "record.json":
        return _model_of_cell(place)
    records = [record for record in records_of(place) if record.status == "success"]
    return _model_of_row(records, place, row)


def _split_row(text: str) -> tuple[Path, str]:
    place, _, row = text.partition(_ROW_MARK)
    return Path(place), row


def _model_of_jsonl(path: Path) -> LoggedModel:
    """Read a `samples.jsonl` of ours, by its record where that stands beside it."""
    record = path.with_name("record.json")
    return _model_of_cell(record) if record.is_file() else model_of_items(path)


def _model_of_cell(path: Path) -> LoggedModel:
    """Read the record of one cell. Raises `HarnessError` where the cell has failed."""
    record = read_record(path)
    if record.status != "success":
        raise HarnessError(f"{path}: {record.label} {record.status}: {record.reason}")
    samples = path.with_name("samples.jsonl")
    return model_of_records([record], {record.key: samples if samples.is_file() else None})


def _model_of_row(records: Sequence[RunRecord], place: Path, row: str) -> LoggedModel:
    """Pick a row of a run. Raises `HarnessError` where it has none of that name, or several."""
    labels = list(dict.fromkeys(record.label for record in records))
    if row and row not in labels:
        raise unknown("row", row, labels, hint=f"(in {place})")
    if not row and len(labels) != 1:
        listed = ", ".join(labels) or "none that succeeded"
        raise HarnessError(
            f"{place} has {len(labels)} rows ({listed}); name one: {place}{_ROW_MARK}"
            f"{labels[0] if labels else 'ROW'}"
        )
    members = [record for record in records if record.label == (row or labels[0])]
    evidence = evidence_of(place, members)
    return model_of_records(members, {key: files.samples for key, files in evidence.items()})
