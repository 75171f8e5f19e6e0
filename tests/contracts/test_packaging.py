"""Installing: metadata that an index accepts, versions stated once, a user's folder of our name."""

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.version import Version

import harness

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONSTRAINTS = ROOT / "tests" / "constraints"
REQUIRED = [Requirement(line) for line in PROJECT["dependencies"]]


def pinned(name):
    """Return a constraints file's versions by package."""
    lines = (CONSTRAINTS / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {package.lower().replace("_", "-"): version for package, version in pairs}


def test_the_metadata_is_what_an_index_takes():
    files = metadata.distribution("compression-harness")
    # an editable installation leaves a folder beside the code, where the file has another name
    text = files.read_text("METADATA") or files.read_text("PKG-INFO")
    checked = Metadata.from_email(text, validate=True)
    assert checked.name == PROJECT["name"] and checked.description_content_type == "text/markdown"
    assert checked.license_expression == "Apache-2.0" and checked.requires_python == ">=3.11"
    assert not any(line.startswith("Private ::") for line in checked.classifiers)
    assert set(checked.project_urls) >= {"Repository", "Issues", "Changelog"}


def test_the_version_is_one():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(rf"^version: {re.escape(harness.__version__)}$", citation, re.MULTILINE)
    assert PROJECT["version"] == harness.__version__


def test_the_lowest_constraints_are_the_lower_bounds():
    lowest = pinned("lowest.txt")
    for requirement in REQUIRED:
        [bound] = [part.version for part in requirement.specifier if part.operator == ">="]
        name = requirement.name.lower().replace("_", "-")
        assert Version(lowest[name]) == Version(bound), requirement


def test_the_newest_constraints_are_allowed_and_no_older():
    lowest, newest = pinned("lowest.txt"), pinned("newest.txt")
    for requirement in REQUIRED:
        name = requirement.name.lower().replace("_", "-")
        assert requirement.specifier.contains(newest[name]), requirement
        assert Version(newest[name]) >= Version(lowest[name])


def typed(folder, *words, path=()):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    inherited = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if entries := [*map(str, path), *inherited]:
        environment["PYTHONPATH"] = os.pathsep.join(entries)
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=folder, env=environment
    )


@pytest.fixture
def own_folder(tmp_path):
    """A project of a user's whose folders have our names, and whose code says that it ran."""
    for name in ("methods", "suites"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("print('THEIR CODE RAN')\nMINE = 1\n")
    return tmp_path


LIST = ("list", "methods")
COMMAND = """
import sys
from harness.cli.app import main
sys.argv = ["harness", *sys.argv[1:]]
main()
"""


def test_the_command_finds_its_own_packages_in_a_folder_that_has_others(own_folder):
    """A console script has its own folder on Python's path, not the user's."""
    done = typed(own_folder, "-P", "-c", COMMAND, *LIST)
    assert done.returncode == 0 and "response" in done.stdout and "THEIR" not in done.stdout


@pytest.mark.parametrize("how", ["python -m", "PYTHONPATH", "a file in place of a folder"])
def test_another_package_of_the_name_is_refused_in_one_line_and_not_run(own_folder, how):
    if how == "a file in place of a folder":
        (own_folder / "methods" / "__init__.py").unlink()
        (own_folder / "methods").rmdir()
        (own_folder / "methods.py").write_text("print('THEIR CODE RAN')\n")
    if how == "PYTHONPATH":
        done = typed("/", "-P", "-m", "harness.cli", *LIST, path=[own_folder])
    else:
        done = typed(own_folder, "-m", "harness.cli", *LIST)
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("harness: the package methods of compression-harness is needed and ")
    assert "methods" in line and "python -P" in line and "THEIR" not in done.stdout


def test_a_folder_of_the_name_that_is_no_package_is_in_nobodys_way(tmp_path):
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "notes.txt").write_text("mine")
    done = typed(tmp_path, "-m", "harness.cli", *LIST)
    assert done.returncode == 0, done.stderr


def test_from_python_it_is_an_error_of_ours(own_folder):
    code = (
        "import harness\ntry:\n    harness.run('sft', 'math', out='x')\n"
        "except harness.HarnessError as e:\n    print('OURS', e)"
    )
    done = typed(own_folder, "-c", code)
    assert done.stdout.startswith("OURS the package methods"), done.stdout + done.stderr
