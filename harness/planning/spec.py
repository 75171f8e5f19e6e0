"""What users type for a run, parsed: lists, methods with settings, teachers with shares, limits."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import JsonValue

from harness.errors import HarnessError
from harness.files.untrusted import parse_word


def parse_teachers(specs: Sequence[str]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Read `tiny=0.7,tiny-math=0.3` into names and weights (none where none is given); weights sum
    to 1 afterwards.
    """
    names, weights = [], []
    for spec in specs:
        # a path that is there wins
        weighted = re.search(r"=[\d.]+$", spec) and not Path(spec).exists()
        name, equals, weight = spec.rpartition("=") if weighted else (spec, "", "")
        names.append(name)
        if equals:
            weights.append(float(weight) if re.fullmatch(r"\d*\.?\d+", weight) else -1.0)
    if len(set(names)) < len(names):
        raise HarnessError(f"--teacher {','.join(specs)}: a teacher is named twice")
    if weights and (len(weights) < len(names) or min(weights) <= 0):
        raise HarnessError(
            f"--teacher {','.join(specs)}: give every teacher a weight above 0, or none; for "
            "example tiny=0.7,tiny-math=0.3"
        )
    return tuple(names), tuple(weight / sum(weights) for weight in weights)


def split_teachers(text: str) -> list[str]:
    """Split `a=0.7,b=0.3` at the commas; the longest part that is a path that is here, weighted or
    not, stays whole.
    """
    found: list[str] = []
    rest = text.split(",")
    while rest:
        counts = range(len(rest), 0, -1)
        joined = next((count for count in counts if _path_exists(",".join(rest[:count]))), 0)
        if not joined:  # no path: at the next comma outside brackets
            joined = (
                split_list(",".join(rest))[0].count(",") + 1
                if ",".join(rest).strip(", ")
                else len(rest)
            )
        found.append(",".join(rest[:joined]).strip())
        rest = rest[joined:]
    return [one for one in found if one]


def _path_exists(spec: str) -> bool:
    path = spec.strip()
    return bool(path) and (Path(path).exists() or Path(re.sub(r"=[\d.]+$", "", path)).exists())


def split_list(text: str) -> list[str]:
    """Split `cot,response[temperature=1,teacher_share=1]` at the commas outside brackets."""
    return [part.strip() for part in _split_outside(text, lambda rest: True) if part.strip()]


def joined_lists(given: Sequence[str] | None) -> list[str] | None:
    """Join an option's lists, typed once or several times: what was typed adds up. None where it
    was not typed.
    """
    return None if not given else [one for text in given for one in split_list(text)]


def split_outside_brackets(text: str, separator: str) -> list[str]:
    """Split at a sign outside brackets and quotes."""
    return _split_outside(text, lambda rest: True, separator)


def _split_outside(text: str, splits: Callable[[str], bool], separator: str = ",") -> list[str]:
    """Split at separators outside brackets and quotes behind which `splits` holds."""
    parts, depth, quoted = [""], 0, False
    for at, sign in enumerate(text):
        quoted ^= sign == '"'
        depth += (sign == "[") - (sign == "]") if not quoted else 0
        if sign == separator and depth == 0 and not quoted and splits(text[at + 1 :]):
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def parse_value(text: str) -> JsonValue:
    """Read a setting's value as typed on a command line: a number, true, false, or a word."""
    value: JsonValue = parse_word(text)
    return value


def parse_limit(text: str) -> int | dict[str, int]:
    """Read `100`, or `gsm8k=20,mmlu=100`."""
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
    """Return how many items of a task are scored, None for all."""
    return limit.get(task) if isinstance(limit, Mapping) else limit


def parse_set(pairs: Sequence[str]) -> dict[str, dict[str, JsonValue]]:
    """Read `--set response.temperature=4` pairs."""
    found: dict[str, dict[str, JsonValue]] = {}
    for pair in pairs:
        match = re.fullmatch(r"([\w-]+)\.(\w+)=(.*)", pair)
        if not match:
            raise HarnessError(
                f"--set {pair!r} is not METHOD.SETTING=VALUE; write for example --set "
                "response.temperature=4"
            )
        found.setdefault(match[1], {})[match[2]] = parse_value(match[3])
    return found


def parse_method(spec: str) -> tuple[str, dict[str, JsonValue]]:
    """Read `response[temperature=4]` into a name and its settings."""
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
