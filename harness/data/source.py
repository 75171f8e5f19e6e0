"""Where tasks find their items: the files of a folder, parsed once and checked, else the Hub."""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from harness.contract import Example
from harness.errors import HarnessError
from harness.files.digests import digest_of
from harness.files.lines import split_lines
from harness.files.untrusted import LINE_LIMITS, Unreadable, parse_json, read_text_file
from harness.renames.modules import by_old_name

Row = dict[str, Any]
# a line of a manifest's `| file | rows |` table
_MANIFEST_ROW = re.compile(r"\|\s*([\w./-]+)\s*\|\s*([\d,]{1,15})\b")


# free text of a data folder, for calibration where tasks have no train split
C4 = "c4_demo/c4_demo.jsonl.gz"


class NoSplit(HarnessError):
    """A task has no such split, or none that may be trained on."""


def _show_plain(tokenizer: Any, prompt: str) -> str:
    return prompt


def _render_plain(example: Example) -> Example:
    return example


@dataclass(frozen=True, kw_only=True)
class LocalOrHubData:
    """Where real benchmarks are read from: a local folder, else the Hub. Generated tasks need
    neither.

    Files are named relative to the folder; `x.jsonl` and `x.jsonl.gz` are the same file in either
    form.
    """

    folder: Path | None = None
    # what the student is shown, e.g. by its chat template
    render: Callable[[Example], Example] = field(default=_render_plain, compare=False)
    # (tokenizer, plain prompt) -> what a model with it is shown
    show: Callable[[Any, str], str] = field(default=_show_plain, compare=False)

    @classmethod
    def from_environment(cls, folder: str | None = None) -> "LocalOrHubData":
        """Use `--data-dir`, else `$HARNESS_DATA_DIR`, else no folder."""
        given = folder or os.environ.get("HARNESS_DATA_DIR")
        if given and not Path(given).is_dir():
            raise HarnessError(
                f"no data folder at {given}; give --data-dir a folder that holds gsm8k/ and mmlu/"
            )
        return cls(folder=Path(given) if given else None)

    def file(self, relative: str, *, wanted: Sequence[str] = ()) -> Path:
        """Return the path of a file in plain or packed form; `wanted` are the files that an error
        asks for.
        """
        asked = " and ".join(wanted or (relative,))
        if self.folder is None:
            raise HarnessError(
                f"no data folder to read {relative} from; give --data-dir a folder with {asked}"
            )
        plain = relative.removesuffix(".gz")
        for name in (plain, f"{plain}.gz"):
            if (self.folder / name).is_file():
                return self.folder / name
        raise HarnessError(
            f"the data folder {self.folder} holds neither {plain} nor {plain}.gz; give --data-dir "
            f"a folder with {asked}"
        )

    def rows(
        self,
        relative: str,
        *,
        fields: Sequence[str],
        expected: int | None = None,
        check: Callable[[Row], str | None] | None = None,
        wanted: Sequence[str] = (),
    ) -> list[Row]:
        """Read the rows of a JSON-lines file, parsed once per process.

        `expected` is the published number of rows, told in errors; a smaller set of one's own is
        accepted unless the folder's MANIFEST.md lists more rows. `check` returns what is wrong with
        a row, or None. Raises `HarnessError` for a missing, cut, empty or malformed file, with the
        line.
        """
        path = self.file(relative, wanted=wanted)
        parsed, whole = _parsed_rows(path, *_file_stamp(path))
        self._check_count(path, relative, len(parsed), whole=whole, expected=expected, unit="rows")
        for number, row in parsed:
            missing = [name for name in fields if name not in row]
            if missing:
                raise HarnessError(
                    f"{path}, line {number}: no field {missing[0]!r}; every line is an object with "
                    f"{', '.join(fields)}"
                )
            problem = check(row) if check else None
            if problem:
                raise HarnessError(f"{path}, line {number}: {problem}")
        return [row for _, row in parsed]

    def text(
        self, relative: str, *, expected: int | None = None, wanted: Sequence[str] = ()
    ) -> str:
        """Read a whole text file, `expected` lines long as published, with plain newlines; the same
        errors as `rows`.
        """
        path = self.file(relative, wanted=wanted)
        data, whole = _unpacked(path)
        found = _decode(path, data).replace("\r\n", "\n")
        self._check_count(
            path, relative, found.count("\n"), whole=whole, expected=expected, unit="lines"
        )
        return found

    def fingerprint(self, files: Iterable[str]) -> str:
        """Return the sha256 over names and unpacked bytes of files, the same for plain and packed
        ones; "" without a folder.
        """
        if self.folder is None:
            return ""
        parts = [
            (name.removesuffix(".gz"), _bytes_digest(path, *_file_stamp(path)))
            for name in sorted(files)
            for path in [self.file(name)]
        ]
        return digest_of(parts)

    def _check_count(
        self, path: Path, relative: str, found: int, *, whole: bool, expected: int | None, unit: str
    ) -> None:
        listed = _manifest_rows(path.parents[relative.count("/")]).get(relative.removesuffix(".gz"))
        told = listed if listed is not None else expected
        wished = f"{told:,} expected" if told is not None else "at least one expected"
        if not whole:
            raise HarnessError(
                f"{path} is cut short or damaged: {found:,} {unit} found and {wished}; copy the "
                "file again"
            )
        if found == 0 or (listed is not None and found < listed):
            by = "by MANIFEST.md beside it" if listed is not None else "in it"
            raise HarnessError(
                f"{path}: {found:,} {unit} found and {wished} {by}; copy the file again, or "
                "correct the manifest"
            )


def numbered_rows(path: Path) -> list[tuple[int, Row]]:
    """Return (line number, row) of every line of a JSON-lines file that is not blank.

    Raises `HarnessError` for a missing, cut, empty or malformed file, with the line.
    """
    if not path.is_file():
        raise HarnessError(f"there is no file {path}; give a file of JSON lines")
    rows, complete = _parsed_rows(path, *_file_stamp(path))
    if not complete:
        raise HarnessError(f"{path} is cut short or damaged; copy the file again")
    if not rows:
        raise HarnessError(f"{path} holds no line; every line is a JSON object")
    return rows


def _file_stamp(path: Path) -> tuple[int, int]:
    """Return what changes when a file does: it keys the caches of this module."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _unpacked(path: Path) -> tuple[bytes, bool]:
    """Return a file's bytes, unpacked where its name ends in .gz, and whether they are all
    there.
    """
    rest = path.read_bytes()
    if path.suffix != ".gz":
        return rest, True
    parts: list[bytes] = []
    while rest:
        # by hand, and not by `gzip`: it tells how far a cut file reaches
        member = zlib.decompressobj(wbits=31)
        try:
            parts.append(member.decompress(rest))
        except zlib.error:
            return b"".join(parts), False
        if not member.eof:
            return b"".join(parts), False
        rest = member.unused_data
    return b"".join(parts), bool(parts)


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as problem:
        line = data.count(b"\n", 0, problem.start) + 1
        raise HarnessError(
            f"{path}, line {line}: not UTF-8 ({problem.reason}); save the file as UTF-8"
        ) from problem


@lru_cache(maxsize=16)
def _parsed_rows(path: Path, size: int, changed: int) -> tuple[list[tuple[int, Row]], bool]:
    """Return `(line number, row)` of every line that is not blank, and whether the file was
    whole.
    """
    data, whole = _unpacked(path)
    if not whole:
        data = data[: data.rfind(b"\n") + 1]
    return [
        (number, _parse_row(path, number, line))
        for number, line in enumerate(_decode(path, data).split("\n"), 1)
        if line.strip()
    ], whole


def _parse_row(path: Path, number: int, line: str) -> Row:
    try:
        row = parse_json(line, f"{path}, line {number}", LINE_LIMITS, what="line")
    except Unreadable as problem:
        cause = problem.__cause__
        if not isinstance(cause, json.JSONDecodeError):
            raise
        raise HarnessError(
            f"{path}, line {number}: no JSON ({cause.msg} at column {cause.colno}); correct or "
            "remove it"
        ) from problem
    if not isinstance(row, dict):
        raise HarnessError(
            f"{path}, line {number}: {line.strip()[:40]!r} is no JSON object; every line is one, "
            "in braces"
        )
    return row


@lru_cache(maxsize=64)
def _bytes_digest(path: Path, size: int, changed: int) -> str:
    data, whole = _unpacked(path)
    if not whole:
        raise HarnessError(f"{path} is cut short or damaged; copy the file again")
    return hashlib.sha256(data).hexdigest()


def _manifest_rows(folder: Path) -> dict[str, int]:
    """Return rows by file, named without .gz, as the folder's MANIFEST.md lists them; empty without
    one.
    """
    path = folder / "MANIFEST.md"
    if not path.is_file():
        return {}
    found = (_MANIFEST_ROW.match(line) for line in split_lines(read_text_file(path)))
    return {
        line[1].removesuffix(".gz"): int(line[2].replace(",", ""))
        for line in found
        if line and line[2].strip(",")
    }


__getattr__ = by_old_name(__name__)
