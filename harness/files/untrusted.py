r"""The one reader of what a person or another process wrote: JSON, JSON lines, TOML. No torch.

Reading is bounded and typed; what fails is one line. Every bound is far above what such files hold
and far below what breaks a process: bytes before they are read, digits before they become a number,
depth before anything walks the value. Names that stand twice in an object are refused: no reader
can know which of the two counts. Texts are UTF-8 with or without a byte order mark; a line ends at
`\n` alone.
"""

import json
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from harness.errors import HarnessError


@dataclass(frozen=True)
class Limits:
    """How large a file and its values may be."""

    bytes: int = 256 * 2**20  # a record with every item of full MMLU has 3 MB
    depth: int = 64  # a record has 8
    digits: int = 18  # of an integer: what 64 bits hold
    duplicate_names: bool = False  # in an object, where the last one counts


DEFAULT_LIMITS = Limits()
# Files of model folders: tokenizers write "no longest length" as a number of 31 digits; libraries
# let the last of two names count.
MODEL_LIMITS = Limits(digits=40, duplicate_names=True)
LINE_LIMITS = Limits(bytes=16 * 2**20, digits=40)  # one line of a file of lines
SETTINGS_LIMITS = Limits(bytes=2**20, depth=16)  # what a person types: run files, suites, options
_MAX_SHOWN = 60  # characters of a name in a message


class Unreadable(HarnessError, ValueError):
    """A file, or a line of one, that cannot be read: its name, what it holds, what is right."""


Model = TypeVar("Model", bound=BaseModel)


def read_text_file(path: Path, limits: Limits = DEFAULT_LIMITS) -> str:
    """Return a file's text, without its byte order mark. Raises `Unreadable`.

    No folder, pipe or device is opened.
    """
    try:
        if not path.is_file():
            raise Unreadable(f"{path}: {_why_no_file(path)}")
        with path.open("rb") as stream:
            data = stream.read(limits.bytes + 1)
    except OSError as problem:
        raise Unreadable(f"{path}: cannot be read ({problem.strerror})") from problem
    except ValueError as problem:  # a NUL in the path
        if isinstance(problem, Unreadable):
            raise
        raise Unreadable(f"{str(path)!r}: no path ({problem})") from problem
    return decode_text(data, str(path), limits)


def _why_no_file(path: Path) -> str:
    if path.is_dir():
        return "a folder stands where a file should be"
    return "no file" if path.exists() else "no such file"


def decode_text(data: bytes, where: str, limits: Limits = DEFAULT_LIMITS) -> str:
    """Return the text of UTF-8 bytes, with or without a byte order mark. Raises `Unreadable`."""
    if len(data) > limits.bytes:
        raise Unreadable(f"{where}: more than {limits.bytes:,} bytes, which no such file has")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = data.count(b"\n", 0, problem.start) + 1
        raise Unreadable(
            f"{where}, line {line}: not UTF-8 ({problem.reason}); save the file as UTF-8"
        ) from problem


def parse_json(
    text: str, where: str, limits: Limits = DEFAULT_LIMITS, *, what: str = "file"
) -> Any:
    """Return the value of one JSON text. Raises `Unreadable`.

    `where` begins every message: a file, or a file and a line. `what` is what should be whole.
    """

    def integer(digits: str) -> int:
        if len(digits.lstrip("-")) > limits.digits:
            raise Unreadable(
                f"{where}: a number of {len(digits):,} digits; at most {limits.digits} are read"
            )
        return int(digits)

    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs) and not limits.duplicate_names:
            names = [name for name, _ in pairs]
            duplicate = next(name for name in names if names.count(name) > 1)
            raise Unreadable(
                f"{where}: {_shortened(duplicate)} stands twice in one object; leave one of them"
            )
        return result

    try:
        value = json.loads(text, parse_int=integer, object_pairs_hook=fields)
    except Unreadable:
        raise
    except RecursionError:
        raise Unreadable(f"{where}: nested deeper than {limits.depth} levels") from None
    except ValueError as problem:
        raise Unreadable(f"{where}: not a whole JSON {what} ({problem})") from problem
    _refuse_depth(value, where, limits)
    return value


def _refuse_depth(value: Any, where: str, limits: Limits) -> None:
    """Refuse a value nested so deeply that code that walks it would run out of stack."""
    level, depth = [value], 0
    while level := [
        child for parent in level for child in _children(parent) if isinstance(child, (dict, list))
    ]:
        depth += 1
        if depth >= limits.depth:
            raise Unreadable(f"{where}: nested deeper than {limits.depth} levels")


def _children(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def read_json(path: Path, limits: Limits = DEFAULT_LIMITS) -> Any:
    """Return what a JSON file holds. Raises `Unreadable`."""
    return parse_json(read_text_file(path, limits), str(path), limits)


def read_object(path: Path, limits: Limits = DEFAULT_LIMITS) -> dict[str, Any]:
    """Return the object that a JSON file holds. Raises `Unreadable`, also for any other value."""
    value = read_json(path, limits)
    if not isinstance(value, dict):
        raise Unreadable(f"{path}: it holds {describe_json_type(value)}, not a JSON object")
    return value


def read_as(path: Path, kind: type[Model], limits: Limits = DEFAULT_LIMITS) -> Model:
    """Return a JSON file as a pydantic model. Raises `Unreadable` with the first wrong field."""
    return validate_as(read_json(path, limits), kind, str(path))


def validate_as(value: Any, kind: type[Model], where: str) -> Model:
    """Return a value as a pydantic model. Raises `Unreadable` with the first wrong field."""
    try:
        return kind.model_validate(value)
    except ValidationError as problem:
        first = problem.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise Unreadable(f"{where}: {place}: {first['msg']}") from problem


def parse_json_line(line: bytes, where: str) -> Any:
    """Return the value of one line of JSON lines. Raises `Unreadable`.

    `where` names the file and the line.
    """
    return parse_json(decode_text(line, where, LINE_LIMITS), where, LINE_LIMITS, what="line")


def read_toml(path: Path, limits: Limits = SETTINGS_LIMITS) -> dict[str, Any]:
    """Return what a TOML file holds. Raises `Unreadable`."""
    text = read_text_file(path, limits)
    try:
        value = tomllib.loads(text.replace("\r\n", "\n"))
    except RecursionError:
        raise Unreadable(f"{path}: nested deeper than {limits.depth} levels") from None
    except ValueError as problem:  # its own error, and a number of more digits than Python reads
        raise Unreadable(f"{path} is no TOML ({problem})") from problem
    _refuse_depth(value, str(path), limits)
    _refuse_numbers(value, str(path), limits)
    return value


def _refuse_numbers(value: Any, where: str, limits: Limits) -> None:
    """Refuse integers larger than any setting: TOML's reader takes them as they come."""
    if isinstance(value, int) and abs(value) >= 10**limits.digits:
        raise Unreadable(f"{where}: a number of more than {limits.digits} digits")
    for child in _children(value):
        _refuse_numbers(child, where, limits)


def parse_word(text: str) -> Any:
    """Return the value of a word typed as JSON, or the word itself: `4`, `true`, `auto`."""
    try:
        value = parse_json(text, "", SETTINGS_LIMITS)
    except Unreadable:
        return text
    return text if isinstance(value, float) and not math.isfinite(value) else value


def describe_json_type(value: Any) -> str:
    """Return the type of a JSON value in words, with an article."""
    descriptions = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return descriptions.get(type(value), "null")


def _shortened(text: str) -> str:
    return repr(text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "...")
