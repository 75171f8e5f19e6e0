"""The house stands: each room says what it is for, and imports only go down.

A planted import of each forbidden kind is refused.
"""

import ast
import fnmatch
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
CONTRACTS = {contract["name"]: contract for contract in SETTINGS["importlinter"]["contracts"]}
LAYERS = [
    [name.strip() for name in re.split(r"[|:]", layer)]
    for layer in next(contract for contract in CONTRACTS.values() if "containers" in contract)[
        "layers"
    ]
]
TORCHLESS = CONTRACTS["rooms without torch, not even inside a function"]["source_modules"]
UPPER = {
    top: next(
        contract["forbidden_modules"]
        for contract in CONTRACTS.values()
        if contract["type"] == "forbidden" and contract["source_modules"] == [top]
    )
    for top in ("methods", "suites")
}
PACKAGES = sorted(
    ".".join(path.parent.relative_to(ROOT).parts)
    for top in ("harness", "methods", "suites")
    for path in (ROOT / top).rglob("__init__.py")
)


def planted() -> dict[str, list[str]]:
    """Return what each room may not import: rooms above or beside it, and forbidden packages."""
    forbidden: dict[str, list[str]] = {}
    above: list[str] = []
    for layer in LAYERS:
        for room in layer:
            others = [f"harness.{name}" for name in [*above, *layer] if name != room]
            forbidden[f"harness.{room}"] = others + (
                ["methods", "suites"] if room != "catalog" else []
            )
        above += layer
    for room in TORCHLESS:
        forbidden[room].append("torch")
    for package in PACKAGES:
        top = package.partition(".")[0]
        if top != "harness":
            forbidden[package] = [*UPPER[top], "suites" if top == "methods" else "methods"]
    return forbidden


def lint(folder: Path) -> tuple[int, str]:
    """Check the import rules of a tree as the command does."""
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    line = [sys.executable, "-c", program, "--no-cache"]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Return a copy of the three packages and of their rules."""
    pytest.importorskip("importlinter")
    folder = tmp_path_factory.mktemp("house")
    for top in ("harness", "methods", "suites"):
        shutil.copytree(
            ROOT / top, folder / top, ignore=shutil.ignore_patterns("embedded", "__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_every_room_stands_in_the_layers():
    rooms = {path.name for path in (ROOT / "harness").iterdir() if (path / "__init__.py").exists()}
    rooms |= {path.stem for path in (ROOT / "harness").glob("*.py")} - {"__init__"}
    assert rooms == {room for layer in LAYERS for room in layer}


def test_the_rules_hold_and_a_planted_import_of_each_kind_is_refused(copy):
    code, output = lint(copy)
    assert code == 0, output
    for room, others in planted().items():
        path = copy / room.replace(".", "/")
        file = path / "planted.py" if path.is_dir() else path.with_suffix(".py")
        before = file.read_text(encoding="utf-8") if file.exists() else '"""Planted."""\n'
        lines = "".join(f"    import {other}\n" for other in others)
        file.write_text(f"{before}\n\ndef planted():\n{lines}", encoding="utf-8")
    code, output = lint(copy)
    assert code == 1, output
    refused = set(re.findall(r"([\w.]+) -> ([\w.]+)", output))
    missing = [
        (room, other)
        for room, others in planted().items()
        for other in others
        if not {(room, other), (f"{room}.planted", other)} & refused
    ]
    assert not missing, f"{len(missing)} planted imports passed unseen: {missing[:12]}"


def test_no_import_goes_in_a_circle():
    """Also inside a room, and also imports inside functions; annotations alone do not count."""
    grimp = pytest.importorskip("grimp")
    graph = grimp.build_graph(
        "harness", "methods", "suites", cache_dir=None, exclude_type_checking_imports=True
    )
    remaining = {name: set(graph.find_modules_directly_imported_by(name)) for name in graph.modules}
    while leaves := [
        name for name, imported in remaining.items() if not imported & remaining.keys() - {name}
    ]:
        for name in leaves:
            del remaining[name]
    remaining.pop("harness", None)  # its door is opened by name
    assert not remaining, sorted(remaining)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_says_what_it_is_for_and_names_what_others_may_use(package):
    text = (ROOT / package.replace(".", "/") / "__init__.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    doc = ast.get_docstring(tree)
    assert doc and len(doc.split("\n")[0]) > 30
    if package.count(".") and package != "harness.data":
        assert not [
            node
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef))
        ]
        listed = next(
            ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)
        )
        files = {
            path.stem
            for path in (ROOT / package.replace(".", "/")).glob("*.py")
            if not path.stem.startswith("_")
        }
        assert set(listed) == files


def test_the_wheel_holds_every_package_and_every_file_beside_them():
    patterns = SETTINGS["setuptools"]["packages"]["find"]["include"]
    for package in PACKAGES:
        assert any(fnmatch.fnmatchcase(package, pattern) for pattern in patterns), package
    folders = {
        path.parent
        for top in ("harness", "methods", "suites")
        for path in (ROOT / top).rglob("*.py")
    }
    assert all((folder / "__init__.py").exists() for folder in folders), (
        "a folder of modules is no package"
    )
    data = SETTINGS["setuptools"]["package-data"]["harness"]
    for path in (ROOT / "harness").rglob("*"):
        if (
            path.is_file()
            and path.suffix != ".py"
            and "__pycache__" not in path.parts
            and not path.name.startswith(".")
        ):
            relative = path.relative_to(ROOT / "harness").as_posix()
            if not any(part.startswith(".") for part in path.relative_to(ROOT).parts):
                assert any(fnmatch.fnmatchcase(relative, pattern) for pattern in data), relative


# --- how large things are

MOST_LINES, MOST_PARAMETERS, CLASS_LINES, MEDIAN_LINES = 60, 8, 150, 12

_OPTIONS = "a command's options are its parameters: typer reads them from the signature"
_DOOR = "the Python door: each keyword is an option of the command, by the same name"
LARGE = {
    "harness/api.py:estimate_plans": _DOOR,
    "harness/api.py:export_hub": _DOOR,
    "harness/api.py:export_student": _DOOR,
    "harness/api.py:measure_models": _DOOR,
    "harness/api.py:recommend": _DOOR,
    "harness/cli/app.py:plan": _OPTIONS,
    "harness/cli/app.py:report": _OPTIONS,
    "harness/cli/check.py:baseline_update": _OPTIONS,
    "harness/cli/app.py:measure": _OPTIONS,
    "harness/cli/check.py:check": _OPTIONS,
    "harness/cli/compare.py:compare": _OPTIONS,
    "harness/cli/export.py:hub": _OPTIONS,
    "harness/cli/export.py:student": _OPTIONS,
    "harness/cli/recommend.py:recommend": _OPTIONS,
    "methods/training/base.py:Trained.train": "what plug-ins call, by name; the last of them are "
    "the names that options had before",
}


@dataclass(frozen=True)
class Sized:
    """A function or class, and how large it is."""

    name: str  # with the names that it stands in
    is_class: bool
    lines: int  # without decorators
    parameters: int  # without self and cls

    @property
    def is_large(self) -> bool:
        return (
            self.lines >= CLASS_LINES
            if self.is_class
            else self.lines > MOST_LINES or self.parameters > MOST_PARAMETERS
        )


def sizes(tree: ast.AST, inside: str = "", *, methods: bool = False) -> Iterator[Sized]:
    """Yield everything that is defined in a module, also inside of classes and functions."""
    for node in ast.iter_child_nodes(tree):
        is_class = isinstance(node, ast.ClassDef)
        if not is_class and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from sizes(node, inside, methods=methods)
            continue
        lines = node.end_lineno - node.lineno + 1
        yield Sized(
            f"{inside}{node.name}",
            is_class,
            lines,
            0 if is_class else parameters(node, bound=methods),
        )
        yield from sizes(node, f"{inside}{node.name}.", methods=is_class)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef, *, bound: bool) -> int:
    takes = function.args
    named = [
        *takes.posonlyargs,
        *takes.args,
        *takes.kwonlyargs,
        *filter(None, (takes.vararg, takes.kwarg)),
    ]
    static = any(
        isinstance(decorator, ast.Name) and decorator.id == "staticmethod"
        for decorator in function.decorator_list
    )
    return len(named) - (bound and not static)


@pytest.fixture(scope="module")
def house() -> dict[str, Sized]:
    files = [
        path
        for top in ("harness", "methods", "suites")
        for path in sorted((ROOT / top).rglob("*.py"))
    ]
    trees = {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in files
    }
    return {f"{file}:{each.name}": each for file, tree in trees.items() for each in sizes(tree)}


def test_functions_do_one_thing_and_what_is_large_has_a_reason(house):
    unexplained = {
        name: each for name, each in house.items() if each.is_large and name not in LARGE
    }
    assert not unexplained, (
        "split it; where that makes it harder to read, LARGE takes it with a reason"
    )


def test_what_is_large_no_longer_leaves_the_table(house):
    small = [name for name in LARGE if name not in house or not house[name].is_large]
    assert not small, "these are small by now: take them out of LARGE"


def test_most_functions_are_small(house):
    functions = [each.lines for each in house.values() if not each.is_class]
    assert len(functions) > 2_000 and median(functions) <= MEDIAN_LINES


def test_the_measure_of_size_sees_what_is_large():
    def grown(text: str) -> list[str]:
        return [each.name for each in sizes(ast.parse(text)) if each.is_large]

    long, short = "    x = 1\n" * MOST_LINES, "    x = 1\n" * (MOST_LINES - 1)
    assert grown(f"def f():\n{long}") == ["f"] and grown(f"@decorated\ndef f():\n{short}") == []
    assert grown("async def f(a, b, /, c, d, *e, g, h, i, **j): ...") == ["f"]
    assert grown("def f(a, b, /, c, d, *e, g, h, **j): ...") == []
    assert grown(
        "class A:\n  def f(self, a, b, c, d, e, f, g, h): ...\n  def g(self, a, b, c, d, e, f, g, "
        "h, i): ..."
    ) == ["A.g"]
    assert grown("class A:\n  @staticmethod\n  def f(a, b, c, d, e, f, g, h, i): ...") == ["A.f"]
    assert grown("if 1:\n  def f():\n    def g(a, b, c, d, e, f, g, h, i): ...") == ["f.g"]
    assert grown(f"class A:\n{'    x = 1' + chr(10)}" + "    y = 1\n" * (CLASS_LINES - 3)) == []
    assert grown("class A:\n" + "    y = 1\n" * (CLASS_LINES - 1)) == ["A"]
