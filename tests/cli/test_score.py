"""`harness score`: what it takes, what it refuses, and one scoring of two models."""

import pytest
from typer.testing import CliRunner

from harness.api import plan_scores
from harness.cli.app import app
from harness.errors import HarnessError
from harness.models.resolve import EMBEDDED


def test_it_takes_the_settings_of_scoring_and_none_of_methods():
    text = CliRunner().invoke(app, ["score", "--help"], terminal_width=200).output
    for flag in ("--suite", "--limit", "--subset", "--grid", "--device", "--batch-size"):
        assert f"  {flag} " in text
    for flag in ("--methods", "--teacher", "--student", "--budget", "--checkpoint", "--seeds"):
        assert f"  {flag} " not in text


def labels(*models, **settings):
    plan = plan_scores(models, settings)
    return [cell.label for cell in plan.cells]


def test_the_first_model_is_what_the_others_are_compared_with():
    assert labels("tiny") == ["teacher"]
    assert labels("tiny", str(EMBEDDED / "tiny-math")) == ["teacher", "tiny-math"]


def test_rows_are_named_by_the_models_and_apart(tmp_path):
    import shutil

    for name in ("a/model", "b/model", "c/int8"):
        shutil.copytree(EMBEDDED / "tiny", tmp_path / name)
    places = [str(tmp_path / name) for name in ("a/model", "b/model", "c/int8")]
    assert labels("tiny", *places) == ["teacher", "model", "model-2", "model-int8"]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["tiny", "tiny"], "tiny is named twice"),
        (["./no/such/model"], "unknown model"),
    ],
)
def test_what_cannot_be_scored_is_one_line(models, message):
    with pytest.raises(HarnessError, match=message):
        plan_scores(models, {})


@pytest.mark.slow
def test_two_models_are_scored_in_one_table_without_a_teacher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        "score",
        "tiny",
        "tiny-math",
        "--suite",
        "gsm8k-mini",
        "--limit",
        "6",
        "--grid",
        "none",
        "--cache",
        "cache",
    ]
    ended = CliRunner().invoke(app, words)
    assert ended.exit_code == 0, ended.output
    lines = [line for line in ended.stdout.splitlines() if line.startswith("|")]
    assert "gsm8k-mini against the first" in lines[0]
    assert lines[2].startswith("| tiny ") and lines[3].startswith("| tiny-math ")
    assert "n = 6" in lines[2] and "points" in lines[3]
