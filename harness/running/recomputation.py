"""Says what a run makes anew and why: by the parts of the keys that a store keeps beside its cells
and students. No torch.

A cell whose key is not in the store may stand there under another key: the same row of the same run
as it was asked, made when some part of the key was another one. Those parts are named, once for all
cells that share them.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.files.untrusted import Unreadable, read_object
from harness.files.writing import read_signed, write_signed
from harness.planning.cells import Plan, PlannedCell
from harness.records.store import Store
from harness.renames.labels import settings_in_records

PARTS_FILE = "parts.json"  # in the folder of a cell, and of a student
_IDENTITY_PATTERN = re.compile(r'"identity": "([0-9a-f]{24})"')
_MAX_FILES_NAMED = 6  # files of code that a line names
_OLDER_VERSION = (
    "made by an older version of the harness, whose keys did not hold the code behind tasks, "
    "scores and helper modules, "
    "nor lm-eval's version"
)
_IN_WORDS = {
    "teachers": "the teacher's weights changed",
    "base": "the student's base changed",
    "data": "the data files changed",
    "text": "the calibration text changed",
    "definitions": "lm-eval's task files changed",
}
# a parent says itself what changed; the others are asked for
_LEFT_OUT = frozenset({"parent", "rows", "recipe"})


@dataclass
class KeyChanges:
    """Why a cell is made anew: the files of code that changed, and other parts in words."""

    code: set[str] = field(default_factory=set)
    others: dict[str, None] = field(default_factory=dict)
    students: bool = False  # they are made anew too

    def __str__(self) -> str:
        named = sorted(self.code)
        more = f" and {len(named) - _MAX_FILES_NAMED} more" if len(named) > _MAX_FILES_NAMED else ""
        code = (
            [f"code changed since ({', '.join(named[:_MAX_FILES_NAMED])}{more})"] if named else []
        )
        return "; ".join([*code, *self.others]) or "a part of its key changed"

    @property
    def count(self) -> int:
        """How many parts are other ones: the nearest sibling has the fewest."""
        return len(self.code) + len(self.others)


def save_key_parts(plan: Plan, cell: PlannedCell, store: Store) -> None:
    """Write beside a cell and its students what their keys are made of, where it does not stand
    there, or is not as it was written.
    """
    folders = {
        cell.key: store.cell(cell.key),
        **{stage.key: store.student(stage.key) for stage in cell.stages},
    }
    for key, folder in folders.items():
        if key in plan.parts and not _read_parts(folder):
            write_signed(folder / PARTS_FILE, plan.parts[key])


def recomputation_lines(plan: Plan, store: Store) -> list[str]:
    """Return a line for each reason why cells of a plan are computed though the store holds them
    under other keys.
    """
    missing = [cell for cell in plan.cells if not store.record_path(cell.key).exists()]
    identities = {
        str(plan.parts[cell.key]["identity"]): cell for cell in missing if cell.key in plan.parts
    }
    if not identities or not (store.root / "cells").is_dir():
        return []
    siblings, unnamed = _finished_cells(store, set(identities))
    older = {_request_in(folder) for folder in unnamed}
    told: dict[str, list[PlannedCell]] = {}
    for identity, cell in identities.items():
        if identity in siblings:
            nearest = min(
                (_key_changes(old, plan, cell, store) for old in siblings[identity]),
                key=lambda one: one.count,
            )
            told.setdefault(f"{nearest}{_student_note(cell, nearest)}", []).append(cell)
        elif _request_of(plan, cell) in older:
            told.setdefault(_OLDER_VERSION, []).append(cell)
    return [
        f"{len(cells)} {'cells are' if len(cells) > 1 else 'cell is'} computed anew: {why}"
        for why, cells in told.items()
    ]


def _student_note(cell: PlannedCell, reasons: KeyChanges) -> str:
    return (
        ""
        if not cell.stages or reasons.students
        else "; what was trained or packed is kept, and scored again"
    )


def _finished_cells(
    store: Store, wanted: set[str]
) -> tuple[dict[str, list[dict[str, Any]]], list[Path]]:
    """Return the kept parts of finished cells by identity, and the cells that keep none; of others
    only the identity is read.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    unnamed = []
    for folder in (store.root / "cells").iterdir():
        if not (folder / "record.json").is_file():
            continue
        try:
            identity = _IDENTITY_PATTERN.search(
                (folder / PARTS_FILE).read_text(encoding="utf-8", errors="replace")
            )
        except FileNotFoundError:
            unnamed.append(folder)
            continue
        except OSError:
            continue
        if identity and identity[1] in wanted and (parts := _read_parts(folder)):
            found.setdefault(identity[1], []).append(parts)
    return found, unnamed


def _read_parts(folder: Path) -> dict[str, Any]:
    """Return what a folder keeps of its key, nothing where that is not as it was written."""
    try:
        told = read_signed(folder / PARTS_FILE)
    except Unreadable:
        return {}
    return (
        told
        if isinstance(told.get("held"), dict) and isinstance(told.get("students"), list)
        else {}
    )


def _key_changes(old: Mapping[str, Any], plan: Plan, cell: PlannedCell, store: Store) -> KeyChanges:
    """Compare the parts of a cell that is planned with those of one that was made, those of their
    students too.
    """
    new, reasons = plan.parts[cell.key], KeyChanges()
    _add_changes(old["held"], new["held"], reasons)
    for before, now in zip(old["students"], new["students"], strict=False):
        if before == now:
            continue
        reasons.students = True
        parts = _read_parts(store.student(str(before)))
        if parts and now in plan.parts:
            _add_changes(parts["held"], plan.parts[now]["held"], reasons)
    return reasons


def _add_changes(old: Mapping[str, Any], new: Mapping[str, Any], reasons: KeyChanges) -> None:
    old = (
        {**old, "settings": settings_in_records(str(old.get("method")), old.get("settings") or {})}
        if "settings" in new
        else old
    )
    for name in sorted({*old, *new} - _LEFT_OUT):
        before, now = _as_json(old.get(name)), _as_json(new.get(name))
        if before == now:
            continue
        if name == "code" and isinstance(before, dict) and isinstance(now, dict):
            reasons.code |= {file for file in {*before, *now} if before.get(file) != now.get(file)}
        else:
            reasons.others |= dict.fromkeys(_describe_change(name, before, now))


def _as_json(value: Any) -> Any:
    """Return a part as JSON gives it back."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(one) for key, one in value.items()}
    return [_as_json(one) for one in value] if isinstance(value, (list, tuple)) else value


def _describe_change(name: str, before: Any, now: Any) -> Iterator[str]:
    """Yield how a part that is another one is told."""
    if name == "data" and str(now).startswith("unknown beforehand"):
        yield "a task reads what only running it tells, so nothing of it is kept"
    elif name in _IN_WORDS:
        yield _IN_WORDS[name]
    elif isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                yield from _describe_change(f"{key}", before.get(key), now.get(key))
    elif isinstance(before, (dict, list)) or isinstance(now, (dict, list)):
        yield f"another {name}"
    else:
        yield f"{name} {_short_text(before)} -> {_short_text(now)}"


def _short_text(value: object) -> str:
    return "none" if value in (None, "") else str(value)[:60]


def _request_of(plan: Plan, cell: PlannedCell) -> str:
    """Return what tells one row of one run from another."""
    under = plan.conditions
    return repr(
        [cell.label, cell.seed, list(under.task_names), under.student_recipe, under.budget_tokens]
    )


def _request_in(folder: Path) -> str:
    """Return the same of a cell that keeps no parts, by what its process was told; "" where that
    cannot be read.
    """
    try:
        told = read_object(folder / "job.json")
    except Unreadable:
        return ""
    cell = told.get("cell")
    if not isinstance(cell, dict):
        return ""
    return repr(
        [
            cell.get("label"),
            cell.get("seed"),
            told.get("tasks"),
            told.get("student_recipe"),
            told.get("budget_tokens"),
        ]
    )
