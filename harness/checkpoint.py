"""Identity of a model on disk: content digest, weight bytes, and an atomic way to save one."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from harness.contract import Checkpoint

# What decides how a model answers; logs, scores and cards beside it do not.
_MODEL_FILES = re.compile(
    r".*\.(safetensors|model|jinja|py)|(config|generation_config|tokenizer\w*|special_tokens_map|added_tokens|vocab|chat_template"
    r"|model\.safetensors\.index)\.json|(merges|vocab)\.txt"
)


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_of(*parts: object) -> str:
    """Return a sha256 over JSON-serialisable parts, independent of dictionary order."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a model folder, in name order."""
    return sorted(folder.glob("*.safetensors"))


def weights_digest(folder: Path) -> str:
    """Return the content digest of a model folder's weights alone."""
    return digest_of([file_digest(path) for path in weight_files(folder)])


def folder_digest(folder: Path) -> str:
    """Return the content digest of a model folder: weights, configuration and tokenizer, by name and bytes."""
    files = (path for path in sorted(folder.iterdir()) if _MODEL_FILES.fullmatch(path.name))
    return digest_of([(path.name, file_digest(path)) for path in files])


def describe(folder: Path, *, name: str, parents: Iterable[str] = (), note: str = "") -> Checkpoint:
    """Return the `Checkpoint` of a saved model folder; the digest is computed from its bytes now."""
    return Checkpoint(
        path=folder,
        name=name,
        digest=folder_digest(folder),
        parents=tuple(parents),
        bytes_on_disk=sum(path.stat().st_size for path in weight_files(folder)),
        note=note,
    )


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.part")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def save_atomically(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a fresh folder beside `folder`, then move it into place whole."""
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    write(fresh)
    if folder.exists():
        shutil.rmtree(folder)
    fresh.replace(folder)
