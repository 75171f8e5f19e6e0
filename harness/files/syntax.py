"""What one Python file says to a key: a digest of its code, and the modules and files that it
names. No torch, nothing is run.

The digest is of the syntax tree without positions, comments, docstrings and what stands under `if
TYPE_CHECKING:`. Docstrings count in a file that reads them.
"""

import ast
import gc
import hashlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from harness.errors import HarnessError, in_one_line

_HASH = 24  # hexadecimal digits of a file's digest
_LARGE = 16 * 2**20  # bytes: a data file above counts by its size and time of change
_FILE_NAME = re.compile(r"[\w.@+-]+(/[\w.@+-]+)*\.[A-Za-z]\w{0,11}")
_IMPORTERS = frozenset({"import_module", "__import__"})
_DYNAMIC_IMPORTERS = frozenset(
    {
        "walk_packages",
        "iter_modules",
        "spec_from_file_location",
        "run_path",
        "run_module",
        "load_module",
        "exec_module",
    }
)
_READERS = frozenset(
    {
        "open",
        "read_text",
        "read_bytes",
        "get_data",
        "open_text",
        "open_binary",
        "files",
        "glob",
        "rglob",
        "iterdir",
        "listdir",
        "scandir",
        "load",
        "safe_load",
        "safe_open",
        "load_file",
        "from_file",
        "fromfile",
        "read_csv",
        "read_json",
        "read_parquet",
    }
)


@dataclass(frozen=True)
class ImportReference:
    """One import as it is written: dots before the name, the name, and what is taken from it."""

    level: int
    module: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class ParsedFile:
    """What a Python file says: a digest of its code, its imports, the files that it may name, and
    what cannot be known.
    """

    digest: str
    imports: tuple[ImportReference, ...]
    texts: tuple[str, ...]
    imports_unknown: bool  # by a name that only running it tells
    reads: bool  # calls something that reads a file


@dataclass
class _Reader:
    """One pass over a syntax tree: writes its canonical form and collects what it names."""

    without: frozenset[str]
    documented: bool  # it reads docstrings, so they count
    out: list[str] = field(default_factory=list)
    imports: list[ImportReference] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)
    unknown: bool = False
    reads: bool = False

    def node(self, node: ast.AST) -> None:
        """Write a node without positions and empty fields: the same in every version of Python."""
        if isinstance(node, ast.Constant):
            self._constant(node)
            return
        self._look(node)
        self.out.append(type(node).__name__)
        for name in node._fields:
            value = getattr(node, name, None)
            if value is None or value == [] or name == "type_comment":
                continue
            self.out.append(f"({name}")
            if isinstance(value, list):
                self.nodes(value, of_class=isinstance(node, ast.ClassDef))
            elif isinstance(value, ast.AST):
                self.node(value)
            else:
                self.out.append(ascii(value))
            self.out.append(")")

    def nodes(self, nodes: Iterable[Any], *, of_class: bool = False) -> None:
        """Write what stands in a list, without what does nothing or is for types alone."""
        for one in nodes:
            if isinstance(one, ast.If) and (sense := _type_checking_sense(one.test)) is not None:
                self.nodes(one.orelse if sense else one.body)
            elif not isinstance(one, ast.AST):
                self.out.append(f"{one!a},")
            elif not self._is_nothing(one) and not (
                of_class and getattr(one, "name", "") in self.without
            ):
                self.node(one)
                self.out.append(",")

    def _is_nothing(self, node: ast.AST) -> bool:
        """Tell whether a statement does nothing: a text alone, or `pass`."""
        return isinstance(node, ast.Pass) or (_is_docstring(node) and not self.documented)

    def _constant(self, node: ast.Constant) -> None:
        self.out.append(ascii(node.value))
        if (
            isinstance(node.value, str)
            and 3 <= len(node.value) <= 200
            and _FILE_NAME.fullmatch(node.value)
        ):
            self.texts.add(node.value)

    def _look(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            self.imports += [ImportReference(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            self.imports.append(
                ImportReference(
                    node.level, node.module or "", tuple(alias.name for alias in node.names)
                )
            )
        elif isinstance(node, ast.Call):
            self._call(node)

    def _call(self, node: ast.Call) -> None:
        plain = isinstance(node.func, ast.Name)
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name in _IMPORTERS:
            self._by_name(node)
        self.unknown |= name in _DYNAMIC_IMPORTERS or (plain and name in ("exec", "eval"))
        self.reads |= name in _READERS

    def _by_name(self, node: ast.Call) -> None:
        """Take `import_module("a.b")` and `import_module(".b", "a")` for imports; any other name is
        not known.
        """
        name, package = (
            _literal_argument(node, at, keyword) for at, keyword in enumerate(("name", "package"))
        )
        if not name:
            self.unknown = True
        elif name.startswith(".") and package:
            self.imports.append(ImportReference(0, importlib.util.resolve_name(name, package)))
        else:
            dots = len(name) - len(name.lstrip("."))
            self.imports.append(ImportReference(dots, name[dots:]))


def _literal_argument(node: ast.Call, at: int, keyword: str) -> str:
    """Return the text that a call is given, "" where it is given none, or one that only running it
    tells.
    """
    given = (
        node.args[at]
        if len(node.args) > at
        else next((one.value for one in node.keywords if one.arg == keyword), None)
    )
    return given.value if isinstance(given, ast.Constant) and isinstance(given.value, str) else ""


def _type_checking_sense(test: ast.expr) -> bool | None:
    """Return True for `TYPE_CHECKING`, False for `not TYPE_CHECKING`, None for any other
    condition.
    """
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return None if (sense := _type_checking_sense(test.operand)) is None else not sense
    name = (
        test.id
        if isinstance(test, ast.Name)
        else test.attr
        if isinstance(test, ast.Attribute)
        else ""
    )
    return True if name == "TYPE_CHECKING" else None


def _is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def parse_source(data: bytes | str, where: str, without: frozenset[str]) -> ParsedFile:
    """Read the code of one file. Raises `HarnessError` with its name where it is no Python."""
    collecting = _pause_garbage_collector()
    try:
        tree = ast.parse(data)
        text = data if isinstance(data, str) else data.decode("utf-8", "replace")
        reader = _Reader(without, documented="__doc__" in text or "getdoc" in text)
        reader.node(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as problem:
        raise HarnessError(
            f"{where} is no Python that can be read ({in_one_line(problem)}); correct it"
        ) from problem
    finally:
        collecting()
    digest = hashlib.sha256("".join(reader.out).encode()).hexdigest()[:_HASH]
    return ParsedFile(
        digest, tuple(reader.imports), tuple(sorted(reader.texts)), reader.unknown, reader.reads
    )


def _pause_garbage_collector() -> Callable[[], None]:
    """Stop the garbage collector, which triples the time of making a syntax tree; return what
    starts it again.
    """
    if not gc.isenabled():
        return lambda: None
    gc.disable()
    return gc.enable


@lru_cache(maxsize=4096)
def read_source(path: str, size: int, changed: int, without: frozenset[str]) -> ParsedFile:
    """Read a Python file, once for each state of it; `size` and `changed` are its stamp. Raises
    `HarnessError` with its name.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as problem:
        raise HarnessError(
            f"{path} cannot be read ({problem.strerror or problem}); make it readable"
        ) from problem
    return parse_source(data, path, without)


@lru_cache(maxsize=4096)
def bytes_digest(path: str, size: int, changed: int) -> str:
    """Return the digest of any other file, once for each state of it. Raises `HarnessError` with
    its name.
    """
    if size > _LARGE:
        return hashlib.sha256(f"{size} {changed}".encode()).hexdigest()[:_HASH]
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:_HASH]
    except OSError as problem:
        raise HarnessError(
            f"{path} cannot be read ({problem.strerror or problem}); make it readable"
        ) from problem


def file_stamp(path: str) -> tuple[int, int]:
    """Return what changes when a file does. Raises `HarnessError` with its name where it cannot be
    looked at.
    """
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError as problem:
        raise HarnessError(
            f"{path} cannot be read ({problem.strerror or problem}); make it readable"
        ) from problem
    return status.st_size, status.st_mtime_ns
