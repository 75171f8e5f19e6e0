"""Functions and classes of methods and suites do one thing: how long they may be, and how much they may be given."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for top in ("methods", "suites") for path in (ROOT / top).rglob("*.py"))
LINES, PARAMETERS, CLASS_LINES = 60, 8, 150
ABOVE = {"_build": "one pass of a teacher over all rows, whose shards are written as they fill up"}


def lines_of(node):
    return node.end_lineno - node.lineno + 1


def parameters_of(function):
    given = function.args
    named = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in named if name not in ("self", "cls")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_and_classes_do_one_thing(path):
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name not in ABOVE]
    assert not [(node.name, lines_of(node)) for node in functions if lines_of(node) > LINES]
    assert not [(node.name, parameters_of(node)) for node in functions if parameters_of(node) > PARAMETERS]
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    assert not [(node.name, lines_of(node)) for node in classes if lines_of(node) >= CLASS_LINES]
