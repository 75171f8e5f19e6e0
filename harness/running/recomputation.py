"""Says which cells a run computes again although the store holds them, and why. No torch.

Beside each cell and student the store keeps the parts of its key. A cell whose key is not in the
store may be there under another key: the same row of the same request, computed when some part of
the key was different. The parts that differ are named, once for all cells that share them.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.files.untrusted import Unreadable, read_object
from harness.files.writing import read_signed, write_signed
from harness.planning.cells import Plan, PlannedCell
from harness.planning.keys import identity_of
from harness.records.store import Store
from harness.renames.labels import current_label, settings_in_records

PARTS_FILE = "parts.json"  # in the folder of a cell, and of a student
_IDENTITY_PATTERN = re.compile(r'"identity": "([0-9a-f]{24})"')
_LABEL_PATTERN = re.compile(r'"label": "([^"\\]*)"')
_MAX_FILES_NAMED = 6  # files of code that a line names
_OLDER_VERSION = (
    "the store is of an older version of the harness, whose keys did not include the code of "
    "tasks, scores and helper modules, nor the version of lm-eval"
)
_IN_WORDS = {
    "teachers": "the teacher's weights changed",
    "base": "the student's base changed",
    "data": "the data files changed",
    "text": "the calibration text changed",
    "train data": "the data of --train-data changed",
    "calibration data": "the data of --calibration changed",
    "definitions": "lm-eval's task files changed",
}
# the parent stage names its own changes; the other two are part of the user's request
_LEFT_OUT = frozenset({"parent", "rows", "recipe"})


@dataclass
class KeyChanges:
    """How the key of a planned cell differs from the key of the same cell in the store."""

    code: set[str] = field(default_factory=set)  # files of code that changed
    others: dict[str, None] = field(default_factory=dict)  # other changes in words, in order
    students: bool = False  # its students are computed again too

    def __str__(self) -> str:
        files = sorted(self.code)
        hidden = len(files) - _MAX_FILES_NAMED
        more = f" and {hidden} more" if hidden > 0 else ""
        code = [f"code changed ({', '.join(files[:_MAX_FILES_NAMED])}{more})"] if files else []
        return "; ".join([*code, *self.others]) or "a part of its key changed"

    @property
    def count(self) -> int:
        """How many parts differ: the stored cell with the fewest differences is named."""
        return len(self.code) + len(self.others)


def save_key_parts(plan: Plan, cell: PlannedCell, store: Store) -> None:
    """Write the parts of their keys beside a cell and its students, unless they are there."""
    folders = {
        cell.key: store.cell(cell.key),
        **{stage.key: store.student(stage.key) for stage in cell.stages},
    }
    for key, folder in folders.items():
        if key in plan.parts and not _read_parts(folder):
            write_signed(folder / PARTS_FILE, plan.parts[key])


def recomputation_lines(plan: Plan, store: Store) -> list[str]:
    """Return one line for each reason why cells are computed again that the store already holds."""
    missing = [cell for cell in plan.cells if not store.record_path(cell.key).exists()]
    identities = {
        str(plan.parts[cell.key]["identity"]): cell for cell in missing if cell.key in plan.parts
    }
    if not identities or not (store.root / "cells").is_dir():
        return []
    stored, without_parts = _stored_cells(store, set(identities), plan.request)
    older = {_request_in(folder) for folder in without_parts}
    cells_by_reason: dict[str, list[PlannedCell]] = {}
    for identity, cell in identities.items():
        if identity in stored:
            candidates = (_key_changes(parts, plan, cell, store) for parts in stored[identity])
            nearest = min(candidates, key=lambda changes: changes.count)
            reason = f"{nearest}{_student_note(cell, nearest)}"
        elif _request_of(plan, cell) in older:
            reason = _OLDER_VERSION
        else:
            continue
        cells_by_reason.setdefault(reason, []).append(cell)
    return [
        f"{len(cells)} {'cells are' if len(cells) > 1 else 'cell is'} computed again: {reason}"
        for reason, cells in cells_by_reason.items()
    ]


def _student_note(cell: PlannedCell, changes: KeyChanges) -> str:
    if not cell.stages or changes.students:
        return ""
    return "; students are kept and scored again"


def _stored_cells(
    store: Store, identities: set[str], request: Mapping[str, object]
) -> tuple[dict[str, list[dict[str, Any]]], list[Path]]:
    """Return the key parts of finished cells by identity, and the folders that keep no parts.

    Of cells with another identity, only identity and label are read: a store may hold thousands.
    """
    stored: dict[str, list[dict[str, Any]]] = {}
    without_parts = []
    for folder in (store.root / "cells").iterdir():
        if not (folder / "record.json").is_file():
            continue
        try:
            text = (folder / PARTS_FILE).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            without_parts.append(folder)
            continue
        except OSError:
            continue
        match = _IDENTITY_PATTERN.search(text)
        if match is None:
            continue
        identity = match[1]
        if identity not in identities:
            identity = _identity_by_current_label(text, identity, folder, request)
        if identity in identities and (parts := _read_parts(folder)):
            stored.setdefault(identity, []).append(parts)
    return stored, without_parts


def _identity_by_current_label(
    text: str, identity: str, folder: Path, request: Mapping[str, object]
) -> str:
    """Return the identity that a stored cell has by the current names of its settings.

    An identity contains the row's label, and a label contains names of settings as they were when
    the cell was computed. "" for a cell whose label has no old name, or of another request.
    """
    match = _LABEL_PATTERN.search(text)
    if match is None or current_label(match[1]) == match[1]:
        return ""
    parts = _read_parts(folder)
    label, seed = str(parts.get("label")), parts.get("seed")
    if identity_of("cell", label, seed, request) != identity:
        return ""
    return identity_of("cell", current_label(label), seed, request)


def _read_parts(folder: Path) -> dict[str, Any]:
    """Return the parts of a folder's key; an empty dict if the file is missing or damaged."""
    try:
        parts = read_signed(folder / PARTS_FILE)
    except Unreadable:
        return {}
    valid = isinstance(parts.get("held"), dict) and isinstance(parts.get("students"), list)
    return parts if valid else {}


def _key_changes(
    old_parts: Mapping[str, Any], plan: Plan, cell: PlannedCell, store: Store
) -> KeyChanges:
    """Compare the key of a planned cell, and those of its students, with a stored cell's."""
    new_parts, changes = plan.parts[cell.key], KeyChanges()
    _add_changes(old_parts["held"], new_parts["held"], changes)
    for old_key, new_key in zip(old_parts["students"], new_parts["students"], strict=False):
        if old_key == new_key:
            continue
        changes.students = True
        student_parts = _read_parts(store.student(str(old_key)))
        if student_parts and new_key in plan.parts:
            _add_changes(student_parts["held"], plan.parts[new_key]["held"], changes)
    return changes


def _add_changes(old: Mapping[str, Any], new: Mapping[str, Any], changes: KeyChanges) -> None:
    """Add to `changes` what differs between the contents of two keys."""
    if "settings" in new:
        settings = settings_in_records(str(old.get("method")), old.get("settings") or {})
        old = {**old, "settings": settings}
    for name in sorted({*old, *new} - _LEFT_OUT):
        before, after = _as_json(old.get(name)), _as_json(new.get(name))
        if before == after:
            continue
        if name == "code" and isinstance(before, dict) and isinstance(after, dict):
            files = {*before, *after}
            changes.code |= {file for file in files if before.get(file) != after.get(file)}
        else:
            changes.others |= dict.fromkeys(_describe_change(name, before, after))


def _as_json(value: Any) -> Any:
    """Return a value as it is after writing it to JSON and reading it back."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, (list, tuple)) else value


def _describe_change(name: str, before: Any, after: Any) -> Iterator[str]:
    """Yield the words for a part that changed, one text for each entry of a dict."""
    if name == "data" and str(after).startswith("unknown beforehand"):
        yield "a task reads files that are known only when it runs, so its results are never reused"
    elif name in _IN_WORDS:
        yield _IN_WORDS[name]
    elif isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            if before.get(key) != after.get(key):
                yield from _describe_change(str(key), before.get(key), after.get(key))
    elif isinstance(before, (dict, list)) or isinstance(after, (dict, list)):
        yield f"{name} changed"
    else:
        yield f"{name} {_short_text(before)} -> {_short_text(after)}"


def _short_text(value: object) -> str:
    return "none" if value in (None, "") else str(value)[:60]


def _request_of(plan: Plan, cell: PlannedCell) -> str:
    """Return what tells the row of one run from that of another, as text to compare."""
    conditions = plan.conditions
    return repr(
        [
            cell.label,
            cell.seed,
            list(conditions.task_names),
            conditions.student_recipe,
            conditions.budget_tokens,
        ]
    )


def _request_in(folder: Path) -> str:
    """Return `_request_of` for a stored cell without parts, from its job; "" if unreadable."""
    try:
        job = read_object(folder / "job.json")
    except Unreadable:
        return ""
    cell = job.get("cell")
    if not isinstance(cell, dict) or not isinstance(cell.get("label"), str):
        return ""
    return repr(
        [
            current_label(cell["label"]),
            cell.get("seed"),
            job.get("tasks"),
            job.get("student_recipe"),
            job.get("budget_tokens"),
        ]
    )
