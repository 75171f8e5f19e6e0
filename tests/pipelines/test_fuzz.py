"""A short form of tests/benchmarks/fuzz.py: no traceback, no false belief, no hang."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from _fuzz import TARGETS, Target, fuzz

from harness.errors import HarnessError

QUICK = [target for target in TARGETS if not target.heavy]


@pytest.mark.slow
@pytest.mark.parametrize("target", QUICK, ids=[target.name for target in QUICK])
def test_harmed_files_are_one_line_or_made_again(target, tmp_path):
    report = fuzz(target, tmp_path / "files", count=6, seed=1)
    assert report.tried == 6 and not [*report.tracebacks, *report.silent, *report.hangs]


def test_the_program_sees_what_it_looks_for(tmp_path):
    def make(folder):
        (folder / "a.json").write_text('{"n": 1, "m": [2, 3]}')
        return folder / "a.json"

    def judged(read, seconds=20.0):
        return fuzz(
            Target(name="x", mutations=QUICK[0].mutations, make=make, read=read, signed=True),
            tmp_path / "x",
            count=12,
            seconds=seconds,
        )

    def careless(folder, path):
        return {"n": path.read_bytes().decode("latin-1")}

    def strict(folder, path):
        if path.read_text(encoding="utf-8") != '{"n": 1, "m": [2, 3]}':
            raise KeyError("n")
        return {"n": 1}

    def slow(folder, path):
        while path.read_bytes() != b'{"n": 1, "m": [2, 3]}':
            pass
        return {"n": 1}

    def untidy(folder, path):
        if path.read_bytes() != b'{"n": 1, "m": [2, 3]}':
            problem = HarnessError("x")
            problem.args = ("two\nlines",)
            raise problem
        return {"n": 1}

    assert len(judged(careless).silent) == 12 and len(judged(strict).tracebacks) == 12
    assert len(judged(slow, seconds=0.05).hangs) == 12 and len(judged(untidy).tracebacks) == 12
