"""Answers that were computed once: one line each, appended as they come, so that a killed scoring goes on where it was.

A journal belongs to one model, dtype, device and scoring path, by content (`harness/score.py` names its file); a line's
key is the digest of what was asked, token by token. A line cut off by a kill is dropped.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from harness.lines import json_line, json_lines


def asked(ids: Sequence[int], *settings: object) -> str:
    """Return the key of one request: its exact tokens and how it is to be answered."""
    return hashlib.sha256(json.dumps([list(ids), *settings], ensure_ascii=False).encode()).hexdigest()[:32]


class Journal:
    """A file of answers by key. Without a path it remembers nothing beyond the process."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.read = 0  # answers served from the file
        self._held: dict[str, tuple[list[object], float]] = {}
        self._fresh: set[str] = set()
        if path is not None and path.exists():
            for found in json_lines(path, torn=True):  # the last line of a killed process is left out
                if isinstance(found, list) and len(found) == 3:
                    self._held[str(found[0])] = (found[1], found[2])

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
        line = ("\n" if torn else "") + json_line([key, answer, round(seconds, 6)])
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())  # one write: two processes may append to one journal
        finally:
            os.close(descriptor)

    def _ends_whole(self) -> bool:
        assert self.path is not None
        with self.path.open("rb") as stream:
            stream.seek(-1, os.SEEK_END)
            return stream.read(1) == b"\n"
