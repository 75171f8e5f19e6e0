"""The command `harness show`: what it prints, and mistakes in one line with exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest
from gate_rows import harness

ROOT = Path(__file__).parents[2]
STUDY = "results/compression-smollm2"


def test_a_row_of_a_study_is_shown(place):
    done = harness("show", "int8", place)
    assert done.return_value == 0
    words = {line.split(maxsplit=1)[0] for line in done.output.splitlines() if line[0] != " "}
    assert {"row", "status", "scores", "student", "command"} <= words
    assert "gsm8k-mini@1" in done.output and " n = 1,000 " in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["int5"], "unknown row 'int5'; did you mean 'int8'?"),
        (["int8", "--seed", "3"], "--seed 3: int8 has no record of that seed; it drew nothing"),
    ],
)
def test_mistakes_are_one_line(place, arguments, message):
    done = harness("show", arguments[0], place, *arguments[1:])
    assert message in str(done.exception) and "\n" not in str(done.exception)


def test_the_exit_code_of_a_mistake_is_2_and_nothing_is_printed_but_one_line():
    command = [sys.executable, "-P", "-m", "harness.cli", "show", "int4-calibratd", STUDY]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("harness: unknown row 'int4-calibratd'; did you mean 'int4-calibrated'")
