"""Words that need no decoding: a local names the thing it holds, and one public name is one class.

A local called `one`, `found` or `told` says that something happened, and nothing of what it is: the
reader must go back to the line that bound it. `record`, `request` or `rows` say it on every line.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("harness", "methods", "suites")
PARTICIPLES = "found told asked made said got taken gathered wanted gone seen"
PRONOUNS = "one ones every each here there left right then now whole"
REFUSED = frozenset(f"{PARTICIPLES} {PRONOUNS}".split())
# the page's script is dense: there a letter, but for an index, is one more name to look up
REFUSED_IN_SCRIPTS = REFUSED | frozenset(["a", "b", "n", "at", "all", "own", "more", "why"])
PAGE = ROOT / "harness" / "reporting" / "assets" / "page.html"
# (file, function, name) -> why it stays
ALLOWED_NAMES: dict[tuple[str, str, str], str] = {
    (file, f"{source}.{function}", "wanted"): "tasks of other packages give it by this name"
    for file, source in (
        ("harness/contract.py", "DataSource"),
        ("harness/data/source.py", "LocalOrHubData"),
    )
    for function in ("file", "rows", "text")
}
# the name of two public classes -> why it stands for both
ALLOWED_CLASSES: dict[str, str] = {}


class Binding(NamedTuple):
    """A name that a function, a lambda or a comprehension binds."""

    file: str
    function: str  # with the classes and functions around it; "" at the level of the module
    name: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.name} in {self.function or 'the module'}"


def source_files() -> list[Path]:
    """Return the Python files of the three packages."""
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def bindings(source: str, file: str) -> Iterator[Binding]:
    """Yield each local, parameter and comprehension variable of a source, and no field of a class.

    `except ... as`, `import ... as` and names caught by `match` are bindings too.
    """
    yield from _bindings_below(ast.parse(source), file, function="", binds_fields=False)


def _bindings_below(
    node: ast.AST, file: str, *, function: str, binds_fields: bool
) -> Iterator[Binding]:
    for child in ast.iter_child_nodes(node):
        inner, is_class = function, False
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = f"{function}.{child.name}".lstrip(".")
            is_class = isinstance(child, ast.ClassDef)
        elif isinstance(child, ast.AnnAssign | ast.Assign):
            is_class = binds_fields  # a field stands directly in its class
        name = _bound_name(child)
        if name and not (binds_fields and isinstance(child, ast.Name)):
            yield Binding(file, function, name, getattr(child, "lineno", 0))
        yield from _bindings_below(child, file, function=inner, binds_fields=is_class)


def _bound_name(node: ast.AST) -> str | None:
    """Return the name that a node binds, None for a node that binds none."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return node.id
    if isinstance(node, ast.arg):
        return node.arg
    if isinstance(node, ast.alias):
        return node.asname
    if isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar):
        return node.name
    return None


def refused_names(source: str, file: str) -> list[str]:
    """Return the bindings whose names say nothing of what they hold, as lines to print."""
    return [
        str(binding)
        for binding in bindings(source, file)
        if binding.name in REFUSED and binding[:3] not in ALLOWED_NAMES
    ]


def test_a_local_names_the_thing_it_holds():
    """A participle or a pronoun is refused: it says that something happened, not what it is.

    Name the thing: `record`, `request`, `state`, `rows`. Where a name is given by others (a
    plug-in's keyword), ALLOWED_NAMES says so.
    """
    names = [
        name
        for path in source_files()
        for name in refused_names(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    ]
    assert not names, "these names do not say what they hold:\n" + "\n".join(names)


@pytest.mark.parametrize(
    ("source", "binding"),
    [
        ("def f():\n    found = 1", "a.py:2: found in f"),
        ("def f():\n    for one in range(3):\n        pass", "a.py:2: one in f"),
        ("def f():\n    with open('x') as told:\n        pass", "a.py:2: told in f"),
        ("def f():\n    if (said := g()):\n        pass", "a.py:2: said in f"),
        ("def f(x, *, asked=1):\n    pass", "a.py:1: asked in f"),
        ("def f(*made, **got):\n    pass", "a.py:1: made in f\na.py:1: got in f"),
        ("f = lambda ones: 1", "a.py:1: ones in the module"),
        ("def f():\n    return [1 for _, taken in g()]", "a.py:2: taken in f"),
        ("ROWS = {gone: 1 for gone in g()}", "a.py:1: gone in the module"),
        ("def f():\n    def g():\n        gathered = 1", "a.py:3: gathered in f.g"),
        ("class A:\n    def f(self):\n        wanted = 1", "a.py:3: wanted in A.f"),
        ("async def f():\n    async for one in g():\n        pass", "a.py:2: one in f"),
        ("try:\n    pass\nexcept Error as found:\n    pass", "a.py:3: found in the module"),
        ("import torch as whole", "a.py:1: whole in the module"),
        ("def f(x):\n    match x:\n        case [made]:\n            pass", "a.py:3: made in f"),
    ],
)
def test_a_refused_name_is_seen_wherever_it_is_bound(source, binding):
    assert "\n".join(refused_names(source, "a.py")) == binding


@pytest.mark.parametrize(
    "source",
    [
        "class A:\n    found: int = 0\n    told = 1",
        "def f(self):\n    self.found = g().told",
        "def f():\n    return found",
        "def found():\n    return one(made=1)",
        "def f(record):\n    found_rows = record",
    ],
)
def test_a_field_a_function_and_a_longer_name_are_not_refused(source):
    assert not refused_names(source, "a.py")


def test_every_allowed_name_is_still_bound():
    bound = {
        binding[:3]
        for path in source_files()
        for binding in bindings(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    }
    assert not set(ALLOWED_NAMES) - bound


def script_names(script: str) -> set[str]:
    """Return the names that a script uses: no property, no key of an object, no word of a text."""
    code = re.sub(
        r"\{\{[^}]*\}\}|/\*.*?\*/|//[^\n]*|\"(?:[^\"\\\n]|\\.)*\"", " ", script, flags=re.S
    )
    code = re.sub(
        r"`[^`]*`", lambda text: " ".join(re.findall(r"\$\{([^{}]*)\}", text[0])), code, flags=re.S
    )
    names = re.finditer(r"(?<![\w$.])(?:\.{3})?([A-Za-z_$][\w$]*)", code)
    keys = {match.start(1) for match in re.finditer(r"[{,]\s*([A-Za-z_$][\w$]*)\s*:", code)}
    return {match[1] for match in names if match.start(1) not in keys}


def test_a_local_of_the_page_names_the_thing_it_holds():
    _, script = PAGE.read_text(encoding="utf-8").rsplit("<script>", 1)
    names = script_names(script.partition("</script>")[0])
    assert {"pareto", "kept", "leftWords", "toX"} <= names  # the script was read
    assert not names & REFUSED_IN_SCRIPTS


@pytest.mark.parametrize(
    ("script", "names"),
    [
        ("const found = 1, kept = g(one);", {"found", "one"}),
        ("rows.map((one, at) => one.right + `${then} now ${x}`)", {"one", "at", "then"}),
        ("f(...ones, { right: x, all: (i) => x.here }); // found", {"ones"}),
        ('const text = x ? left : whole; /* said */ "told";', {"left", "whole"}),
        ("for (const [seen] of rows) { let made; }", {"seen", "made"}),
    ],
)
def test_a_refused_name_of_a_script_is_seen(script, names):
    assert script_names(script) & REFUSED_IN_SCRIPTS == names


def shared_class_names(sources: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the files of each public class that stands in more than one of them, by its name."""
    files = defaultdict(list)
    for file, source in sources.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                files[node.name].append(file)
    return {name: where for name, where in files.items() if len(where) > 1}


def test_one_public_name_is_one_class():
    sources = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in source_files()}
    shared = shared_class_names(sources)
    unexplained = {name: files for name, files in shared.items() if name not in ALLOWED_CLASSES}
    assert not unexplained, "rename all but one, or say in ALLOWED_CLASSES why both keep the name"
    assert not set(ALLOWED_CLASSES) - set(shared), "these names are no longer shared"


def test_two_classes_of_one_name_are_seen():
    sources = {
        "a.py": "class Job: pass\nclass _Row: pass\nclass Run:\n    class Part: pass",
        "b.py": "class Job: pass\nclass _Row: pass\nclass Part: pass",
    }
    assert shared_class_names(sources) == {"Job": ["a.py", "b.py"]}
