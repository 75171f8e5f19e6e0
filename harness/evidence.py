"""What stands beside a record in a store: the answers of every item, and the log of every training step. No torch.

A study keeps records alone, so both may be missing; then pages and exports say so.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.lines import json_lines
from harness.record import RunRecord


@dataclass(frozen=True)
class Evidence:
    """Where the answers and the training log of one record are; None where they were not kept."""

    samples: Path | None
    training: Path | None

    def answers(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of items, task by task in item order."""
        yield from _lines(self.samples)

    def steps(self) -> Iterator[dict[str, Any]]:
        """Yield what was logged of each training step: step, seen tokens, rate, and every loss term."""
        yield from _lines(self.training)


def _lines(path: Path | None) -> Iterator[dict[str, Any]]:
    if path is None or not path.exists():
        return
    for found in json_lines(path, torn=True):  # a run that was killed leaves a torn last line
        if isinstance(found, dict):
            yield found


def evidence_of(place: Path, records: Sequence[RunRecord]) -> Mapping[str, Evidence]:
    """Find the evidence of records, by key: in the store that `place` is or that its run file belongs to."""
    root = place.parent.parent if place.is_file() else place
    found: dict[str, Evidence] = {}
    for record in records:
        cell = root / "cells" / record.key[:24]
        samples = cell / "samples.jsonl"
        training = None
        try:
            folders = json.loads((cell / "job.json").read_text(encoding="utf-8"))["stage_folders"]
        except (OSError, ValueError, KeyError):
            folders = []
        for folder in folders:
            own = root / "students" / Path(folder).name / "training.jsonl"
            training = own if own.exists() else training
        found[record.key] = Evidence(samples if samples.exists() else None, training)
    return found
