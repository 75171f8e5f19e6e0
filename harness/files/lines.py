r"""JSON lines, read and written in one way: a line ends at `\n` alone. No torch.

`str.splitlines` also cuts at U+0085, U+2028, U+2029 and form feeds, which JSON leaves unescaped
inside a string.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from harness.errors import in_one_line
from harness.files.untrusted import LINE_LIMITS, Unreadable, parse_json_line
from harness.files.writing import write_atomically

_DIGITS = 16  # of a line's digest: it finds damage and edits, and stops nobody who computes one


def split_lines(text: str) -> list[str]:
    r"""Split at `\n` alone; a text that ends in one has no empty last line."""
    parts = text.split("\n")
    return parts[:-1] if parts[-1] == "" else parts


def read_json_lines(path: Path, *, skip_torn: bool = False) -> Iterator[Any]:
    """Yield the value of every line that is not blank; a name that ends in .gz is unpacked.

    Raises `Unreadable`, a `ValueError`, for a line that is no JSON. With `skip_torn` such lines
    are skipped: a killed process leaves them.
    """
    for number, line in enumerate(_raw_lines(path, skip_torn=skip_torn), 1):
        if line.strip():
            try:
                yield parse_json_line(line, f"{path}, line {number}")
            except Unreadable:
                if not skip_torn:
                    raise


def _raw_lines(path: Path, *, skip_torn: bool) -> Iterator[bytes]:
    r"""Yield the lines of a file, which end at `\n`.

    A line that is longer than any of ours ends the reading before it fills the memory.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            while line := stream.readline(LINE_LIMITS.bytes + 1):
                if len(line) > LINE_LIMITS.bytes:
                    raise Unreadable(f"{path}: a line of more than {LINE_LIMITS.bytes:,} bytes")
                yield line
    except (EOFError, OSError, zlib.error, Unreadable) as problem:
        if not skip_torn:
            raise Unreadable(f"{path}: {in_one_line(problem)}") from problem


def json_line(value: object) -> str:
    r"""Return a value as one line with its `\n`.

    Half of a surrogate pair, which UTF-8 cannot hold, is escaped.
    """
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value)
    return text + "\n"


def write_json_lines(path: Path, values: Iterable[object]) -> None:
    """Write one value per line, the file whole or not at all."""
    write_atomically(path, "".join(map(json_line, values)))


def signed_line(value: object) -> str:
    r"""Return a list or an object as one line that carries its own digest.

    A list has it as its last value, an object as `digest`.
    """
    if isinstance(value, list):
        return json_line([*value, _digest(value)])
    assert isinstance(value, dict), "a signed line is a list or an object"
    return json_line({**value, "digest": _digest(value)})


def verify_line(line: Any) -> Any:
    """Return the value that `signed_line` wrote, without its digest.

    Raises `ValueError` for a line that has no digest, or one that does not match.
    """
    if isinstance(line, dict):
        value: Any = {name: field for name, field in line.items() if name != "digest"}
        stated = line.get("digest")
    else:
        value, stated = (line[:-1], line[-1]) if isinstance(line, list) and line else (line, None)
    if not isinstance(stated, str) or len(stated) != _DIGITS:
        raise ValueError("it carries no digest")
    if stated != _digest(value):
        raise ValueError("its digest does not match")
    return value


class SignedLines(NamedTuple):
    """What a file of signed lines holds."""

    values: list[Any]  # of the lines whose digests match, in order
    problems: list[str]  # one for each line that is not whole


def read_signed_lines(path: Path, *, complete: bool = False) -> SignedLines:
    """Return the values of a file of signed lines, and what is wrong with the others.

    A torn last line, as a kill leaves it, is no problem, but in a file that is written at once
    (`complete`). A file that does not exist has no lines.
    """
    values: list[Any] = []
    problems: list[str] = []
    data = path.read_bytes() if path.exists() else b""
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                values.append(verify_line(parse_json_line(line, "it")))
            except ValueError as problem:
                problems += [f"line {number}: {problem}"] if complete or number < len(lines) else []
    return SignedLines(values, problems)


def _digest(value: object) -> str:
    return hashlib.sha256(json_line(value).encode()).hexdigest()[:_DIGITS]
