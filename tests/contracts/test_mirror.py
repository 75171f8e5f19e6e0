"""Tests mirror the code: `tests/<package>/test_<module>.py` tests `<package>/<module>.py`."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
# every method and task, whole runs, other libraries, a card
ACROSS = ("contracts", "pipelines", "peers", "gpu")
HOUSES = ("harness", "methods", "suites")
OF_SEVERAL = {
    "methods/test_pruning.py": "the ways of pruning share their shapes, masks and controls",
    "models/test_gguf.py": "GGUF files are resolved, unpacked and opened by three modules",
    "suites/test_tasks.py": "the real tasks are tried over one data folder",
}
# rooms whose tests stand among those across all rooms
ELSEWHERE = {"checking": "contracts/test_checks.py"}
LONGEST = 1_000  # lines: a longer file of tests has two subjects


def mirrored():
    """Return the files of tests that stand for one module each."""
    paths = (
        path for path in TESTS.rglob("test_*.py") if path.relative_to(TESTS).parts[0] not in ACROSS
    )
    return sorted(str(path.relative_to(TESTS)) for path in paths)


def modules_of(name):
    """Return the paths of the module that a test file may name.

    They lie in a room of the harness, in a package beside it, or are the room itself.
    """
    path = Path(name)
    module = path.with_name(path.name.removeprefix("test_"))
    module = module.with_name("__init__.py") if module.stem == module.parent.name else module
    return [ROOT / "harness" / module] + ([ROOT / module] if module.parts[0] in HOUSES else [])


@pytest.mark.parametrize("name", mirrored())
def test_a_file_of_tests_names_a_module_that_is_there(name):
    has_module = any(path.is_file() for path in modules_of(name))
    assert has_module != (name in OF_SEVERAL), (
        f"tests/{name} is of no module; name it for one, or say in OF_SEVERAL why it is of several"
    )


def test_every_reason_is_of_a_file_that_is_there():
    assert not [name for name in OF_SEVERAL if not (TESTS / name).is_file()]


def test_no_file_of_tests_is_longer_than_one_subject():
    lengths = {
        str(path.relative_to(TESTS)): len(path.read_text(encoding="utf-8").splitlines())
        for path in TESTS.rglob("test_*.py")
    }
    assert not {name: length for name, length in lengths.items() if length > LONGEST}


def test_a_file_without_a_module_is_found():
    assert not any(
        path.is_file()
        for name in ("gate/test_nothing.py", "test_nothing.py")
        for path in modules_of(name)
    )
    assert any(path.is_file() for path in modules_of("methods/training/test_loop.py"))


def quick(path):
    """Return a file's tests that `-m "not slow"` runs.

    They are not marked slow and use no fixture that conftest calls expensive.
    """
    body = ast.parse((TESTS / "conftest.py").read_text(encoding="utf-8")).body
    expensive = next(
        ast.literal_eval(node.value)
        for node in body
        if getattr(getattr(node, "targets", [None])[0], "id", "") == "EXPENSIVE"
    )
    tests = [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    ]
    return [
        node.name
        for node in tests
        if node.name.startswith("test_")
        and not expensive & {argument.arg for argument in node.args.args}
        and not any("slow" in ast.unparse(mark) for mark in node.decorator_list)
    ]


@pytest.mark.parametrize(
    "room", sorted(path.parent.name for path in (ROOT / "harness").glob("*/__init__.py"))
)
def test_every_room_has_tests_that_answer_quickly(room):
    place = TESTS / ELSEWHERE.get(room, room)
    files = [place] if place.suffix else sorted(place.rglob("test_*.py"))
    assert len([name for path in files for name in quick(path)]) >= 3, (
        f"tests/{room} has nothing for: pytest -m 'not slow'"
    )


def test_an_expensive_fixture_and_a_mark_make_a_test_slow():
    assert "test_every_command_runs" not in quick(TESTS / "contracts" / "test_readme.py")
    assert "test_a_faulty_method_is_found_by_the_check_that_is_there_for_it" not in quick(
        TESTS / "contracts" / "test_checks.py"
    )
    assert "test_a_faulty_task_is_found_by_the_check_that_is_there_for_it" in quick(
        TESTS / "contracts" / "test_checks.py"
    )
