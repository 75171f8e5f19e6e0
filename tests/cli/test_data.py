"""`harness data fetch` as it is typed."""

import pytest
from typer.testing import CliRunner

from harness import catalog
from harness.cli.app import app
from harness.errors import HarnessError


def typed(*arguments):
    return CliRunner().invoke(app, ["data", *arguments], standalone_mode=False)


@pytest.fixture
def fetched(monkeypatch):
    """Return what was fetched: names and folders."""
    calls = []

    def fetch_data(name, folder, *, include_path, say):
        calls.append((name, folder, include_path))
        say(f"{name}/test.jsonl.gz: 3 rows of somewhere")
        return 1

    monkeypatch.setattr(catalog, "fetch_data", fetch_data)
    return calls


def test_tasks_are_copied_and_the_option_to_type_is_said(fetched, tmp_path):
    result = typed("fetch", "gsm8k,mmlu", "lm-eval:arc_easy", "--to", str(tmp_path / "data"))
    assert [name for name, *_ in fetched] == ["gsm8k", "mmlu", "lm-eval:arc_easy"]
    assert f"3 files written; type: --data-dir {tmp_path / 'data'}" in result.output
    assert result.return_value == 0 or result.exit_code == 0


def test_a_file_in_place_of_the_folder_and_a_name_typed_twice_are_refused(fetched, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for arguments, words in (
        (("gsm8k", "--to", str(file)), "is a file; give a folder"),
        (("gsm8k", "gsm8k", "--to", str(tmp_path)), "gsm8k"),
    ):
        result = typed("fetch", *arguments)
        assert isinstance(result.exception, HarnessError) and words in str(result.exception)
    assert fetched == [] and file.read_text() == "mine"


def test_help_names_the_folder_and_the_tasks():
    result = CliRunner().invoke(app, ["data", "fetch", "--help"])
    assert "--to" in result.output and "lm-eval:arc_easy" in result.output
