"""Finds a checkpoint that becomes a row as it is: a model, a GGUF file, or a LoRA adapter.

It differs from `resolve`, which finds teachers and starts of students: a GGUF file keeps every
number that it holds and weighs what the file weighs, llama.cpp may serve it packed, and an adapter
is laid on its base.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.contract import Checkpoint
from harness.errors import HarnessError
from harness.files.digests import digest_of, file_digest
from harness.files.writing import save_atomically
from harness.models.adapters import CONFIG, WEIGHTS, adapter_config, is_adapter
from harness.models.checkpoint import remembered_digest
from harness.models.language_model import one_line_open_errors, tokenizer_of
from harness.models.llama_cpp import PREFIX
from harness.models.resolve import (
    gguf_type,
    hub_snapshot,
    is_embedded,
    is_hub_id,
    resolve,
    unpack_gguf,
)


def resolve_outside(name: str, *, cache: Path, base: Checkpoint | None = None) -> Checkpoint:
    """Return the checkpoint of a model that a user names, to be opened as it is.

    An adapter is laid on `base`; without one, on the model that its own configuration names.
    Raises `HarnessError` for a name that is no model, and for a damaged or gated one.
    """
    if name.startswith(PREFIX):
        return _served(name, cache)
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        unpacked = unpack_gguf(path, cache, exact=True)
        return replace(unpacked, bytes_on_disk=path.stat().st_size)
    if is_adapter(path):
        return _on_base(path, path.resolve().name, cache, base)
    if not path.exists() and not is_embedded(name) and is_hub_id(name):
        folder, digest = hub_snapshot(name)
        if is_adapter(folder):
            return _on_base(folder, name, cache, base, digest=digest)
    return resolve(name, cache=cache)


def _served(name: str, cache: Path) -> Checkpoint:
    """Return the checkpoint of a GGUF file that llama.cpp opens."""
    path = Path(name.removeprefix(PREFIX)).expanduser()
    if path.suffix != ".gguf" or not path.is_file():
        raise HarnessError(
            f"{name}: there is no such GGUF file; give {PREFIX}FILE.gguf, or a folder without "
            f"{PREFIX}"
        )
    return _describe_served(path, cache, kind=gguf_type(path))


def _adapter_digest(folder: Path) -> str:
    return digest_of([(name, file_digest(folder / name)) for name in (CONFIG, WEIGHTS)])


def _on_base(
    folder: Path, name: str, cache: Path, base: Checkpoint | None, *, digest: str = ""
) -> Checkpoint:
    """Return the checkpoint of an adapter on its base; it weighs what both weigh.

    `digest` is the adapter's own, where the Hub gives one.
    """
    config = adapter_config(folder)
    if base is None:
        base = _declared_base(name, config, cache)
    elif base.base is not None:
        raise HarnessError(
            f"{name} is an adapter, and so is {base.name}; lay it on a model of its own"
        )
    note = f"LoRA adapter of rank {config.get('r')} on {base.name}"
    declared = _declared_name(config)
    if declared and declared not in (base.name, base.path.name):
        note += f", made for {declared}"
    return Checkpoint(
        path=folder,
        name=name,
        digest=digest_of("adapter", digest or _adapter_digest(folder), base.digest),
        parents=(base.digest,),
        bytes_on_disk=base.bytes_on_disk + (folder / WEIGHTS).stat().st_size,
        note=note,
        base=base.path,
    )


def _declared_name(config: Mapping[str, Any]) -> str:
    """Return the name of the model that an adapter was made for, without the folders above it."""
    declared = str(config.get("base_model_name_or_path") or "")
    return Path(declared).name if Path(declared).is_absolute() else declared


def _declared_base(name: str, config: Mapping[str, Any], cache: Path) -> Checkpoint:
    declared = str(config.get("base_model_name_or_path") or "")
    if not declared:
        raise HarnessError(
            f"adapter {name} does not say which model it was made for; lay it on a teacher: "
            f"harness run --teacher MODEL --checkpoint NAME={name}"
        )
    return resolve(declared, cache=cache)


def _describe_served(path: Path, cache: Path, *, kind: str) -> Checkpoint:
    """Return the checkpoint of a GGUF file that llama.cpp opens; `kind` is its commonest tensor's.

    Configuration and tokenizer are read by transformers and kept in `cache`; weights are not.
    """
    digest = remembered_digest(path, cache)
    folder = cache / "gguf" / f"{digest[:32]}-description"
    if not (folder / "config.json").exists():
        _save_description(path, folder)
    return Checkpoint(
        path=path,
        name=path.stem,
        digest=digest_of("llama-cpp", digest),
        bytes_on_disk=path.stat().st_size,
        note=f"GGUF {kind} as llama.cpp serves it",
        base=folder,
    )


def _save_description(path: Path, folder: Path) -> None:
    """Save a GGUF file's configuration and tokenizer, as transformers reads them."""
    from transformers import AutoConfig, GenerationConfig

    with one_line_open_errors(path.name):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer = tokenizer_of(path.parent, gguf_file=path.name)

    def write(part: Path) -> None:
        part.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(part)
        tokenizer.save_pretrained(part)
        GenerationConfig.from_model_config(config).save_pretrained(part)

    folder.parent.mkdir(parents=True, exist_ok=True)
    save_atomically(folder, write)
