"""What one Python file adds to a key: a digest of its code, and what it imports and names.

No torch; nothing is run. The digest is of the syntax tree without positions, comments, docstrings
and what stands under `if TYPE_CHECKING:`. Docstrings count in a file that reads them.
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
from typing import Any, NamedTuple

from harness.errors import HarnessError, in_one_line

_HASH = 24  # hexadecimal digits of a file's digest
_LARGE = 16 * 2**20  # bytes: a data file above counts by its size and time of change
_FILE_NAME = re.compile(r"[\w.@+-]+(/[\w.@+-]+)*\.[A-Za-z]\w{0,11}")
_IMPORTERS = frozenset({"import_module", "__import__"})
_PACKAGE_WALKERS = {"walk_packages", "iter_modules"}
_FILE_IMPORTERS = {"spec_from_file_location", "load_module", "exec_module"}
_CODE_RUNNERS = {"run_path", "run_module"}
_DYNAMIC_IMPORTERS = frozenset(_PACKAGE_WALKERS | _FILE_IMPORTERS | _CODE_RUNNERS)
_PATH_READERS = {"open", "read_text", "read_bytes", "glob", "rglob", "iterdir"}
_FOLDER_READERS = {"listdir", "scandir"}
_RESOURCE_READERS = {"get_data", "open_text", "open_binary", "files"}
_DATA_READERS = {"load", "safe_load", "safe_open", "load_file", "from_file", "fromfile"}
_TABLE_READERS = {"read_csv", "read_json", "read_parquet"}
_READERS = frozenset(
    _PATH_READERS | _FOLDER_READERS | _RESOURCE_READERS | _DATA_READERS | _TABLE_READERS
)


@dataclass(frozen=True)
class ImportReference:
    """One import as it is written: dots before the name, the name, and names from it."""

    level: int
    module: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class ParsedFile:
    """What a Python file says: a digest of its code, its imports, and texts that may name files."""

    digest: str
    imports: tuple[ImportReference, ...]
    texts: tuple[str, ...]
    imports_unknown: bool  # imports by a name that is known only when it runs
    reads: bool  # calls something that reads a file


@dataclass
class _Reader:
    """One pass over a syntax tree: writes its canonical form and collects what it names."""

    without: frozenset[str]
    documented: bool  # it reads docstrings, so they count
    written: list[str] = field(default_factory=list)
    imports: list[ImportReference] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)
    unknown: bool = False
    reads: bool = False

    def write(self, node: ast.AST) -> None:
        """Write a node without positions and empty fields: the same in every version of Python."""
        if isinstance(node, ast.Constant):
            self._constant(node)
            return
        self._collect(node)
        self.written.append(type(node).__name__)
        for name in node._fields:
            value = getattr(node, name, None)
            if value is None or value == [] or name == "type_comment":
                continue
            self.written.append(f"({name}")
            if isinstance(value, list):
                self.write_all(value, of_class=isinstance(node, ast.ClassDef))
            elif isinstance(value, ast.AST):
                self.write(value)
            else:
                self.written.append(ascii(value))
            self.written.append(")")

    def write_all(self, nodes: Iterable[Any], *, of_class: bool = False) -> None:
        """Write a list of nodes, without those that do nothing or are for types alone."""
        for node in nodes:
            if isinstance(node, ast.If) and (sense := _type_checking_sense(node.test)) is not None:
                self.write_all(node.orelse if sense else node.body)
            elif not isinstance(node, ast.AST):
                self.written.append(f"{node!a},")
            elif not self._is_nothing(node) and not (
                of_class and getattr(node, "name", "") in self.without
            ):
                self.write(node)
                self.written.append(",")

    def _is_nothing(self, node: ast.AST) -> bool:
        """Tell whether a statement does nothing: a text alone, or `pass`."""
        return isinstance(node, ast.Pass) or (_is_docstring(node) and not self.documented)

    def _constant(self, node: ast.Constant) -> None:
        self.written.append(ascii(node.value))
        text = node.value
        if isinstance(text, str) and 3 <= len(text) <= 200 and _FILE_NAME.fullmatch(text):
            self.texts.add(text)

    def _collect(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            self.imports += [ImportReference(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            self.imports.append(ImportReference(node.level, node.module or "", names))
        elif isinstance(node, ast.Call):
            self._call(node)

    def _call(self, node: ast.Call) -> None:
        is_plain_name = isinstance(node.func, ast.Name)
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name in _IMPORTERS:
            self._by_name(node)
        self.unknown |= name in _DYNAMIC_IMPORTERS or (is_plain_name and name in ("exec", "eval"))
        self.reads |= name in _READERS

    def _by_name(self, node: ast.Call) -> None:
        """Take `import_module("a.b")` and `import_module(".b", "a")` for imports.

        Any other name is unknown until the code runs.
        """
        name, package = (
            _literal_argument(node, position, keyword)
            for position, keyword in enumerate(("name", "package"))
        )
        if not name:
            self.unknown = True
        elif name.startswith(".") and package:
            self.imports.append(ImportReference(0, importlib.util.resolve_name(name, package)))
        else:
            dots = len(name) - len(name.lstrip("."))
            self.imports.append(ImportReference(dots, name[dots:]))


def _literal_argument(node: ast.Call, position: int, keyword: str) -> str:
    """Return the text of one argument of a call; "" where it is missing or no literal."""
    by_keyword = {argument.arg: argument.value for argument in node.keywords}
    value = node.args[position] if len(node.args) > position else by_keyword.get(keyword)
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""


def _type_checking_sense(test: ast.expr) -> bool | None:
    """Return True for `TYPE_CHECKING`, False for `not TYPE_CHECKING`, else None."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return None if (sense := _type_checking_sense(test.operand)) is None else not sense
    if isinstance(test, ast.Name):
        name = test.id
    else:
        name = test.attr if isinstance(test, ast.Attribute) else ""
    return True if name == "TYPE_CHECKING" else None


def _is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def parse_source(data: bytes | str, where: str, without: frozenset[str]) -> ParsedFile:
    """Read the code of one file. Raises `HarnessError` with its name where it is no Python."""
    restart_collector = _pause_garbage_collector()
    try:
        tree = ast.parse(data)
        text = data if isinstance(data, str) else data.decode("utf-8", "replace")
        reader = _Reader(without, documented="__doc__" in text or "getdoc" in text)
        reader.write(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as problem:
        raise HarnessError(
            f"{where} is no Python that can be read ({in_one_line(problem)}); correct it"
        ) from problem
    finally:
        restart_collector()
    digest = hashlib.sha256("".join(reader.written).encode()).hexdigest()[:_HASH]
    return ParsedFile(
        digest, tuple(reader.imports), tuple(sorted(reader.texts)), reader.unknown, reader.reads
    )


def _pause_garbage_collector() -> Callable[[], None]:
    """Stop the garbage collector and return the function that starts it again.

    It triples the time of making a syntax tree.
    """
    if not gc.isenabled():
        return lambda: None
    gc.disable()
    return gc.enable


@lru_cache(maxsize=4096)
def read_source(path: str, size: int, changed: int, without: frozenset[str]) -> ParsedFile:
    """Read a Python file, once for each state of it. Raises `HarnessError` with its name.

    `size` and `changed` are its stamp.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as problem:
        raise _unreadable(path, problem) from problem
    return parse_source(data, path, without)


@lru_cache(maxsize=4096)
def bytes_digest(path: str, size: int, changed: int) -> str:
    """Return the digest of any other file, once for each state of it.

    Raises `HarnessError` with its name.
    """
    if size > _LARGE:
        return hashlib.sha256(f"{size} {changed}".encode()).hexdigest()[:_HASH]
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:_HASH]
    except OSError as problem:
        raise _unreadable(path, problem) from problem


class Stamp(NamedTuple):
    """What tells one state of a file from another."""

    size: int
    changed: int  # nanoseconds


def file_stamp(path: str) -> Stamp:
    """Return a file's size and time of change, at least one of which differs when the file does.

    Raises `HarnessError` with its name where the system cannot tell.
    """
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError as problem:
        raise _unreadable(path, problem) from problem
    return Stamp(status.st_size, status.st_mtime_ns)


def _unreadable(path: str, problem: OSError) -> HarnessError:
    return HarnessError(f"{path} cannot be read ({problem.strerror or problem}); make it readable")
