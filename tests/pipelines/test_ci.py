"""What users' CI does: the documented commands, the action's script, our own gate."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.S | re.M)
    for line in block.splitlines()
]
BASELINE = ROOT / "results" / "baselines" / "embedded.json"


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Return the folder of a run of three untrained rows, made by the first documented command."""
    folder = tmp_path_factory.mktemp("ci")
    result = harness(folder, *shlex.split(COMMANDS[0])[1:])
    assert result.returncode == 0, result.stderr
    return folder


def harness(folder, *words, **environment):
    line = [sys.executable, "-P", "-m", "harness.cli", *words]
    variables = {**os.environ, "HARNESS_CACHE": str(folder / "cache"), **environment}
    return subprocess.run(
        line, cwd=folder, capture_output=True, text=True, env=variables, check=False
    )


def test_our_own_gate(desk):
    """Three rows of the embedded pair against the committed baseline, as in our CI."""
    result = harness(desk, "check", "runs", "--baseline", str(BASELINE))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "int8" in result.stdout and "not in the baseline" not in result.stdout


def test_our_own_claims(desk):
    result = harness(desk, "check", "runs", "--rows", "int8,prune-width", "--margin", "0.97")
    assert result.returncode == 0, result.stdout
    cut = harness(desk, "check", "runs", "--rows", "prune-depth", "--margin", "0.95")
    # a quarter of the blocks less, and nothing trained
    assert cut.returncode == 1 and "MISSED" in cut.stdout


def test_every_documented_command_runs(desk):
    for line in COMMANDS[1:]:
        words = shlex.split(line)[1:]
        if words[:2] == ["baseline", "update"]:
            # a developer's tree has changes; a baseline refuses them
            for path in (desk / "runs" / "cells").glob("*/record.json"):
                _mark_clean(path)
        result = harness(desk, *words)
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"


def _mark_clean(path):
    from harness.records import record

    run_record = record.read_record(path)
    environment = run_record.environment.model_copy(update={"dirty": False})
    record.write_record(path, run_record.model_copy(update={"environment": environment}))


def test_the_page_reads_what_a_run_wrote(desk):
    result = harness(desk, "report", "runs", "--html", "--out", "tables", "--forms", "md")
    assert result.returncode == 0, result.stderr
    page = (desk / "tables" / "page.html").read_text()
    data = json.loads(
        re.search(r'<script id="data" type="application/json">(.*?)</script>', page)[1]
    )
    assert data["answers"] is True and {table["name"] for table in data["groups"][0]["tables"]} >= {
        "quality",
        "diagnostics",
    }


@pytest.mark.parametrize(
    ("margin", "cannot_tell", "code", "verdict"),
    [
        ("0.9", "fail", 0, "passed"),
        ("0.9999", "fail", 3, "cannot tell"),
        ("0.9999", "pass", 0, "cannot tell"),
        ("9", "fail", 2, "mistake"),
        ("0.97", "pass", 1, "missed"),
    ],
)
def test_the_action_does_what_it_says(desk, tmp_path, margin, cannot_tell, code, verdict):
    action = yaml.safe_load((ROOT / ".github" / "actions" / "check" / "action.yml").read_text())
    [step] = action["runs"]["steps"]
    inputs = {
        "records": str(desk / "runs"),
        "margin": margin,
        "rows": "prune-depth" if verdict == "missed" else "int8",
        "cannot-tell": cannot_tell,
    }
    values = {
        name: inputs.get(name, setting["default"]) for name, setting in action["inputs"].items()
    }
    environment = {
        name: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda m: values[m[1]], text)
        for name, text in step["env"].items()
    }
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "harness"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m harness.cli "$@"\n')
    command.chmod(0o755)
    result = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            **environment,
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "GITHUB_OUTPUT": str(tmp_path / "output"),
            "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
        },
    )
    assert result.returncode == code, result.stdout + result.stderr
    outputs = dict(line.split("=") for line in (tmp_path / "output").read_text().splitlines())
    assert outputs["verdict"] == verdict
    if verdict != "mistake":
        assert (tmp_path / "harness-check.xml").exists() and verdict in (
            tmp_path / "summary.md"
        ).read_text()


def test_workflows_are_whole():
    for text in [
        (ROOT / ".github" / "workflows" / "ci.yml").read_text(),
        *re.findall(r"^```yaml\n(.*?)^```", PAGE, re.S | re.M),
    ]:
        assert yaml.safe_load(text)
    assert (
        "results/baselines/embedded.json" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    )
