"""Lines of JSON end at `\\n` alone, whatever stands inside their texts."""

import gzip
import json

import pytest

from harness.data.source import LocalOrHubData
from harness.files.lines import read_json_lines, split_lines, write_json_lines
from harness.models.artefacts import CacheEntry, entry_damage
from harness.records.samples import Evidence
from harness.scoring.answer_cache import AnswerCache
from harness.scoring.items import ItemRow, read_rows, write_rows

BREAKS = ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r", "\r\n", "\n"]


def row(text):
    return ItemRow(
        task="t",
        item=0,
        group="",
        doc_hash="d",
        prompt_hash="p",
        target_hash="t",
        gold=text,
        text=text,
        extracted={"acc": text},
        correct={"acc": True},
        tokens=1,
        stop="eos",
        log_probabilities=(-1.0, -2.0),
        prompt=text,
    )


@pytest.mark.parametrize("sign", BREAKS)
def test_a_text_with_a_rare_line_break_is_read_back_by_every_reader(sign, tmp_path):
    text = f"one{sign}two"
    write_rows(tmp_path / "samples.jsonl", [row(text), row("x")])
    assert read_rows(tmp_path / "samples.jsonl") == [row(text), row("x")]
    assert [one["text"] for one in Evidence(tmp_path / "samples.jsonl", None).answers()] == [
        text,
        "x",
    ]
    cache = tmp_path / "answers.jsonl"
    for key in "ab":
        AnswerCache(cache).put(key, [text, 3, "eos"], 0.5)
    again = AnswerCache(cache)
    assert again.get("a") == again.get("b") == ([text, 3, "eos"], 0.5)
    assert entry_damage(CacheEntry(kind="answers", path=cache, bytes=1, changed=0.0)) == ""
    (tmp_path / "data.jsonl").write_text(
        json.dumps({"q": text}, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n"
    )
    assert LocalOrHubData(folder=tmp_path).rows("data.jsonl", fields=("q",)) == [{"q": text}]


def test_half_of_a_surrogate_pair_is_written_and_read(tmp_path):
    write_rows(tmp_path / "samples.jsonl", [row("broken \ud800 text")])
    assert read_rows(tmp_path / "samples.jsonl")[0].text == "broken \ud800 text"


def test_packed_lines_blank_lines_and_torn_ones(tmp_path):
    write_json_lines(tmp_path / "a.jsonl", [{"a": 1}, [2]])
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes() + b"\n" + b'{"torn": '))
    assert (
        list(read_json_lines(tmp_path / "a.jsonl"))
        == [{"a": 1}, [2]]
        == list(read_json_lines(packed, skip_torn=True))
    )
    with pytest.raises(ValueError, match="Expecting value"):
        list(read_json_lines(packed))
    assert (
        split_lines("a\nb") == split_lines("a\nb\n") == ["a", "b"]
        and split_lines("") == []
        and split_lines("\n") == [""]
    )


def test_an_edited_answer_is_found_dropped_said_and_asked_again(tmp_path):
    path = tmp_path / "answers" / "ab" / "abc.jsonl"
    for number in range(3):
        AnswerCache(path).put(f"key{number}", [f"answer {number}", 3, "eos"], 0.5)
    entry = CacheEntry(kind="answers", path=path, bytes=1, changed=0.0)
    whole = path.read_text(encoding="utf-8")
    old = json.dumps(["key1", ["answer 1", 3, "eos"], 0.5]) + "\n"  # of a version without digests
    lines = whole.splitlines(keepends=True)
    for harmed in (
        whole.replace("answer 1", "answer 7"),
        whole.replace("key1", "key9"),
        lines[0] + old + lines[2],
        lines[0] + "[1, 2]\n" + lines[2],
    ):
        path.write_text(harmed, encoding="utf-8")
        assert entry_damage(entry).startswith("line 2: ")
        cache = AnswerCache(path)
        assert (
            "1 cached answers are damaged and were dropped (line 2" in cache.damage()
            and "computed again" in cache.damage()
        )
        assert (
            cache.get("key1") is None
            and cache.get("key9") is None
            and cache.get("key2") == (["answer 2", 3, "eos"], 0.5)
        )
        cache.put("key1", ["answer 1", 3, "eos"], 0.5)
        assert entry_damage(entry) == "" == AnswerCache(path).damage()
        assert sorted(path.read_text().splitlines(keepends=True)) == sorted(lines)


def test_edited_rows_of_items_are_shown_nowhere_and_old_ones_without_digests_are(tmp_path):
    path = tmp_path / "samples.jsonl"
    write_rows(path, [row("a"), row("b")])
    lines = path.read_text().splitlines(keepends=True)
    bare = [
        json.dumps({name: value for name, value in json.loads(line).items() if name != "digest"})
        + "\n"
        for line in lines
    ]

    def shown():
        return [one["text"] for one in Evidence(path, None).answers()]

    for text, left in (
        (lines[0].replace('"a"', '"z"') + lines[1], ["b"]),
        (bare[0] + lines[1], ["b"]),
        ("".join(bare), ["a", "b"]),
    ):
        path.write_text(text)
        assert shown() == left
        with pytest.raises(ValueError, match=r"samples\.jsonl: line 1"):
            read_rows(path)
