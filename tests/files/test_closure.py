"""The code behind a class: what counts, what does not, and what cannot be followed.

Packages are written to a folder; none of ours is edited.
"""

import importlib
import subprocess
import sys
import textwrap

import pytest

from harness.errors import HarnessError
from harness.files.closure import code_digest, code_digests, own_code_digest

METHOD = '''"""A method of another package."""

import os
from typing import TYPE_CHECKING

from acme import scale
from acme.deep import inner
from .sibling import width

if TYPE_CHECKING:
    from acme import only_types

try:
    from acme import maybe
except ImportError:
    maybe = None


class Mine:
    """Makes a student."""

    def compress(self, job):
        """Make it."""
        from acme import late
        import acme.later.leaf
        import importlib

        return importlib.import_module("acme.literal"), importlib.import_module(".relative", "acme")

    def grade(self, gold, text):
        from acme.grader import judge

        return judge(gold, text)
'''
FILES = {
    "__init__.py": "NAME = 'acme'\n",
    "method.py": METHOD,
    "scale.py": "from acme.second import two\nFACTOR = two\n",
    "second.py": "two = 2\n",
    "deep/__init__.py": "",
    "deep/inner.py": "from .. import round_trip\nfrom ..up import above\n",
    "round_trip.py": "from acme import method\n",
    "up.py": "above = 1\n",
    "sibling.py": "width = 3\n",
    "only_types.py": "T = int\n",
    "maybe.py": "M = 1\n",
    "late.py": "L = 1\n",
    "later/__init__.py": "",
    "later/leaf.py": "leaf = 1\n",
    "literal.py": "x = 1\n",
    "relative.py": "y = 1\n",
    "grader.py": "def judge(a, b):\n    return a == b\n",
    "unused.py": "z = 1\n",
}
COUNTS = sorted(f"acme/{name}" for name in FILES if name not in ("only_types.py", "unused.py"))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return a function that writes files, imports a module of them and returns its class."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(files=FILES, name="acme", module="acme.method", attribute="Mine"):
        for path, text in files.items():
            place = tmp_path / name / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(textwrap.dedent(text), encoding="utf-8")
        importlib.invalidate_caches()
        return getattr(importlib.import_module(module), attribute)

    yield make
    for loaded in [
        one
        for one in sys.modules
        if one.partition(".")[0] in ("acme", "lone", "ns", "beside", "beside_helper")
    ]:
        del sys.modules[loaded]


def test_everything_that_is_imported_counts_wherever_it_stands(package):
    assert sorted(code_digests(package())) == COUNTS


@pytest.mark.parametrize("name", [name for name in FILES if f"acme/{name}" in COUNTS])
def test_a_line_of_any_module_in_the_closure_changes_the_digest(package, tmp_path, name):
    mine = package()
    before = code_digest(mine)
    place = tmp_path / "acme" / name
    place.write_text(place.read_text() + "\nADDED = 1\n")
    assert code_digest(mine) != before
    place.write_text(place.read_text().replace("\nADDED = 1\n", "\n"))
    assert code_digest(mine) == before


@pytest.mark.parametrize("name", ["only_types.py", "unused.py"])
def test_what_is_only_for_types_or_not_imported_does_not_count(package, tmp_path, name):
    mine = package()
    before = code_digest(mine)
    (tmp_path / "acme" / name).write_text("CHANGED = 1\n")
    assert code_digest(mine) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""A method of another package."""', '"""Other words."""'),
        ('    """Makes a student."""\n', ""),
        ('"""Make it."""', '"""Do."""'),
        ("import os\n", "import os  # a remark\n\n\n"),
        ("class Mine:", "# a remark\nclass Mine:"),
        ("from acme import only_types", "from acme import unused"),
        ("maybe = None", "maybe = (\n        None\n    )"),
        ("if TYPE_CHECKING:\n    from acme import only_types\n", ""),
        ("class Mine:", "class Mine:\n    pass\n"),
    ],
)
def test_words_and_places_do_not_count(package, tmp_path, old, new):
    mine = package()
    before = code_digest(mine)
    assert old in METHOD
    (tmp_path / "acme" / "method.py").write_text(METHOD.replace(old, new, 1))
    assert code_digest(mine) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("maybe = None", "maybe = 0"),
        ("class Mine:", "class Mine(object):"),
        ("gold, text)", "text, gold)"),
    ],
)
def test_code_counts(package, tmp_path, old, new):
    mine = package()
    before = code_digest(mine)
    (tmp_path / "acme" / "method.py").write_text(METHOD.replace(old, new, 1))
    assert code_digest(mine) != before


def test_docstrings_count_where_they_are_read(package, tmp_path):
    text = (
        'class Mine:\n    """Solve: {question}"""\n\n'
        "    def compress(self, job):\n        return type(self).__doc__\n"
    )
    mine = package({"__init__.py": "", "method.py": text})
    before = code_digest(mine)
    (tmp_path / "acme" / "method.py").write_text(text.replace("Solve", "Answer"))
    assert code_digest(mine) != before


def test_what_one_method_alone_imports_can_be_left_out(package, tmp_path):
    mine = package()
    without = code_digests(mine, without=("grade",))
    assert set(code_digests(mine)) - set(without) == {"acme/grader.py"}
    (tmp_path / "acme" / "method.py").write_text(
        METHOD.replace("return judge(gold, text)", "return not judge(gold, text)")
    )
    assert code_digests(mine, without=("grade",)) == without


def test_not_type_checking_is_code(package):
    text = (
        "from typing import TYPE_CHECKING\nif not TYPE_CHECKING:\n    from acme import "
        "runs\nelse:\n    from acme import types_only\n"
    )
    text += "class Mine: ...\n"
    digests = code_digests(
        package({"__init__.py": "", "method.py": text, "runs.py": "", "types_only.py": ""})
    )
    assert "acme/runs.py" in digests and "acme/types_only.py" not in digests
    text = (
        "import typing\nif typing.TYPE_CHECKING:\n    import acme.types_only\nelse:\n    import "
        "acme.runs\nclass Mine: ...\n"
    )
    assert set(code_digests(package({"method.py": text}))) == set(digests)


@pytest.mark.parametrize(
    "line",
    [
        "importlib.import_module(NAME)",
        "importlib.import_module(f'acme.{NAME}')",
        "__import__(NAME)",
        "exec(NAME)",
    ],
)
def test_where_an_import_cannot_be_followed_the_whole_package_counts(package, tmp_path, line):
    text = (
        "import importlib\nNAME = 'un' + 'used'\nclass Mine:\n    def compress(self, job):\n      "
        f"  return {line}\n"
    )
    mine = package({**FILES, "method.py": text})
    assert {"acme/unused.py", "acme/only_types.py", "acme/deep/inner.py"} <= set(code_digests(mine))
    before = code_digest(mine)
    (tmp_path / "acme" / "unused.py").write_text("z = 2\n")
    assert code_digest(mine) != before


def test_files_that_code_names_or_reads_count(package, tmp_path):
    named = "from pathlib import Path\nTABLE = 'table.json'\nclass Mine: ...\n"
    mine = package(
        {"__init__.py": "", "method.py": named, "table.json": "{}", "data/other.yaml": "a: 1\n"}
    )
    assert set(code_digests(mine)) == {"acme/__init__.py", "acme/method.py", "acme/table.json"}
    (tmp_path / "acme" / "method.py").write_text(
        named
        + "def rows(name):\n    return (Path(__file__).parents[1] / 'data' / name).read_text()\n"
    )
    before = code_digest(mine)
    assert "acme/data/other.yaml" in code_digests(mine)
    (tmp_path / "acme" / "data" / "other.yaml").write_text("a: 2\n")
    assert code_digest(mine) != before


def test_a_lone_module_and_what_stands_beside_it(package, tmp_path):
    (tmp_path / "lone.py").write_text("import beside_helper\nclass Mine: ...\n")
    (tmp_path / "beside_helper.py").write_text("a = 1\n")
    importlib.invalidate_caches()
    mine = importlib.import_module("lone").Mine
    assert set(code_digests(mine)) == {"lone.py", "beside_helper.py"}


def test_a_namespace_package_over_two_folders(tmp_path, monkeypatch, package):
    for part, text in (("one", "from ns.b import helper\nclass Mine: ...\n"), ("two", "")):
        monkeypatch.syspath_prepend(str(tmp_path / part))
        (tmp_path / part / "ns").mkdir(parents=True)
        if text:
            (tmp_path / part / "ns" / "a.py").write_text(text)
    (tmp_path / "two" / "ns" / "b").mkdir()
    (tmp_path / "two" / "ns" / "b" / "helper.py").write_text("h = 1\n")
    importlib.invalidate_caches()
    assert set(code_digests(importlib.import_module("ns.a").Mine)) == {"ns/a.py", "ns/b/helper.py"}


def test_a_base_class_of_another_package_counts(package, tmp_path):
    package({"__init__.py": "", "method.py": "class Mine:\n    def compress(self, job): ...\n"})
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "__init__.py").write_text(
        "from acme.method import Mine\nclass Child(Mine): ...\n"
    )
    importlib.invalidate_caches()
    assert {"beside/__init__.py", "acme/method.py"} <= set(
        code_digests(importlib.import_module("beside").Child)
    )


def test_a_class_of_a_test_has_its_files_code():
    class Here:
        pass

    assert any(name.endswith("test_closure.py") for name in code_digests(Here))


def test_code_that_is_nowhere_is_one_line():
    typed_class = type("Typed", (), {"__module__": "nowhere_at_all"})
    with pytest.raises(
        HarnessError,
        match=r"the code of nowhere_at_all\.Typed cannot be found.*put it into a \.py file",
    ) as caught:
        code_digests(typed_class)
    assert "\n" not in str(caught.value)


TYPED = """
from harness.files.closure import code_digests
from harness.errors import HarnessError
class Mine: ...
try:
    print(sorted(code_digests(Mine)))
except HarnessError as problem:
    print(problem)
"""


@pytest.mark.parametrize(
    ("typed", "said"),
    [(True, "the code of __main__.Mine cannot be found"), (False, "['__main__.py', ")],
)
def test_a_class_of_main_has_its_files_code_or_a_clear_answer(tmp_path, typed, said):
    (tmp_path / "script.py").write_text(TYPED)
    told = subprocess.run(
        [sys.executable, *(["-c", TYPED] if typed else [str(tmp_path / "script.py")])],
        capture_output=True,
        text=True,
    )
    assert told.stdout.startswith(said), told.stderr


@pytest.mark.parametrize(
    "text", ["def broken(:\n", "x = '\0'\n", b"# coding: latin-1\nx = '\xe9'\ny = (\n"]
)
def test_a_file_that_is_no_python_is_named(package, tmp_path, text):
    mine = package()
    place = tmp_path / "acme" / "second.py"
    place.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(HarnessError, match=r"second\.py is no Python that can be read") as caught:
        code_digests(mine)
    assert "\n" not in str(caught.value)


def test_files_in_other_encodings_and_with_marks_are_read(package, tmp_path):
    mine = package()
    for data in (
        b"\xef\xbb\xbftwo = 2\n",
        b"# -*- coding: latin-1 -*-\ntwo = '\xe9'\n",
        b"two = 2\r\n",
    ):
        (tmp_path / "acme" / "second.py").write_bytes(data)
        assert "acme/second.py" in code_digests(mine)


def test_libraries_are_not_followed(package):
    mine = package(
        {
            "__init__.py": "",
            "method.py": "import json\nimport pydantic\nimport numpy as np\nclass Mine: ...\n",
        }
    )
    assert set(code_digests(mine)) == {"acme/__init__.py", "acme/method.py"}


def test_one_files_own_code():
    assert list(own_code_digest("harness.running.cell")) == ["harness/running/cell.py"]
    with pytest.raises(HarnessError, match=r"the code of harness\.nothing cannot be found"):
        own_code_digest("harness.nothing")
