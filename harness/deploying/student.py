"""Exports a row's student: written in a form that others serve, opened again, and scored again."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from harness.contract import Progress
from harness.deploying.reopened import Reopened, reopen
from harness.deploying.rescoring import Rescoring, require_answers, score_export
from harness.deploying.row import StoredRow
from harness.deploying.written import GGUF_KINDS, STUDENT_FORMS, Written
from harness.errors import CellFailed, HarnessError, unknown
from harness.files.places import check_folder
from harness.files.problems import path_text
from harness.files.writing import save_atomically
from harness.models.cache_format import stored_cache_format
from harness.models.formats import library_problem

if TYPE_CHECKING:
    from harness.deploying.stored import StoredStudent

NOTES_FILE = "export.json"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How a student is exported and checked."""

    form: str  # one of `STUDENT_FORMS`
    dtype: str = "auto"  # of floats
    kind: str = "auto"  # of the tensors of a GGUF file
    check: int | Literal["all", "none"] = 50  # items that are scored again
    tolerance: float = 0.04  # the share of them that may be graded otherwise than in the record


def export_options(
    *,
    form: str = "safetensors",
    dtype: str = "auto",
    kind: str = "auto",
    check: int | str = 50,
    tolerance: float = 0.04,
) -> ExportOptions:
    """Return options as they were typed. Raises `HarnessError` for what is none."""
    if form not in STUDENT_FORMS:
        raise unknown("form", form, STUDENT_FORMS, hint="(in --form)")
    if dtype not in DTYPES:
        raise unknown("type", dtype, DTYPES, hint="(in --dtype)")
    if kind not in GGUF_KINDS:
        raise unknown("GGUF kind", kind, GGUF_KINDS, hint="(in --kind)")
    if form == "gguf" and dtype != "auto":
        raise HarnessError(f"--dtype {dtype}: the type of a GGUF file's tensors is named by --kind")
    if form != "gguf" and kind != "auto":
        raise HarnessError(f"--kind {kind}: kinds are of --form gguf; for {form} type --dtype")
    if not 0 <= tolerance <= 1:
        raise HarnessError(f"--tolerance {tolerance:g}: give a share of the items, from 0 to 1")
    items: int | Literal["all", "none"]
    if check in ("all", "none"):
        items = cast(Literal["all", "none"], check)
    elif str(check).isdecimal() and int(check) > 0:
        items = int(check)
    else:
        raise HarnessError(f"--check {check}: give a number of items, such as 50, or all, or none")
    return ExportOptions(form=form, dtype=dtype, kind=kind, check=items, tolerance=tolerance)


@dataclass(frozen=True)
class Export:
    """An exported student, and what its checks found; None for those that were not asked for."""

    path: Path  # what a server opens
    bytes: int  # of its weights
    notes: tuple[str, ...]
    reopened: Reopened | None
    rescored: Rescoring | None

    @property
    def passed(self) -> bool:
        """Tell whether every check passed."""
        return self.rescored is None or self.rescored.passed

    def lines(self) -> list[str]:
        """Return what was written and what the checks found, a line each."""
        lines = [f"written: {self.path} ({self.bytes:,} bytes of weights)"]
        lines += [f"- {note}" for note in self.notes]
        if self.reopened is not None:
            lines.append(_reopened_line(self.reopened))
        lines.append(str(self.rescored) if self.rescored else "not scored again (--check none)")
        return lines


def export_student(
    row: StoredRow,
    out: Path,
    options: ExportOptions,
    *,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Export:
    """Write a row's student into the new folder `out`, open it again and score it again.

    Raises `HarnessError` for what the form cannot express and what cannot be checked here, before
    anything is written; `CellFailed`, and leaves nothing, where the opened export does not hold the
    student's weights.
    """
    from harness.deploying.stored import StoredStudent

    folder = _student_folder(row)
    _refuse_filled(out)
    if options.check != "none" or options.form == "gguf":
        _require_library(options.form)
    if options.check != "none":
        require_answers(row)
    student = StoredStudent(folder, row.record.label)
    written: list[Written] = []
    save_atomically(out, lambda part: written.append(_write(student, part, options)))
    [form] = written
    path = out / form.path.name if form.path.suffix == ".gguf" else out
    reopened = None
    if options.check != "none":
        try:
            reopened = reopen(folder, path)
            refuse_other_weights(reopened, form)
        except CellFailed:
            shutil.rmtree(out)  # nobody shall serve what does not hold the student
            raise
    rescored = None
    if options.check != "none":
        rescored = score_export(
            row,
            path,
            items=None if options.check == "all" else options.check,
            tolerance=options.tolerance,
            progress=progress,
        )
    export = Export(path, _bytes_of(out), form.notes, reopened, rescored)
    _write_notes(out, row, options, export)
    return export


def _write(student: "StoredStudent", folder: Path, options: ExportOptions) -> Written:
    if options.form == "gguf":
        from harness.deploying.gguf_form import write_gguf

        return write_gguf(student, folder, kind=options.kind)
    if options.form == "compressed-tensors":
        from harness.deploying.compressed_form import write_compressed

        return write_compressed(student, folder, dtype=options.dtype)
    from harness.deploying.plain_form import write_plain

    return write_plain(student, folder, dtype=options.dtype)


def _student_folder(row: StoredRow) -> Path:
    """Return the folder of the row's model.

    Raises `HarnessError` where it is not here, or is no folder of a model of its own.
    """
    label, path = row.record.label, row.model
    if row.record.status != "success":
        raise HarnessError(f"{label} {row.record.status}: {row.record.reason}; it has no student")
    if path is None:
        raise HarnessError(
            f"{label}: its student is not here ({path_text(row.place)} keeps records alone); name "
            "the store of its run (results/runs)"
        )
    if path.is_file():
        raise HarnessError(f"{label} is the file {path} as it is served; copy that file")
    if not (path / "config.json").is_file():
        raise HarnessError(
            f"{label} is an adapter, {path}, and no model of its own; serve it beside its base "
            "(vllm serve BASE --enable-lora), or merge it with peft and name the folder"
        )
    if (cache := stored_cache_format(path)) is not None:
        raise HarnessError(
            f"{label} has a quantized cache ({cache.label}), which no exported form states; export "
            "the row without its kv stage, and choose the server's own type of cache there"
        )
    return path


def _refuse_filled(out: Path) -> None:
    """Raise `HarnessError` for a folder that holds something, or cannot be written."""
    check_folder(out, "--out")
    if out.is_dir() and any(out.iterdir()):
        raise HarnessError(f"--out {path_text(out)} holds files; give a new folder")


def _require_library(form: str) -> None:
    """Raise `HarnessError` where the library that an export needs is missing."""
    if form == "gguf" and find_spec("gguf") is None:
        raise HarnessError(
            "--form gguf needs the gguf package; type: pip install 'compression-harness[gguf]'"
        )
    if form == "compressed-tensors" and (problem := library_problem(form)):
        raise HarnessError(
            f"--form {form}: {problem}; without it the export is not opened again: type --check "
            "none for that"
        )


def refuse_other_weights(reopened: Reopened, form: Written) -> None:
    """Raise `CellFailed` where an opened export differs by more than writing it changed."""
    if reopened.missing:
        raise CellFailed(
            f"{form.path.name}: {reopened.missing[0]} is not in the opened export "
            f"({len(reopened.missing)} weights are missing)"
        )
    if not reopened.largest_change <= form.largest_change * (1 + 1e-3):  # nor where it is no number
        raise CellFailed(
            f"{form.path.name}: {reopened.where} differs by {100 * reopened.largest_change:.2g} % "
            f"in the opened export, where at most {100 * form.largest_change:.2g} % was announced"
        )


def _reopened_line(reopened: Reopened) -> str:
    """Say in a line how the opened export compares."""
    by = " and ".join(reopened.libraries)
    same = (
        f"all {reopened.weights:,} weights are equal"
        if not reopened.largest_change
        else f"of {reopened.weights:,} weights none is further than "
        f"{100 * reopened.largest_change:.2g} % off ({reopened.where})"
    )
    return f"opened again in a fresh process by {by}: {same}"


def _bytes_of(out: Path) -> int:
    weights = (*out.glob("*.safetensors"), *out.glob("*.gguf"))
    return sum(path.stat().st_size for path in weights)


def _write_notes(out: Path, row: StoredRow, options: ExportOptions, export: Export) -> None:
    """Write beside an export which row it is of and what the checks reopened."""
    record = row.record
    content = {
        "row": record.label,
        "seed": record.seed,
        "key": record.key,
        "student": record.student.digest if record.student else "",
        "form": options.form,
        "notes": export.notes,
        "reopened": export.reopened._asdict() if export.reopened else None,
        "rescored": asdict(export.rescored) if export.rescored else None,
        "passed": export.passed,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    (out / NOTES_FILE).write_text(text, encoding="utf-8")
