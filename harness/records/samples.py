"""What stands beside a record in a store: answers of items, and the log of training. No torch.

A study keeps records alone, so both may be missing; then pages and exports say so.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.files.lines import read_json_lines, verify_line
from harness.files.untrusted import Unreadable, read_object
from harness.records.record import RunRecord


@dataclass(frozen=True)
class Evidence:
    """Where the answers and the training log of one record are; None where they were not kept."""

    samples: Path | None
    training: Path | None

    def answers(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of items, task by task in item order."""
        yield from _verified_rows(self.samples)

    def steps(self) -> Iterator[dict[str, Any]]:
        """Yield the log of each training step: step, tokens seen, rate, and every loss term."""
        yield from _lines(self.training)


def _lines(path: Path | None) -> Iterator[dict[str, Any]]:
    if path is None or not path.exists():
        return
    for value in read_json_lines(
        path, skip_torn=True
    ):  # a run that was killed leaves a torn last line
        if isinstance(value, dict):
            yield value


def _verified_rows(path: Path | None) -> Iterator[dict[str, Any]]:
    """Yield the rows of items whose digests match: an edited answer is shown nowhere.

    A file from before there were digests has none.
    """
    has_digests = any("digest" in line for line in _lines(path))
    for line in _lines(path):
        with suppress(ValueError):
            row = verify_line(line) if has_digests else line
            if _is_row(row):
                yield row


_FIELD_TYPES = {
    "task": str,
    "item": int,
    "group": str,
    "gold": str,
    "prompt": str,
    "text": str,
    "correct": dict,
    "extracted": dict,
    "log_probabilities": list,
    "tokens": int,
}


def _is_row(value: dict[str, Any]) -> bool:
    """Tell whether an object names a task and an item, and its other fields have their types."""
    types_match = all(
        type(value[name]) is kind for name, kind in _FIELD_TYPES.items() if name in value
    )
    return (
        types_match
        and "task" in value
        and "item" in value
        and all(type(number) in (int, float) for number in value.get("log_probabilities", ()))
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def evidence_of(place: Path, records: Sequence[RunRecord]) -> Mapping[str, Evidence]:
    """Find the evidence of records, by key.

    It lies in the store that `place` is, or that its run file belongs to.
    """
    root = place.parent.parent if place.is_file() else place
    evidence: dict[str, Evidence] = {}
    for record in records:
        cell = root / "cells" / record.key[:24]
        samples = cell / "samples.jsonl"
        training = None
        try:
            folders = read_object(cell / "job.json").get("stage_folders")
        except Unreadable:
            folders = []
        for folder in filter(_is_text, folders if isinstance(folders, list) else []):
            log = root / "students" / Path(folder).name / "training.jsonl"
            training = log if log.exists() else training
        evidence[record.key] = Evidence(samples if samples.exists() else None, training)
    return evidence
