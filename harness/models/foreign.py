"""Checks a model folder from elsewhere before a library opens it: JSON, and counts. No torch.

A library raises any error over such files. Here a folder that cannot be opened gives one line with
the file and the field.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.files.untrusted import MODEL_LIMITS, Unreadable, describe_json_type, read_json

_JSON_FILES = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
    "vocab.json",
)
_POSITIVE_SETTINGS = (
    "hidden_size",
    "n_embd",
    "d_model",
    "num_hidden_layers",
    "n_layer",
    "num_layers",
    "n_layers",
    "vocab_size",
    "max_position_embeddings",
    "n_positions",
)
_COUNT_SETTINGS = (
    *_POSITIVE_SETTINGS,
    "num_attention_heads",
    "n_head",
    "num_heads",
    "n_heads",
    "num_key_value_heads",
    "intermediate_size",
    "n_inner",
    "head_dim",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
)
_MAX_COUNT = 2**31  # of any of them
_REMEDY = "download or save the model again"


def refuse_malformed(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a model folder with a file that is no JSON object, or a count that is no number."""
    for place, part in _config_parts(config):
        for name in _COUNT_SETTINGS:
            least = 1 if name in _POSITIVE_SETTINGS else 0
            problem = _count_problem(part.get(name), least=least)
            if problem:
                raise HarnessError(
                    f"{folder / 'config.json'}: {place}{name} is {problem}; {_REMEDY}"
                )
    if not isinstance(config.get("model_type", ""), str):
        raise HarnessError(
            f"{folder / 'config.json'}: model_type is {describe_json_type(config['model_type'])}, "
            f"not a text; {_REMEDY}"
        )
    for name in _JSON_FILES:
        if (folder / name).exists():
            _refuse_file(folder / name)


def _config_parts(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield a configuration, and its language model's part, each with the prefix of its names."""
    yield "", config
    if isinstance(config.get("text_config"), Mapping):
        yield "text_config.", config["text_config"]


def _count_problem(value: Any, *, least: int) -> str:
    """Return what is wrong with a count, or with one of a list for each layer; "" for nothing."""
    for count in value if isinstance(value, list) else [value]:
        is_count = type(count) is int and least <= count < _MAX_COUNT
        if count is not None and not is_count:
            return f"{repr(count)[:40]}, where a whole number from {least} on belongs"
    return ""


def _refuse_file(path: Path) -> None:
    try:
        value = read_json(path, MODEL_LIMITS)
    except Unreadable as problem:
        raise HarnessError(f"{problem}; {_REMEDY}") from problem
    if not isinstance(value, dict):
        raise HarnessError(
            f"{path}: it holds {describe_json_type(value)}, not a JSON object; {_REMEDY}"
        )
    if path.name == "tokenizer.json" and not isinstance(value.get("model"), dict):
        raise HarnessError(f"{path}: it holds no model of a tokenizer; {_REMEDY}")


def refuse_malformed_gguf(path: Path) -> None:
    """Refuse a file whose header is not that of a GGUF file.

    Checked are its magic number, its version, and counts of tensors and keys that the file could
    hold.
    """
    try:
        with path.open("rb") as stream:
            header = stream.read(24)
    except OSError as problem:
        raise HarnessError(f"{path}: cannot be read ({problem.strerror})") from problem
    if len(header) < 24 or header[:4] != b"GGUF":
        raise HarnessError(
            f"{path} is no GGUF file (it begins with {header[:4]!r}); download it again"
        )
    version = int.from_bytes(header[4:8], "little")
    tensors = int.from_bytes(header[8:16], "little")
    keys = int.from_bytes(header[16:24], "little")
    size = path.stat().st_size
    if version not in (2, 3):
        raise HarnessError(
            f"{path}: GGUF version {version}; versions 2 and 3 are read; convert it again"
        )
    if not 0 < tensors <= size // 16 or keys > size // 12:
        raise HarnessError(
            f"{path} is damaged (its header says {tensors:,} tensors and {keys:,} keys); download "
            "it again"
        )
