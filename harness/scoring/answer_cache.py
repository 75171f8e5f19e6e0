"""Answers that were computed once: one line each, appended as they come, so that a killed scoring
goes on where it was.

A journal belongs to one model, dtype, device and scoring path, by content
(`harness/scoring/score.py` names its file); a line's key is the digest of what was asked, token by
token. Every line carries its own digest: one that is cut off, edited, or of a version without
digests is dropped, said, and its question asked again.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from harness.files.lines import read_signed_lines, signed_line
from harness.files.writing import write_atomically


def asked(ids: Sequence[int], *settings: object) -> str:
    """Return the key of one request: its exact tokens and how it is to be answered."""
    return hashlib.sha256(
        json.dumps([list(ids), *settings], ensure_ascii=False).encode()
    ).hexdigest()[:32]


def _no_answer(found: object) -> str:
    """Say why a value is no line of a journal, "" where it is one."""
    good = (
        isinstance(found, list)
        and len(found) == 3
        and isinstance(found[0], str)
        and isinstance(found[1], list)
    )
    return "" if good and type(found[2]) in (int, float) else "a line of another shape"  # type: ignore[index]


class Journal:
    """A file of answers by key. Without a path it remembers nothing beyond the process."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.read = 0  # answers served from the file
        self._held: dict[str, tuple[list[object], float]] = {}
        self._fresh: set[str] = set()
        self.dropped: list[str] = []  # what is wrong with lines that are not believed
        if path is not None:
            # the torn last line of a killed process is left out without a word
            values, self.dropped = read_signed_lines(path)
            for found in values:
                if (wrong := _no_answer(found)) == "":
                    self._held[found[0]] = (found[1], found[2])
                else:
                    self.dropped.append(wrong)
            if self.dropped:
                self._mend(path)

    def _mend(self, path: Path) -> None:
        """Write the file anew without what is not believed; answers that another process adds
        meanwhile are asked again at worst.
        """
        with suppress(OSError):  # a cache that cannot be written to keeps its bad lines
            write_atomically(
                path,
                "".join(
                    signed_line([key, answer, seconds])
                    for key, (answer, seconds) in self._held.items()
                ),
            )

    def damage(self) -> str:
        """Say in one line which lines were dropped; "" where none was."""
        if not self.dropped:
            return ""
        return (
            f"{len(self.dropped)} kept answers are not as they were written ({self.dropped[0]}); "
            "they are asked again"
        )

    def get(self, key: str) -> tuple[list[object], float] | None:
        """Return (answer, the seconds that it took), None for a question not asked before."""
        found = self._held.get(key)
        if found is not None and key not in self._fresh:
            self.read += 1
        return found

    def put(self, key: str, answer: list[object], seconds: float) -> None:
        """Keep an answer and the seconds that it took."""
        self._held[key] = (answer, seconds)
        self._fresh.add(key)
        if self.path is None:
            return
        if not self.path.parent.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.exists() and self.path.stat().st_size and not self._ends_whole()
        line = ("\n" if torn else "") + signed_line([key, answer, round(seconds, 6)])
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            # one write: two processes may append to one journal
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def _ends_whole(self) -> bool:
        assert self.path is not None
        with self.path.open("rb") as stream:
            stream.seek(-1, os.SEEK_END)
            return stream.read(1) == b"\n"
