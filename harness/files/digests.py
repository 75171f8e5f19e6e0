"""Content digests: of a file's bytes, and of values."""

import hashlib
import json
from pathlib import Path


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_of(*parts: object) -> str:
    """Return a sha256 over JSON-serialisable parts, independent of dictionary order."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
