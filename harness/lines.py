r"""JSON lines, read and written in one way: a line ends at `\n` alone, whatever other line breaks stand inside its texts. No torch.

`str.splitlines` also cuts at U+0085, U+2028, U+2029 and form feeds, which JSON leaves unescaped inside a string.
"""

import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def lines_of(text: str) -> list[str]:
    r"""Split at `\n` alone; a text that ends in one has no empty last line."""
    parts = text.split("\n")
    return parts[:-1] if parts[-1] == "" else parts


def json_lines(path: Path, *, torn: bool = False) -> Iterator[Any]:
    """Yield the value of every line that is not blank; a name that ends in .gz is unpacked.

    Raises `ValueError` for a line that is no JSON; with `torn` such lines are left out: what a killed process leaves behind.
    """
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
        for line in stream:  # bytes: lines end at `\n`
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except ValueError:
                if not torn:
                    raise


def json_line(value: object) -> str:
    r"""Return a value as one line with its `\n`; half of a surrogate pair, which no UTF-8 takes, is escaped."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value)
    return text + "\n"


def write_json_lines(path: Path, values: Iterable[object]) -> None:
    """Write a value a line."""
    path.write_text("".join(map(json_line, values)), encoding="utf-8", newline="\n")
