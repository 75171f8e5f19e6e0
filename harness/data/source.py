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
from typing import Any, NamedTuple

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
    """Where real benchmarks are read from: a local folder, else the Hub.

    Files are named relative to the folder; `x.jsonl` and `x.jsonl.gz` are one file in two forms.
    Generated tasks need neither.
    """

    folder: Path | None = None
    # what the student is shown, e.g. by its chat template
    render: Callable[[Example], Example] = field(default=_render_plain, compare=False)
    # (tokenizer, plain prompt) -> what a model with it is shown
    show: Callable[[Any, str], str] = field(default=_show_plain, compare=False)

    @classmethod
    def from_environment(cls, folder: str | None = None) -> "LocalOrHubData":
        """Return the source whose folder is `--data-dir`, else `$HARNESS_DATA_DIR`, else none."""
        data_dir = folder or os.environ.get("HARNESS_DATA_DIR")
        if data_dir and not Path(data_dir).is_dir():
            raise HarnessError(
                f"no data folder at {data_dir}; give --data-dir a folder that holds gsm8k/ and "
                "mmlu/"
            )
        return cls(folder=Path(data_dir) if data_dir else None)

    def file(self, relative: str, *, wanted: Sequence[str] = ()) -> Path:
        """Return the path of a file, plain or packed; an error asks for the `wanted` files."""
        needed = " and ".join(wanted or (relative,))
        if self.folder is None:
            raise HarnessError(
                f"no data folder to read {relative} from; give --data-dir a folder with {needed}"
            )
        plain = relative.removesuffix(".gz")
        for name in (plain, f"{plain}.gz"):
            if (self.folder / name).is_file():
                return self.folder / name
        raise HarnessError(
            f"the data folder {self.folder} holds neither {plain} nor {plain}.gz; give --data-dir "
            f"a folder with {needed}"
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
        """Return the rows of a JSON-lines file, parsed once per process.

        Every row must have the `fields`. `expected`, the published number of rows, is only named in
        errors: a smaller file of the user's own is accepted, unless the folder's MANIFEST.md lists
        more rows. `check` returns what is wrong with a row, or None. `wanted` are the files that
        the error for a missing file asks for. Raises `HarnessError` for a missing, cut, empty or
        malformed file, with the line of a malformed row.
        """
        path = self.file(relative, wanted=wanted)
        lines, is_complete = _parsed_rows(path, *_file_stamp(path))
        self._check_count(
            path,
            relative,
            len(lines),
            is_complete=is_complete,
            expected=expected,
            unit="rows",
        )
        for number, row in lines:
            missing = [name for name in fields if name not in row]
            if missing:
                raise HarnessError(
                    f"{path}, line {number}: no field {missing[0]!r}; every line is an object with "
                    f"{', '.join(fields)}"
                )
            problem = check(row) if check else None
            if problem:
                raise HarnessError(f"{path}, line {number}: {problem}")
        return [row for _, row in lines]

    def text(
        self, relative: str, *, expected: int | None = None, wanted: Sequence[str] = ()
    ) -> str:
        """Return a text file with plain newlines, `expected` lines long as published.

        Raises the same errors as `rows`.
        """
        path = self.file(relative, wanted=wanted)
        data, is_complete = _unpacked(path)
        text = _decode(path, data).replace("\r\n", "\n")
        self._check_count(
            path,
            relative,
            text.count("\n"),
            is_complete=is_complete,
            expected=expected,
            unit="lines",
        )
        return text

    def fingerprint(self, files: Iterable[str]) -> str:
        """Return the sha256 over names and unpacked bytes of files, "" without a folder."""
        if self.folder is None:
            return ""
        parts = [
            (name.removesuffix(".gz"), _bytes_digest(path, *_file_stamp(path)))
            for name in sorted(files)
            for path in [self.file(name)]
        ]
        return digest_of(parts)

    def _check_count(
        self,
        path: Path,
        relative: str,
        count: int,
        *,
        is_complete: bool,
        expected: int | None,
        unit: str,
    ) -> None:
        """Refuse a file that is cut, empty, or shorter than the folder's manifest says."""
        listed = manifest_rows(path.parents[relative.count("/")]).get(relative.removesuffix(".gz"))
        stated = listed if listed is not None else expected
        expectation = f"{stated:,} expected" if stated is not None else "at least one expected"
        if not is_complete:
            raise HarnessError(
                f"{path} is cut short or damaged: {count:,} {unit} found and {expectation}; copy "
                "the file again"
            )
        if count == 0 or (listed is not None and count < listed):
            by, advice = (
                (" by the data folder's MANIFEST.md", ", or correct the manifest")
                if listed is not None
                else ("", "")
            )
            raise HarnessError(
                f"{path}: {count:,} {unit} found and {expectation}{by}; copy the file again{advice}"
            )


def numbered_rows(path: Path) -> list[tuple[int, Row]]:
    """Return (line number, row) of every line of a JSON-lines file that is not blank.

    Raises `HarnessError` for a missing, cut, empty or malformed file, with the line of a malformed
    row.
    """
    if not path.is_file():
        raise HarnessError(f"there is no file {path}; give a file of JSON lines")
    rows, is_complete = _parsed_rows(path, *_file_stamp(path))
    if not is_complete:
        raise HarnessError(f"{path} is cut short or damaged; copy the file again")
    if not rows:
        raise HarnessError(f"{path} holds no line; every line is a JSON object")
    return rows


class _FileStamp(NamedTuple):
    size: int
    changed_ns: int


def _file_stamp(path: Path) -> _FileStamp:
    """Return a file's size and time of change, which are keys of this module's caches."""
    status = path.stat()
    return _FileStamp(status.st_size, status.st_mtime_ns)


def _unpacked(path: Path) -> tuple[bytes, bool]:
    """Return a file's bytes, unpacked if its name ends in .gz, and whether they are complete."""
    packed = path.read_bytes()
    if path.suffix != ".gz":
        return packed, True
    parts: list[bytes] = []
    while packed:
        # by hand, and not by `gzip`: it tells how far a cut file reaches
        member = zlib.decompressobj(wbits=31)
        try:
            parts.append(member.decompress(packed))
        except zlib.error:
            return b"".join(parts), False
        if not member.eof:
            return b"".join(parts), False
        packed = member.unused_data
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
    """Return the line number and row of every line that is not blank."""
    data, is_complete = _unpacked(path)
    if not is_complete:
        data = data[: data.rfind(b"\n") + 1]
    return [
        (number, _parse_row(path, number, line))
        for number, line in enumerate(_decode(path, data).split("\n"), 1)
        if line.strip()
    ], is_complete


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
    data, is_complete = _unpacked(path)
    if not is_complete:
        raise HarnessError(f"{path} is cut short or damaged; copy the file again")
    return hashlib.sha256(data).hexdigest()


def manifest_rows(folder: Path) -> dict[str, int]:
    """Return how many rows the folder's MANIFEST.md lists for each file, named without .gz."""
    path = folder / "MANIFEST.md"
    if not path.is_file():
        return {}
    matches = (_MANIFEST_ROW.match(match) for match in split_lines(read_text_file(path)))
    return {
        match[1].removesuffix(".gz"): int(match[2].replace(",", ""))
        for match in matches
        if match and match[2].strip(",")
    }


__getattr__ = by_old_name(__name__)
