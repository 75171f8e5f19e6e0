"""docs/architecture.md shows the imports of today, and its walks name functions that exist."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`((?:harness|methods|suites)/[\w/]+\.py)(?::(\w+))?`", PAGE)))


@pytest.fixture(scope="module")
def draw():
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs" / "draw.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


def test_the_page_is_drawn_from_the_imports_of_today(draw):
    assert draw.filled(PAGE) == PAGE, "type: python docs/draw.py"


def test_an_import_that_is_new_changes_the_picture(draw, monkeypatch):
    before = draw.picture()
    graph = draw.edges()
    monkeypatch.setattr(draw, "edges", lambda: {**graph, "escape": {"cli"}})
    assert "escape --> cli" in draw.picture() and "escape --> cli" not in before


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_what_the_walks_pass_through_is_there(file, name):
    path = ROOT / file
    assert path.is_file(), file
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {
        node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    assert not name or name in names, f"{file} has no {name}"


PAGES = sorted(
    {
        ROOT / "README.md",
        ROOT / "results" / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob("[A-Z]*.md"),
    }
)
FILE = (
    r"(?:`|\]\()((?:\.\./)?(?:harness|methods|suites|tests|docs|results)/"
    r"[\w./-]+\.(?:py|md|html|json|toml|jsonl))[`)#:]"
)
# by a run, or by hand
WRITTEN_BY_READERS = ("results/runs/", "results/cache/", "methods/first_words.py")


@pytest.mark.parametrize(
    "page",
    PAGES,
    ids=lambda page: page.name if page.parent == ROOT else f"{page.parent.name}/{page.name}",
)
def test_every_file_that_a_page_names_is_there(page):
    named = {
        name.removeprefix("../") for name in re.findall(FILE, page.read_text(encoding="utf-8"))
    }
    missing = [
        name
        for name in sorted(named)
        if not name.startswith(WRITTEN_BY_READERS) and not (ROOT / name).exists()
    ]
    assert not missing, f"{page.name} names files that are not there: {missing}"


def test_pages_name_files():
    assert sum(len(set(re.findall(FILE, page.read_text(encoding="utf-8")))) for page in PAGES) >= 60


def test_the_walks_name_what_they_pass():
    assert len(NAMED) >= 20
