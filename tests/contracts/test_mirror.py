"""Tests stand where the code stands: `tests/<package>/test_<module>.py` is about `<package>/<module>.py`."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
ACROSS = ("contracts", "pipelines", "peers", "gpu")  # every method and task, whole runs, other libraries, a card
HOUSES = ("harness", "methods", "suites")
OF_SEVERAL = {
    "methods/test_pruning.py": "the ways of pruning share their shapes, masks and controls",
    "models/test_gguf.py": "GGUF files are resolved, unpacked and opened by three modules",
    "suites/test_tasks.py": "the real tasks are tried over one data folder",
}
LONGEST = 700  # lines: a longer file of tests has two subjects


def mirrored():
    """Return the files of tests that stand for one module each."""
    every = (path for path in TESTS.rglob("test_*.py") if path.relative_to(TESTS).parts[0] not in ACROSS)
    return sorted(str(path.relative_to(TESTS)) for path in every)


def modules_of(name):
    """Return where the module that a file of tests names may stand: a room of the harness, or a package beside it."""
    path = Path(name)
    module = path.with_name(path.name.removeprefix("test_"))
    return [ROOT / "harness" / module] + ([ROOT / module] if module.parts[0] in HOUSES else [])


@pytest.mark.parametrize("name", mirrored())
def test_a_file_of_tests_names_a_module_that_is_there(name):
    known = any(path.is_file() for path in modules_of(name))
    assert known != (name in OF_SEVERAL), f"tests/{name} is of no module; name it for one, or say in OF_SEVERAL why it is of several"


def test_every_reason_is_of_a_file_that_is_there():
    assert not [name for name in OF_SEVERAL if not (TESTS / name).is_file()]


def test_no_file_of_tests_is_longer_than_one_subject():
    lengths = {str(path.relative_to(TESTS)): len(path.read_text(encoding="utf-8").splitlines()) for path in TESTS.rglob("test_*.py")}
    assert not {name: length for name, length in lengths.items() if length > LONGEST}


def test_a_file_without_a_module_is_found():
    assert not any(path.is_file() for name in ("gate/test_nothing.py", "test_nothing.py") for path in modules_of(name))
    assert any(path.is_file() for path in modules_of("methods/training/test_loop.py"))
