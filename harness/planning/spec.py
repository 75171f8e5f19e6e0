"""Parses what users type: lists, methods with settings, teachers with weights, limits."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import JsonValue

from harness.errors import HarnessError
from harness.files.untrusted import parse_word


def parse_teachers(specs: Sequence[str]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Return the names and the weights of teachers such as `tiny=0.7`.

    The weights sum to 1; there are none if none was given.
    """
    names, weights = [], []
    for spec in specs:
        # a path that exists is a path, also if it ends like a weight
        weighted = re.search(r"=[\d.]+$", spec) and not Path(spec).exists()
        name, equals, weight = spec.rpartition("=") if weighted else (spec, "", "")
        names.append(name)
        if equals:
            weights.append(float(weight) if re.fullmatch(r"\d*\.?\d+", weight) else -1.0)
    if len(set(names)) < len(names):
        raise HarnessError(f"--teacher {','.join(specs)}: a teacher is named twice")
    if weights and (len(weights) < len(names) or min(weights) <= 0):
        raise HarnessError(
            f"--teacher {','.join(specs)}: give every teacher a weight above 0, or give none; for "
            "example tiny=0.7,tiny-math=0.3"
        )
    return tuple(names), tuple(weight / sum(weights) for weight in weights)


def parse_checkpoints(specs: Sequence[str]) -> dict[str, str]:
    """Return the models of checkpoints such as `q8=./folder`, by the names of their rows."""
    models: dict[str, str] = {}
    for spec in specs:
        name, _, model = (part.strip() for part in spec.partition("="))
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or not model:
            raise HarnessError(
                f"--checkpoint {spec}: give NAME=MODEL, with a name of letters, digits, '.', '_' "
                "and '-'; for example q8=./folder"
            )
        if name in models:
            raise HarnessError(
                f"--checkpoint {spec}: {name} is named twice; give each checkpoint its own name"
            )
        models[name] = model
    return models


def split_teachers(text: str) -> list[str]:
    """Split `a=0.7,b=0.3` at the commas, but not inside a path that exists.

    A path may contain commas: the longest part that exists is one teacher, with or without weight.
    """
    teachers: list[str] = []
    pieces = text.split(",")
    while pieces:
        lengths = range(len(pieces), 0, -1)
        count = next((n for n in lengths if _path_exists(",".join(pieces[:n]))), 0)
        rest = ",".join(pieces)
        if not count and rest.strip(", "):  # no path: up to the next comma outside brackets
            count = split_list(rest)[0].count(",") + 1
        count = count or len(pieces)
        teachers.append(",".join(pieces[:count]).strip())
        pieces = pieces[count:]
    return [teacher for teacher in teachers if teacher]


def _path_exists(spec: str) -> bool:
    path = spec.strip()
    return bool(path) and (Path(path).exists() or Path(re.sub(r"=[\d.]+$", "", path)).exists())


def split_list(text: str) -> list[str]:
    """Split `cot,response[temperature=1,teacher_share=1]` at the commas outside brackets."""
    return [part.strip() for part in _split_outside(text, lambda rest: True) if part.strip()]


def joined_lists(texts: Sequence[str] | None) -> list[str] | None:
    """Join the lists of a repeatable option; None if it was not typed."""
    return None if not texts else [part for text in texts for part in split_list(text)]


def split_outside_brackets(text: str, separator: str) -> list[str]:
    """Split at a separator, but not inside brackets or quotes."""
    return _split_outside(text, lambda rest: True, separator)


def _split_outside(text: str, splits: Callable[[str], bool], separator: str = ",") -> list[str]:
    """Split at separators outside brackets and quotes.

    `splits` gets the text behind a separator and tells whether to split there.
    """
    parts, depth, quoted = [""], 0, False
    for position, character in enumerate(text):
        quoted ^= character == '"'
        depth += (character == "[") - (character == "]") if not quoted else 0
        is_separator = character == separator and depth == 0 and not quoted
        if is_separator and splits(text[position + 1 :]):
            parts.append("")
        else:
            parts[-1] += character
    return parts


def parse_value(text: str) -> JsonValue:
    """Return the value of a typed setting: a number, true, false, or the text itself."""
    value: JsonValue = parse_word(text)
    return value


def parse_limit(text: str) -> int | dict[str, int]:
    """Parse `100` as a number, `gsm8k=20,mmlu=100` as numbers by task."""
    parts = [part.rpartition("=") for part in split_list(text)]
    named = {name.strip(): count.strip() for name, _, count in parts}
    plain = len(parts) == 1 and "=" not in text
    if (
        not all(re.fullmatch(r"[1-9]\d*", count) for count in named.values())
        or len(named) < max(1, len(parts))
        or ("" in named) != plain
    ):
        raise HarnessError(
            f"--limit {text!r} is neither a number of items nor TASK=NUMBER,...; type for example "
            "--limit gsm8k=20,mmlu=100"
        )
    counts = {name: int(count) for name, count in named.items()}
    return counts.get("", counts)


def limit_for(limit: int | Mapping[str, int] | None, task: str) -> int | None:
    """Return how many items of a task are scored; None for all."""
    return limit.get(task) if isinstance(limit, Mapping) else limit


def parse_set(pairs: Sequence[str]) -> dict[str, dict[str, JsonValue]]:
    """Parse `response.temperature=4` pairs into settings by method."""
    settings: dict[str, dict[str, JsonValue]] = {}
    for pair in pairs:
        match = re.fullmatch(r"([\w-]+)\.(\w+)=(.*)", pair)
        if not match:
            raise HarnessError(
                f"--set {pair!r} is not METHOD.SETTING=VALUE; write for example --set "
                "response.temperature=4"
            )
        settings.setdefault(match[1], {})[match[2]] = parse_value(match[3])
    return settings


def parse_method(spec: str) -> tuple[str, dict[str, JsonValue]]:
    """Parse `response[temperature=4]` into a name and its settings."""
    match = re.fullmatch(r"([\w.-]+)(?:\[(.*)\])?", spec)
    if not match:
        raise HarnessError(
            f"method {spec!r} is not NAME or NAME[SETTING=VALUE,...]; write for example "
            "response[temperature=4]"
        )
    settings: dict[str, JsonValue] = {}
    for part in filter(
        None, _split_outside(match[2] or "", lambda rest: re.match(r"\s*\w+=", rest) is not None)
    ):
        key, equals, value = part.partition("=")
        if not equals:
            raise HarnessError(f"method {spec!r}: {part!r} is not SETTING=VALUE")
        settings[key.strip()] = parse_value(value.strip())
    return match[1], settings
