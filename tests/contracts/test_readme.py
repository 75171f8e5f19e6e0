"""README: its tables are the committed ones, its commands run, its tree is the tree."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tables import PAGES, filled

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = ["--budget", "2000", "--rows", "20", "--limit", "20", "--grid", "none", "--noise", "4"]
# before the example
UNTIMED = (
    "import functools, harness; harness.run = functools.partial(harness.run, grid='none', "
    "noise=4)\n"
)


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", README, re.S | re.M)


COMMANDS = [
    line for block in blocks("sh") for line in block.splitlines() if line.startswith("harness ")
]


def test_tables_are_the_generated_ones():
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        assert filled(text) == text, "type: python docs/tables.py"


def test_the_table_of_figures_is_what_the_programs_wrote():
    sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
    try:
        from _form import RESULTS, table
    finally:
        sys.path.pop(0)
    assert table() in (RESULTS / "README.md").read_text(encoding="utf-8"), (
        "a figure was changed by hand, or its page was not generated again"
    )


def test_the_first_two_blocks_are_the_two_commands():
    blocks = re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", README, re.S | re.M)
    assert "harness run --methods cot,response --suite math" in blocks[0]
    assert "tox run" in blocks[1]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with what README's commands name: models, results, a run file."""
    from harness.models.resolve import EMBEDDED

    folder = tmp_path_factory.mktemp("readme")
    for name in ("embedded", "compression-tiny", "baselines"):
        shutil.copytree(ROOT / "results" / name, folder / "results" / name)
    for name in ("my-7b", "my-0.5b"):
        shutil.copytree(EMBEDDED / "tiny", folder / name)
    (folder / "run.toml").write_text(blocks("toml")[0])
    (folder / "tests").symlink_to(ROOT / "tests")
    if os.environ.get("HARNESS_DATA_DIR"):
        (folder / "data").symlink_to(Path(os.environ["HARNESS_DATA_DIR"]).resolve())
    return folder


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_runs(line, desk):
    words = shlex.split(line)
    if "model.gguf" in words:
        if not os.environ.get("HARNESS_GGUF"):
            pytest.skip("needs a GGUF model: set HARNESS_GGUF to one")
        (desk / "model.gguf").unlink(missing_ok=True)
        (desk / "model.gguf").symlink_to(os.environ["HARNESS_GGUF"])
    if "./data" in words and not (desk / "data").exists():
        pytest.skip("needs the benchmarks' files: set HARNESS_DATA_DIR to their folder")
    # as typed, but small and on what this machine has
    if words[1] == "run" and "--dry-run" not in words:
        words = [*words, *SMALL, "--device", "cpu"]
    if words[1] == "measure":
        words = [*words, "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "harness.cli", *words[1:]],
        cwd=desk,
        capture_output=True,
        text=True,
        env={**os.environ, "HARNESS_CACHE": str(desk / "cache")},
    )
    assert done.returncode == 0, done.stderr


def test_the_python_example_runs(desk):
    done = subprocess.run(
        [sys.executable, "-P", "-c", UNTIMED + blocks("python")[0]],
        cwd=desk,
        capture_output=True,
        text=True,
        env={**os.environ, "HARNESS_CACHE": str(desk / "cache")},
    )
    assert done.returncode == 0 and "Against the controls" in done.stdout, done.stderr


def test_the_tree_is_the_tree():
    tree = README.partition("## The tree")[2].split("```")[1].strip("\n")
    assert tree.startswith("harness/")
    listed, top, folder = {}, "", ""
    for line in tree.splitlines():
        if line.startswith(" " * 15):
            listed.setdefault(folder, set()).update(re.findall(r"[a-z_\d]+", line))
        else:
            top = line.split()[0] if not line.startswith(" ") else top
            folder = line.split()[0] if not line.startswith(" ") else top + line.split()[0]
    for package in ("harness", "methods", "suites"):
        for path in [ROOT / package, *(ROOT / package).rglob("*")]:
            if (path / "__init__.py").exists() and path.name not in ("methods", "suites"):
                modules = {file.stem for file in path.glob("*.py")} - {"__init__", "__main__"}
                assert listed[f"{path.relative_to(ROOT).as_posix()}/"] == modules, path


def test_every_method_is_named():
    from methods import METHODS

    table = README.partition("## The methods")[2].partition("## A method of your own")[0]
    assert set(METHODS) <= set(re.findall(r"`([\w-]+)`", table))


def test_the_folders_of_the_tree_are_there():
    tree = README.partition("## The tree")[2].split("```")[1].strip("\n")
    top = ""
    for line in [line for line in tree.splitlines() if not line.startswith(" " * 15)]:
        top = line.split()[0] if not line.startswith(" ") else top
        folder = top + line.split()[0] if line.startswith(" ") else top
        assert (ROOT / folder).is_dir(), folder
    named = {line.split()[0].strip("/") for line in tree.splitlines() if not line.startswith(" ")}
    assert {
        path.name
        for path in ROOT.iterdir()
        if path.is_dir() and (path / "..").exists() and not path.name.startswith(".")
    } - named <= {
        "build",
        "dist",
        "compression_harness.egg-info",
        "__pycache__",
    }


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
