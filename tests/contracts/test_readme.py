"""README and the pages that it leads to: short, with the committed tables and commands that run."""

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
# what stood in README once, and is held to the same
MOVED = {
    name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("reading-tables", "models", "methods", "running", "measured", "tree")
}
TREE = MOVED["tree"]
SMALL = ["--budget", "2000", "--rows", "20", "--limit", "20", "--grid", "none", "--noise", "4"]
# before the example
UNTIMED = (
    "import functools, harness; harness.run = functools.partial(harness.run, grid='none', "
    "noise=4)\n"
)


def blocks(kind, *texts):
    return [
        block
        for text in texts or (README, *MOVED.values())
        for block in re.findall(rf"^```{kind}\n(.*?)^```", text, re.S | re.M)
    ]


COMMANDS = list(
    dict.fromkeys(
        line for block in blocks("sh") for line in block.splitlines() if line.startswith("harness ")
    )
)


def test_readme_is_read_in_a_minute():
    words = len(re.findall(r"\S+", README))
    assert len(README.splitlines()) <= 200 and words <= 1500, (len(README.splitlines()), words)
    assert max(map(len, README.splitlines())) <= 260


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
    # a model of the Hub is a folder of that name here
    for name in ("my-7b", "my-0.5b", "Qwen/Qwen2.5-7B-Instruct"):
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
    if "math,knowledge" in words and not (desk / "data").exists():
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
    tree = TREE.split("```")[1].strip("\n")
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

    table = MOVED["methods"].partition("## A method of your own")[0]
    assert set(METHODS) <= set(re.findall(r"`([\w-]+)`", table))
    # whoever reads README alone is told of no row that does not exist
    need = README.partition("## Which method?")[2].partition("What was kept")[0]
    rows = {
        stage.partition("[")[0]
        for line in need.splitlines()
        for cell in re.findall(r"`([^`]+)`", line)
        for stage in cell.split("+")
    }
    assert rows and rows <= set(METHODS)


def test_the_folders_of_the_tree_are_there():
    tree = TREE.split("```")[1].strip("\n")
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


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{name}.md" for name in MOVED)])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), target
