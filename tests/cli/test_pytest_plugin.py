"""Rows as tests of any pytest run."""

import subprocess
import sys

import pytest
from gate_rows import SAME, flipped, harness, row

from harness.records.record import write_record


@pytest.mark.slow
def test_rows_are_tests(place, tmp_path, pytester_run):
    path = tmp_path / "b.json"
    harness("baseline", "update", place, "--baseline", path, "--reason", "first", "--margin", "0.9")
    done = pytester_run("--harness-baseline", path, "--harness-records", place, "-v")
    assert done.returncode == 0 and "int8 gsm8k-mini [frozen] PASSED" in done.stdout, done.stdout
    write_record(
        place / "int8.json", row("int8", flipped(SAME.scores[0].outcomes["strict-match"], lose=60))
    )
    done = pytester_run("--harness-baseline", path, "--harness-records", place)
    assert (
        done.returncode == 1 and "regressed: 80.0 % -> 74.0 %, 60 lost and 0 won" in done.stdout
    ), done.stdout
    done = pytester_run(
        "--harness-records", place, "--harness-margin", "0.925", "--harness-cannot-tell", "skip"
    )
    assert done.returncode == 0 and "skipped" in done.stdout, done.stdout
    assert (
        pytester_run("--harness-records", tmp_path / "none", "--harness-margin", "0.9").returncode
        == 4
    )
    assert pytester_run("--harness-rows", "int8").returncode == 4  # results/runs is not there
    (place / "int8.json").unlink()
    done = pytester_run("--harness-records", place, "--harness-margin", "0.9")
    # a check of nothing is no pass
    assert done.returncode == 1 and "no row was checked" in done.stdout


@pytest.fixture
def pytester_run(tmp_path):

    (tmp_path / "users").mkdir()
    (tmp_path / "users" / "pytest.ini").write_text("[pytest]\n")

    def run(*line):
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", *map(str, line)]
        return subprocess.run(
            command, cwd=tmp_path / "users", capture_output=True, text=True, check=False
        )

    return run
