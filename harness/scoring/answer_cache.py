"""The cache of answers: one line per answer, appended at once, so that a killed scoring can resume.

A cache file belongs to one model, dtype, device and scoring path, by content
(`harness/scoring/score.py` names the file). The key of a line is the digest of the request, token
by token. Every line carries its own digest. A line that is cut off, edited, or from a version
without digests is dropped and reported, and its answer is computed again.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from harness.files.lines import read_signed_lines, signed_line
from harness.files.writing import write_atomically


def request_key(ids: Sequence[int], *settings: object) -> str:
    """Return the key of one request: a digest of its exact tokens and its settings."""
    return hashlib.sha256(
        json.dumps([list(ids), *settings], ensure_ascii=False).encode()
    ).hexdigest()[:32]


def _defect_of(entry: object) -> str:
    """Say why a value is not an entry (key, answer, seconds) of a cache; "" where it is one."""
    is_entry = (
        isinstance(entry, list)
        and len(entry) == 3
        and isinstance(entry[0], str)
        and isinstance(entry[1], list)
    )
    return "" if is_entry and type(entry[2]) in (int, float) else "a line of another shape"  # type: ignore[index]


class AnswerCache:
    """A file of answers by key. Without a path, answers are kept in this process only."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.hits = 0  # answers that came from the file
        self._entries: dict[str, tuple[list[object], float]] = {}
        self._computed_keys: set[str] = set()  # of answers computed in this process
        self.dropped: list[str] = []  # the defect of each line that was dropped
        if path is not None:
            # read_signed_lines skips the last line silently where a killed process cut it
            entries, self.dropped = read_signed_lines(path)
            for entry in entries:
                if (defect := _defect_of(entry)) == "":
                    self._entries[entry[0]] = (entry[1], entry[2])
                else:
                    self.dropped.append(defect)
            if self.dropped:
                self._rewrite(path)

    def _rewrite(self, path: Path) -> None:
        """Write the file again without the dropped lines.

        An answer that another process adds meanwhile may be lost; it is then computed again.
        """
        with suppress(OSError):  # a file that cannot be written keeps its bad lines
            write_atomically(
                path,
                "".join(
                    signed_line([key, answer, seconds])
                    for key, (answer, seconds) in self._entries.items()
                ),
            )

    def damage(self) -> str:
        """Return one line about the entries that were dropped; "" where none was."""
        if not self.dropped:
            return ""
        return (
            f"{len(self.dropped)} cached answers are damaged and were dropped "
            f"({self.dropped[0]}); they are computed again"
        )

    def get(self, key: str) -> tuple[list[object], float] | None:
        """Return (answer, seconds it took to compute); None where the key is unknown."""
        entry = self._entries.get(key)
        if entry is not None and key not in self._computed_keys:
            self.hits += 1
        return entry

    def put(self, key: str, answer: list[object], seconds: float) -> None:
        """Store an answer and the seconds it took, and append them to the file."""
        self._entries[key] = (answer, seconds)
        self._computed_keys.add(key)
        if self.path is None:
            return
        if not self.path.parent.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
        is_cut = self.path.exists() and self.path.stat().st_size and not self._ends_with_newline()
        line = ("\n" if is_cut else "") + signed_line([key, answer, round(seconds, 6)])
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            # one write call, because two processes may append to the same file
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def _ends_with_newline(self) -> bool:
        assert self.path is not None
        with self.path.open("rb") as stream:
            stream.seek(-1, os.SEEK_END)
            return stream.read(1) == b"\n"
