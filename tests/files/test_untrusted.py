"""Files that others wrote are read in one way: bounded, typed, one line where they fail."""

import gzip
import json
import os
from pathlib import Path

import pytest
from pydantic import BaseModel

from harness.errors import HarnessError
from harness.files import untrusted
from harness.files.lines import read_json_lines, read_signed_lines, signed_line, verify_line
from harness.files.untrusted import Limits, Unreadable, read_as, read_json, read_object
from harness.files.writing import read_signed, replace_file, write_atomically, write_signed
from harness.planning.config import read_run_file
from harness.planning.spec import parse_value

BAD = {
    "deep lists": ("[" * 100_000, "nested deeper"),
    "deep objects": ('{"a":' * 100_000, "nested deeper"),
    "deep and whole": ("[" * 80 + "]" * 80, "nested deeper"),
    "a huge number": ("9" * 5_000, "5,000 digits"),
    "a large number": (f'{{"n": -1{"0" * 18}}}', "20 digits"),
    "a name twice": ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' stands twice"),
    "torn": ('{"a": ', "not a whole JSON file"),
    "empty": ("", "not a whole JSON file"),
    "two values": ("{} {}", "not a whole JSON file"),
    "a control character": ('{"a": "\x01"}', "not a whole JSON file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_json_is_one_line_that_names_the_file(name, tmp_path):
    text, said = BAD[name]
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(Unreadable, match=said) as told:
        read_json(tmp_path / "a.json")
    assert (
        str(told.value).startswith(f"{tmp_path}/a.json")
        and "\n" not in str(told.value)
        and len(str(told.value)) < 400
    )


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"a": "\xff"}', "line 1: not UTF-8"),
        (b'{\n"a": "\xc3\x28"}', "line 2: not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    ],
)
def test_bytes_that_are_no_utf8_are_said_by_their_line(data, said, tmp_path):
    for name, read in (("a.json", read_json), ("a.toml", read_run_file)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(HarnessError, match=said):
            read(tmp_path / name)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbfseeds = 2\r\n")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    assert read_object(tmp_path / "a.json") == {"a": 1} == next(
        read_json_lines(tmp_path / "a.jsonl")
    ) and read_run_file(tmp_path / "a.toml") == {"seeds": 2}


def test_folders_pipes_long_files_and_names_that_are_none_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long").write_text("[" + "1," * 100 + "1]")
    for path, said in (
        (tmp_path / "pipe", "no file"),
        (tmp_path, "a folder stands where a file should be"),
        (tmp_path / "none", "no such file"),
        (tmp_path / "a\0b", "no such file|no path"),
    ):
        with pytest.raises(Unreadable, match=said):
            read_json(path)
    with pytest.raises(Unreadable, match="more than 100 bytes"):
        read_json(tmp_path / "long", Limits(bytes=100))


@pytest.mark.parametrize("value", [[], "text", 3, None, True])
def test_what_is_no_object_is_said_by_its_kind(value, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(value))
    with pytest.raises(
        Unreadable, match=f"it holds {untrusted.describe_json_type(value)}, not a JSON object"
    ):
        read_object(tmp_path / "a.json")


def test_a_wrong_type_is_said_by_its_field(tmp_path):
    class Pair(BaseModel):
        left: int
        right: list[int]

    (tmp_path / "a.json").write_text('{"left": 1, "right": [1, "x"]}')
    with pytest.raises(Unreadable, match=r"right\.1: "):
        read_as(tmp_path / "a.json", Pair)


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 5_000,
        "a = " + "9" * 5_000,
        "a = 1" + "0" * 18,
        "a",
        "a = 1\na = 2",
        "a = " + "{b=" * 500,
        "",
    ],
)
def test_bad_toml_is_one_line(text, tmp_path):
    (tmp_path / "a.toml").write_text(text)
    if not text:
        assert read_run_file(tmp_path / "a.toml") == {}
        return
    with pytest.raises(HarnessError, match=r"a\.toml") as told:
        read_run_file(tmp_path / "a.toml")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "text",
    ["[" * 10_000, "9" * 10_000, "NaN", "Infinity", "-Infinity", "auto", "1e", '{"a":1,"a":2}'],
)
def test_a_typed_word_that_is_no_value_stays_a_word(text):
    assert parse_value(text) == text
    assert parse_value("4") == 4 and parse_value("true") is True and parse_value("[1, 2]") == [1, 2]


def test_lines_carry_their_digest(tmp_path):
    path = tmp_path / "a.jsonl"
    values = [["key", ["an\u2028swer", 3], 0.5], {"row": 1, "text": "x"}, {"nan": float("inf")}]
    path.write_text("".join(map(signed_line, values)), encoding="utf-8", newline="\n")
    assert read_signed_lines(path) == (values, [])
    lines = path.read_text(encoding="utf-8").split("\n")
    for at, edited in (
        (0, lines[0].replace("3", "4")),
        (1, lines[1].replace('"row": 1', '"row": 2')),
        (1, '{"row": 1}'),
        (0, "[]"),
        (0, "3"),
        (0, "nul"),
    ):
        path.write_text(
            "\n".join([*lines[:at], edited, *lines[at + 1 :]]), encoding="utf-8", newline="\n"
        )
        kept, wrong = read_signed_lines(path)
        assert (
            kept == values[:at] + values[at + 1 :]
            and len(wrong) == 1
            and wrong[0].startswith(f"line {at + 1}: ")
        )
    path.write_text("\n".join(lines)[:-20], encoding="utf-8", newline="\n")
    assert read_signed_lines(path) == (values[:2], []) and read_signed_lines(tmp_path / "none") == (
        [],
        [],
    )
    with pytest.raises(ValueError, match="no digest"):
        verify_line({"digest": 3})


def test_a_packed_file_of_lines_that_is_cut_is_said(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 1_000)[:-12])
    with pytest.raises(Unreadable, match=r"a\.jsonl\.gz"):
        list(read_json_lines(path))
    path.write_bytes(b"no gzip")
    with pytest.raises(Unreadable, match=r"a\.jsonl\.gz"):
        list(read_json_lines(path))
    assert list(read_json_lines(path, skip_torn=True)) == []


def test_a_signed_file_is_read_back_and_any_change_is_seen(tmp_path):
    path = tmp_path / "done.json"
    write_signed(path, {"path": "student", "parents": ["a"], "n": 1.5})
    assert read_signed(path) == {"path": "student", "parents": ["a"], "n": 1.5}
    whole = path.read_text()
    for text in (
        whole.replace("1.5", "1.6"),
        whole.replace("student", "other"),
        whole[:-9],
        "[]",
        '{"path": "student"}',
        "",
    ):
        path.write_text(text)
        with pytest.raises(Unreadable, match=r"done\.json"):
            read_signed(path)


def test_a_write_that_fails_leaves_what_stood_there_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "a.json"
    write_atomically(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and [one.name for one in path.parent.iterdir()] == ["a.json"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    told = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor):
        told.append(Path(f"/proc/self/fd/{descriptor}").readlink().suffix)
        fsync(descriptor)

    def renamed(path, target):
        told.append("renamed")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    replace_file(tmp_path / "a", lambda fresh: fresh.write_text("x"))
    assert told == [".part", "renamed", ""]
