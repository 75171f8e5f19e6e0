"""Copies of tasks' data: read back equal, kept where whole, made again where cut."""

import datetime
import gzip
import json

import pytest
from task_data import gsm8k_rows, mmlu_rows, refused

import suites
from harness.data.source import LocalOrHubData
from suites import gsm8k, mmlu, wikitext
from suites.loading.fetching import json_lines


@pytest.fixture
def hub(monkeypatch):
    """A Hub with three data sets; returns the list of what was asked for."""
    asked = []
    rows = {
        ("openai/gsm8k", "train"): gsm8k_rows("train", 30),
        ("openai/gsm8k", "test"): gsm8k_rows("test", 9),
        **{
            ("cais/mmlu", split): [
                {**row, "answer": "ABCD".index(row["answer"])} for row in mmlu_rows(split, 6)
            ]
            for split in ("dev", "validation", "test")
        },
        ("Salesforce/wikitext", "test"): [
            {"text": text} for text in ("", " = A = \n", "", " Some words . \n", " More . \n")
        ],
    }

    def read(path, name, split):
        asked.append((path, name, split))
        return rows[path, split]

    for module in (gsm8k, mmlu, wikitext):
        monkeypatch.setattr(module, "hub_rows", read)
    return asked


def fetched(name, folder):
    lines = []
    return suites.fetch(name, folder, say=lines.append), lines


def test_what_is_fetched_is_what_tasks_read_from_a_folder(hub, tmp_path):
    assert fetched("gsm8k", tmp_path)[0] == 2 and fetched("mmlu", tmp_path)[0] == 3
    source = LocalOrHubData(folder=tmp_path)
    for split in ("train", "test"):
        assert gsm8k.published_rows(split, source, task="t") == gsm8k.published_rows(
            split, LocalOrHubData(), task="t"
        )
    for split in ("dev", "validation", "test"):
        assert mmlu.mmlu_rows(split, source, task="t") == mmlu.mmlu_rows(
            split, LocalOrHubData(), task="t"
        )


def test_wikitext_is_its_raw_text_without_empty_lines(hub, tmp_path):
    fetched("wikitext", tmp_path)
    text = gzip.decompress((tmp_path / "wikitext2/wiki.test.raw.gz").read_bytes()).decode()
    assert text == " = A = \n Some words . \n More . \n"
    assert len(wikitext.documents(text)) == 1


def test_whole_files_are_kept_and_cut_ones_copied_again(hub, tmp_path):
    fetched("gsm8k", tmp_path)
    first = (tmp_path / "gsm8k/train.jsonl.gz").read_bytes()
    hub.clear()
    assert fetched("gsm8k", tmp_path)[0] == 0 and hub == []
    (tmp_path / "gsm8k/train.jsonl.gz").write_bytes(first[: len(first) // 2])
    count, lines = fetched("gsm8k", tmp_path)
    assert count == 1 and hub == [("openai/gsm8k", "main", "train")]
    assert (tmp_path / "gsm8k/train.jsonl.gz").read_bytes() == first
    assert lines == [
        "gsm8k/train.jsonl.gz: 30 rows of openai/gsm8k main train",
        "gsm8k/test.jsonl.gz: 9 rows are there",
    ]


def test_a_file_that_lost_its_last_lines_is_found_by_the_manifest(hub, tmp_path):
    fetched("gsm8k", tmp_path)
    rows = gsm8k_rows("test", 9)[:7]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "gsm8k/test.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    source = LocalOrHubData(folder=tmp_path)
    refused(lambda: gsm8k.published_rows("test", source, task="t"), "7 rows found and 9 expected")
    assert fetched("gsm8k", tmp_path)[0] == 1
    assert len(gsm8k.published_rows("test", source, task="t")) == 9


def test_the_manifest_keeps_what_others_wrote(hub, tmp_path):
    manifest = tmp_path / "MANIFEST.md"
    mine = "# Mine\n\n| file | rows |\n|---|--:|\n| mine.jsonl | 3 |\n\nA remark.\n"
    manifest.write_text(mine)
    fetched("gsm8k", tmp_path)
    fetched("gsm8k", tmp_path)
    text = manifest.read_text()
    assert text.startswith(
        "# Mine\n\n| file | rows |\n|---|--:|\n| mine.jsonl | 3 |\n\nA remark.\n"
    )
    assert text.count("| gsm8k/train.jsonl.gz | 30 |") == 1
    assert text.count("| gsm8k/test.jsonl.gz | 9 |") == 1


def test_a_suite_is_all_its_tasks_and_a_generated_task_has_nothing(hub, tmp_path):
    count, lines = fetched("full", tmp_path)
    assert count == 6 and len(lines) == 2 + 2 + 3 + 3 + 1  # tasks may share files
    refused(lambda: fetched("gsm8k-mini", tmp_path), "reads nothing from the Hub")
    refused(lambda: fetched("gsm9k", tmp_path), "unknown suite 'gsm9k'")


def test_where_the_hub_cannot_be_reached_it_is_one_line_and_nothing_is_left(monkeypatch, tmp_path):
    def fail(*_):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(gsm8k, "hub_rows", fail)
    refused(lambda: fetched("gsm8k", tmp_path), "Hub could not be reached")
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def copy(folder, split, revision):
    from suites.loading.fetching import HubFile, _write

    relative = f"hub/a/b/default/{split}.jsonl.gz"
    file = HubFile(relative, f"a/b default {split}", lambda: ['{"x": 1}'], lambda: revision)
    return _write(folder, file)


def test_files_of_two_revisions_are_never_mixed(tmp_path):
    copy(tmp_path, "train", "a1")
    copy(tmp_path, "test", "a1")
    refused(lambda: copy(tmp_path, "test", "b2"), "files of revision a1", "the Hub has b2 now")
    (tmp_path / "hub/a/b/default/train.jsonl.gz").unlink()
    copy(tmp_path, "test", "b2")  # it was the only file
    note = json.loads((tmp_path / "hub/a/b/default/revision.json").read_text())
    assert note["revision"] == "b2"


def test_files_copied_by_hand_are_not_said_to_be_of_a_fetched_files_revision(tmp_path):
    folder = tmp_path / "hub/a/b/default"
    folder.mkdir(parents=True)
    by_hand = folder / "train.jsonl"
    by_hand.write_text('{"x": 0}\n')
    copy(tmp_path, "test", "b2")
    assert sorted(path.name for path in folder.iterdir()) == ["test.jsonl.gz", "train.jsonl"]
    copy(tmp_path, "validation", "b2")  # nor beside what was fetched there before
    assert not (folder / "revision.json").exists()
    for path in (by_hand, folder / "validation.jsonl.gz"):
        path.unlink()
    copy(tmp_path, "test", "c3")  # the only file there: its revision is known
    assert json.loads((folder / "revision.json").read_text())["revision"] == "c3"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (datetime.date(2026, 1, 2), "2026-01-02"),
        (datetime.datetime(2026, 1, 2, 3, 4), "2026-01-02T03:04:00"),
        (datetime.time(3, 4), "03:04:00"),
    ],
)
def test_dates_are_iso_8601(value, text):
    assert list(json_lines([{"when": value}])) == [f'{{"when": "{text}"}}']


@pytest.mark.parametrize("value", [b"picture", {1, 2}, 1j])
def test_what_json_lines_cannot_hold_is_one_line(value):
    refused(lambda: list(json_lines([{"x": value}])), "which JSON lines cannot hold", "parquet")
