"""Seeded harm to files, as by a bad disk, a bad editor, a bad program or an attacker."""

import json
import random
import re
from collections.abc import Callable
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

HOSTILE = [
    "",
    " ",
    "\x1b]0;owned\x07",
    "\x1b[31mred",
    "=cmd|'/c calc'!A0",
    "a|b\n\\input{x}",
    "../../etc/passwd",
    "\u202eturned",
    "a\u2028b",
    "%s{0}$x",
    "<script>alert(1)</script>",
    "x" * 100_000,
    "\x00",
    "NaN",
    "²",
]
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    3,
    2.5,
    1e308,
    -1e-320,
    10**17,
    [],
    {},
    [[]],
    {"a": 1},
    "text",
]
RAW = [
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e999",
    b"9" * 5_000,
    b"-" + b"9" * 40,
    b"[" * 3_000,
    b'{"a":' * 3_000,
    b"[" * 300 + b"]" * 300,
    b'"\\ud800"',
]


def flip(data: bytes, draw: random.Random) -> bytes:
    """Turn one bit over."""
    at = draw.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]


def truncate(data: bytes, draw: random.Random) -> bytes:
    """Cut the end off."""
    return data[: draw.randrange(len(data))]


def drop(data: bytes, draw: random.Random) -> bytes:
    """Take a span out."""
    at = draw.randrange(len(data))
    return data[:at] + data[at + draw.randint(1, 40) :]


def repeat(data: bytes, draw: random.Random) -> bytes:
    """Write a span twice."""
    at = draw.randrange(len(data))
    end = at + draw.randint(1, 200)
    return data[:end] + data[at:end] + data[end:]


def insert(data: bytes, draw: random.Random) -> bytes:
    """Put bytes that are no text, or hostile text, somewhere."""
    at = draw.randrange(len(data) + 1)
    return (
        data[:at]
        + draw.choice(
            [
                b"\xff",
                b"\x00",
                b"\x1b[2J",
                b"\xc3\x28",
                b"\xed\xa0\x80",
                b"\r",
                b"\xe2\x80\xa8",
                b"\x85",
            ]
        )
        + data[at:]
    )


def change_encoding(data: bytes, draw: random.Random) -> bytes:
    """Add a byte order mark, or change the encoding."""
    return draw.choice(
        [
            b"\xef\xbb\xbf" + data,
            b"\xff\xfe" + data,
            data.decode("utf-8", "replace").encode("utf-16"),
            b"\xef\xbb\xbf" * 2 + data,
        ]
    )


def replace_whole(data: bytes, draw: random.Random) -> bytes:
    """Replace the whole file by something else."""
    return draw.choice(
        [
            b"",
            b"null",
            b"[]",
            b"{}",
            b"3",
            b'"text"',
            b"\n\n",
            b"[" * 100_000,
            b'{"a":' * 100_000,
            bytes(range(256)),
        ]
    )


BYTES: tuple[Mutation, ...] = (flip, truncate, drop, repeat, insert, change_encoding, replace_whole)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of every part, no more than a few of long lists."""
    parts = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value))[:6]
        if isinstance(value, list)
        else []
    )
    return [path, *(place for name, part in parts for place in _places(part, (*path, name)))]


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for name in path:
        value = value[name]
    return value


def _json(data: bytes) -> Any:
    return json.loads(data)


def _changed(data: bytes, draw: random.Random, change: Callable[[Any, Any], None]) -> bytes:
    """Change one part of a JSON text: `change(parent, name)`."""
    document = _json(data)
    places = [path for path in _places(document) if path]
    if not places:
        return b"[]"
    path = draw.choice(places)
    change(_at(document, path[:-1]), path[-1])
    return json.dumps(document).encode()


def retype(data: bytes, draw: random.Random) -> bytes:
    """Put a value of another kind in a part's place."""
    return _changed(data, draw, lambda parent, name: parent.__setitem__(name, draw.choice(VALUES)))


def hostile_text(data: bytes, draw: random.Random) -> bytes:
    """Put a hostile text in a part's place."""
    return _changed(data, draw, lambda parent, name: parent.__setitem__(name, draw.choice(HOSTILE)))


def remove(data: bytes, draw: random.Random) -> bytes:
    """Leave a part out."""
    return _changed(data, draw, lambda parent, name: parent.__delitem__(name))


def nudge(data: bytes, draw: random.Random) -> bytes:
    """Change a number or a letter a little, which no parser notices."""

    def change(parent: Any, name: Any) -> None:
        value = parent[name]
        if isinstance(value, bool) or value is None:
            parent[name] = not value
        elif isinstance(value, (int, float)):
            parent[name] = value + draw.choice([1, -1, 0.25])
        else:
            parent[name] = value[::-1] + "0" if isinstance(value, str) else draw.choice(VALUES)

    return _changed(data, draw, change)


def invalid_json_value(data: bytes, draw: random.Random) -> bytes:
    """Put something in a part's place that a JSON writer would not write."""
    return _changed(data, draw, lambda parent, name: parent.__setitem__(name, "@@")).replace(
        b'"@@"', draw.choice(RAW), 1
    )


def duplicate_field(data: bytes, draw: random.Random) -> bytes:
    """Write a field twice, with another value the first time."""
    fields = list(re.finditer(rb'"[\w.-]+": ', json.dumps(_json(data)).encode()))
    text = json.dumps(_json(data)).encode()
    if not fields:
        return b'{"a": 1, "a": 2}'
    match = draw.choice(fields)
    return (
        text[: match.start()]
        + match[0]
        + draw.choice([b"0, ", b'"x", ', b"null, "])
        + text[match.start() :]
    )


JSON: tuple[Mutation, ...] = (
    *BYTES,
    retype,
    retype,
    hostile_text,
    remove,
    remove,
    nudge,
    nudge,
    invalid_json_value,
    invalid_json_value,
    duplicate_field,
)


def harm_line(data: bytes, draw: random.Random) -> bytes:
    """Harm one line of a file of JSON lines."""
    lines = data.rstrip(b"\n").split(b"\n")
    at = draw.randrange(len(lines))
    lines[at] = draw.choice(JSON)(lines[at], draw)
    return b"\n".join(lines) + b"\n"


LINES: tuple[Mutation, ...] = (*BYTES, *[harm_line] * 10)


def harm_setting(data: bytes, draw: random.Random) -> bytes:
    """Put something else behind one equals sign or colon of a file of settings."""
    lines = data.split(b"\n")
    settings = [at for at, line in enumerate(lines) if re.match(rb"\s*[\w.\"-]+\s*[=:]", line)]
    at = draw.choice(settings)
    head = re.match(rb"\s*[\w.\"-]+\s*[=:]\s*", lines[at])
    assert head is not None
    values = (
        [json.dumps(value).encode() for value in [*VALUES, *HOSTILE]]
        + RAW
        + [b"1979-05-27", b"0x" + b"f" * 100, b"inf", b"*a", b"!function os.x", b"&a [*a]"]
    )
    return b"\n".join([*lines[:at], head[0] + draw.choice(values), *lines[at + 1 :]])


SETTINGS: tuple[Mutation, ...] = (*BYTES, *[harm_setting] * 10)


def harm_header(data: bytes, draw: random.Random) -> bytes:
    """Harm the JSON header of a safetensors file and state its new length."""
    length = int.from_bytes(data[:8], "little")
    header = draw.choice(JSON)(data[8 : 8 + length], draw)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def harm_start(data: bytes, draw: random.Random) -> bytes:
    """Harm the first bytes: magic numbers, versions, counts and lengths."""
    at = draw.randrange(min(len(data), 64))
    return (
        data[:at]
        + draw.choice([b"\xff" * 8, b"\x00" * 8, bytes([draw.randrange(256)]), b"\x7f\xff\xff\xff"])
        + data[at + draw.choice([1, 4, 8]) :]
    )


HEADER: tuple[Mutation, ...] = (
    flip,
    truncate,
    drop,
    repeat,
    insert,
    replace_whole,
    harm_start,
    harm_start,
    *[harm_header] * 6,
)
BINARY: tuple[Mutation, ...] = (
    flip,
    truncate,
    drop,
    repeat,
    insert,
    replace_whole,
    harm_start,
    harm_start,
    harm_start,
)
