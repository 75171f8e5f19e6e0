"""The code behind a class or module: a digest of each file that it imports. No torch.

A key that holds these digests changes with every line of code that can change a number, and with no
other. Files are read with `ast`, and nothing is run: imports count wherever they stand, in
functions too; those under `if TYPE_CHECKING:` do not, since nothing runs them. Comments,
docstrings, blank lines and positions do not count. Imports are followed inside `harness`, `methods`
and `suites`, and inside the distribution (or, outside of site-packages, the folder) of a class from
elsewhere. Libraries are not followed. An `__init__.py` on the way counts, but for those of our own
packages: they hold tables of names, and what a name leads to is in the key that asks for it.

What cannot be followed counts whole: where a class from elsewhere imports by a name that is known
only when it runs, every module of its package counts, and where it reads files, every file of the
package. Our own packages do neither: a file that they name beside themselves, or a task file of
lm-eval, counts by its bytes.
"""

import hashlib
import importlib.util
import inspect
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from harness.errors import HarnessError
from harness.files.syntax import (
    ImportReference,
    ParsedFile,
    bytes_digest,
    file_stamp,
    parse_source,
    read_source,
)
from harness.renames.modules import current_modules

OURS = ("harness", "methods", "suites")
_OLD_NAMES = "harness.renames."
_MAX_FILES = 5_000  # of one package
_BINARIES = (".so", ".pyd")


@dataclass(frozen=True)
class _Module:
    """A module and where its code lies; a namespace package has no file."""

    name: str
    file: str  # "" for a namespace package
    is_package: bool

    @property
    def package(self) -> str:
        """What its relative imports are relative to."""
        return self.name if self.is_package else self.name.rpartition(".")[0]

    @property
    def shown(self) -> str:
        """Its file by its package's name, never by this machine's folders."""
        tail = f"/__init__{Path(self.file).suffix}" if self.is_package else Path(self.file).suffix
        return f"{self.name.replace('.', '/')}{tail}"


@dataclass(frozen=True)
class _Scope:
    """What is followed beside our packages.

    `tops` are the names of a distribution, `folder` one whose modules stand beside the class.
    """

    tops: frozenset[str] = frozenset()
    folder: str = ""

    def follows(self, name: str) -> bool:
        """Tell whether a module's code is part of what is digested."""
        top = name.partition(".")[0]
        return (
            top in OURS
            or top in self.tops
            or bool(self.folder and _module_in_folder(top, self.folder, top))
        )


def _is_name_table(module: _Module) -> bool:
    """Tell whether a file is the `__init__` of a package of ours.

    It holds names, and what they lead to counts by itself.
    """
    return module.is_package and module.name.partition(".")[0] in OURS


def _module_in_folder(name: str, folder: str, part: str) -> _Module | None:
    """Return the module of a name in one folder, None where it is not there."""
    base = os.path.join(folder, part)  # noqa: PTH118  paths of a thousand imports, ten times as quick as Path
    if os.path.isfile(f"{base}/__init__.py"):  # noqa: PTH113
        return _Module(name, f"{base}/__init__.py", True)
    if os.path.isfile(f"{base}.py"):  # noqa: PTH113
        return _Module(name, f"{base}.py", False)
    if os.path.isdir(folder):  # noqa: PTH112
        files = sorted(Path(folder).glob(f"{part}.*"))
        binary = next((path for path in files if path.suffix in _BINARIES), None)
        if binary is not None:
            return _Module(name, str(binary), False)
    return _Module(name, "", True) if os.path.isdir(base) else None  # noqa: PTH112


def _top_folders(top: str, scope: _Scope) -> list[str]:
    """Return the folders in which a top-level module or package lies, without importing it."""
    loaded = sys.modules.get(top)
    if loaded is not None and getattr(loaded, "__path__", None):
        return [str(Path(path).parent) for path in loaded.__path__]
    if scope.folder and _module_in_folder(top, scope.folder, top):
        return [scope.folder]
    if loaded is not None and getattr(loaded, "__file__", None):
        return [str(Path(str(loaded.__file__)).parent)]
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    places = list(spec.submodule_search_locations or []) or [spec.origin or ""]
    return [str(Path(path).parent) for path in places if path]


def _locate(name: str, scope: _Scope) -> list[_Module]:
    """Return a module after the packages that it lies in; an empty list where it does not exist."""
    parts = name.split(".")
    folders, modules = _top_folders(parts[0], scope), list[_Module]()
    for depth, part in enumerate(parts, 1):
        name_here = ".".join(parts[:depth])
        candidates = (_module_in_folder(name_here, folder, part) for folder in folders)
        module = next(filter(None, candidates), None)
        if module is None:
            return modules
        modules.append(module)
        folders = [os.path.join(folder, part) for folder in folders] if module.is_package else []  # noqa: PTH118
    return modules


def _imported_modules(
    reference: ImportReference, importer: _Module, scope: _Scope
) -> Iterator[_Module]:
    """Yield the modules that one import loads.

    They are the packages on the way, the module, and the names imported from it that are modules.
    """
    base = reference.module
    if reference.level:
        if not importer.package:
            return
        parts = importer.package.split(".")
        parents = parts[: len(parts) - reference.level + 1]
        base = ".".join([*parents, *([base] if base else [])])
    for current in current_modules(base) if base and scope.follows(base) else ():
        yield from _modules_of_import(current, reference, scope)


def _modules_of_import(base: str, reference: ImportReference, scope: _Scope) -> Iterator[_Module]:
    """Yield what an import of a module, by its current name, loads.

    The rooms that read old names are left out: names are current before anything has a key, and
    those rooms go with the last old name.
    """
    if f"{base}.".startswith(_OLD_NAMES):
        return
    located = _locate(base, scope)
    exists = bool(located) and located[-1].name == base
    submodules: list[_Module] = []
    if exists and located[-1].is_package:
        names = [f"{base}.{name}" for name in reference.names if name != "*"]
        paths = [_locate(part, scope) for name in names for part in current_modules(name)]
        submodules = [path[-1] for path in paths if path and path[-1].name != base]
    # some name is no submodule: the package itself defines it
    needs_base = exists and len(submodules) < max(1, len(reference.names))
    for module in (*located, *submodules):
        is_needed_base = needs_base and bool(reference.names) and module.name == base
        if not _is_name_table(module) or is_needed_base:
            yield module


class _NamedFile(NamedTuple):
    name: str  # without this machine's folders
    path: str


def _data_files(source: ParsedFile, module: _Module) -> Iterator[_NamedFile]:
    """Yield the files that a module names.

    They lie beside it, or among lm-eval's tasks where it is a task of ours.
    """
    folders = [_NamedFile(module.package.replace(".", "/"), str(Path(module.file).parent))]
    if module.name.startswith("suites.") and any(text.endswith(".yaml") for text in source.texts):
        folders += [
            _NamedFile("lm_eval/tasks", f"{folder}/lm_eval/tasks")
            for folder in _top_folders("lm_eval", _Scope())
        ]
    for text in source.texts:
        for folder in folders:
            path = f"{folder.path}/{text}"
            if not text.endswith(".py") and os.path.isfile(path):  # noqa: PTH113
                yield _NamedFile(f"{folder.name}/{text}" if folder.name else text, path)


def _package_files(package: _Module, scope: _Scope, *, code: bool) -> Iterator[_NamedFile]:
    """Yield every module of a package (`code`), or every other file in it."""
    if package.file:
        folders = [Path(package.file).parent]
    else:
        folders = [Path(path) / package.name for path in _top_folders(package.name, scope)]
    for folder in folders:
        paths = (path for path in folder.rglob("*") if path.is_file())
        files = sorted(path for path in paths if "__pycache__" not in path.parts)[:_MAX_FILES]
        for path in files:
            inner = path.relative_to(folder)
            is_hidden = any(part.startswith(".") for part in inner.parts)
            if (path.suffix == ".py") is code and not is_hidden:
                yield _NamedFile(f"{package.name}/{inner.as_posix()}", str(path))


class _Named(NamedTuple):
    """The modules that a file imports and the files that it names."""

    modules: list[_Module]
    files: list[_NamedFile]


# by file, digest of its code and scope
Memo = dict[tuple[str, str, _Scope], _Named]


@dataclass
class _Walk:
    """The files found so far, and the modules still to be read."""

    scope: _Scope
    memo: "Memo"
    digests: dict[str, str] = field(default_factory=dict)
    visited: set[str] = field(default_factory=set)
    waiting: list[_Module] = field(default_factory=list)

    def start(self, module: _Module, without: frozenset[str]) -> None:
        """Read a root module and everything that it imports.

        Methods named in `without` are left out of the root.
        """
        self._read(module, without)
        while self.waiting:
            self._read(self.waiting.pop(), frozenset())

    def _read(self, module: _Module, without: frozenset[str]) -> None:
        if not module.file or module.file in self.visited:
            return
        self.visited.add(module.file)
        if not module.file.endswith(".py"):
            self.digests[module.shown] = bytes_digest(module.file, *file_stamp(module.file))
            return
        self.add(read_source(module.file, *file_stamp(module.file), without), module)

    def add(self, source: ParsedFile, module: _Module) -> None:
        """Keep a module's digest and queue what it imports."""
        self.digests[module.shown] = source.digest
        named = self._named_by(source, module)
        self.waiting += [other for other in named.modules if other.file not in self.visited]
        self._add_files(named.files)
        if module.name.partition(".")[0] not in OURS and (source.imports_unknown or source.reads):
            self._add_package(source, module)

    def _add_files(self, files: Iterable[_NamedFile]) -> None:
        self.digests |= {name: bytes_digest(path, *file_stamp(path)) for name, path in files}

    def _named_by(self, source: ParsedFile, module: _Module) -> _Named:
        """Return the modules that a file imports and the files that it names, looked up once."""
        key = (module.file, source.digest, self.scope)
        if key not in self.memo:
            modules = dict.fromkeys(
                imported
                for reference in source.imports
                for imported in _imported_modules(reference, module, self.scope)
                if imported.file
            )
            self.memo[key] = _Named(list(modules), list(_data_files(source, module)))
        return self.memo[key]

    def _add_package(self, source: ParsedFile, module: _Module) -> None:
        """Count all of a package whose imports or files are known only when it runs."""
        top = next(iter(_locate(module.name, self.scope)), None)
        if top is None or not top.is_package:
            if self.scope.folder and source.imports_unknown:
                paths = sorted(Path(self.scope.folder).glob("*.py"))
                self.waiting += [_Module(path.stem, str(path), False) for path in paths]
            return
        if source.reads:
            self._add_files(_package_files(top, self.scope, code=False))
        if source.imports_unknown:
            for name, path in _package_files(top, self.scope, code=True):
                dotted = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
                self.waiting.append(_Module(dotted, path, path.endswith("/__init__.py")))


def code_digests(
    *targets: type[Any] | ModuleType | str, without: Iterable[str] = (), memo: Memo | None = None
) -> dict[str, str]:
    """Return the digest of every file behind classes or modules, by name, sorted.

    Methods named in `without` are left out of each target's own module, with what they alone
    import: what one part of a class does is then no part of the key of another. Calls that share a
    `memo` look for each file once. Raises `HarnessError` for a file that cannot be read.
    """
    memo = {} if memo is None else memo
    digests: dict[str, str] = {}
    for target in targets:
        digests |= _target_digests(target, frozenset(without), memo)
    return dict(sorted(digests.items()))


def code_digest(*targets: type[Any] | ModuleType | str) -> str:
    """Return one digest of all the code behind classes or modules."""
    return hashlib.sha256(repr(code_digests(*targets)).encode()).hexdigest()


def _target_digests(
    target: type[Any] | ModuleType | str, without: frozenset[str], memo: Memo
) -> dict[str, str]:
    if isinstance(target, str | ModuleType):
        name = target if isinstance(target, str) else target.__name__
        return _module_digests(name, getattr(target, "__file__", None), without, memo)
    digests = _class_digests(target, without, memo)
    # a method or task from another package, whose code is this one's too
    for base in target.__mro__[1:]:
        top = base.__module__.partition(".")[0]
        is_plug_in = hasattr(base, "compress") or hasattr(base, "grade")
        if is_plug_in and top not in sys.stdlib_module_names:
            digests |= _class_digests(base, without, memo)
    return digests


def _class_digests(target: type[Any], without: frozenset[str], memo: Memo) -> dict[str, str]:
    shown = f"{target.__module__}.{target.__qualname__}"
    module = sys.modules.get(target.__module__)
    file = getattr(module, "__file__", None)
    if file is None and target.__module__ == "__main__":
        return _typed_class_digests(target, shown)
    return _module_digests(target.__module__, file, without, memo, shown)


def _typed_class_digests(target: type[Any], shown: str) -> dict[str, str]:
    """Return the code of a class that was typed at a prompt, by its own text.

    Of what it imports only our packages are known.
    """
    try:
        text = inspect.getsource(target)
    except (OSError, TypeError) as problem:
        raise _missing_code(shown) from problem
    walk = _Walk(_Scope(), {})
    source = parse_source(inspect.cleandoc(text), shown, frozenset())
    walk.add(source, _Module(shown, "", False))
    walk.digests = {shown: source.digest}
    while walk.waiting:
        walk.start(walk.waiting.pop(), frozenset())
    return walk.digests


def _module_digests(
    name: str, file: str | None, without: frozenset[str], memo: Memo, shown: str = ""
) -> dict[str, str]:
    top = name.partition(".")[0]
    scope = _Scope() if top in OURS else _scope_of(name, file)
    located = _locate(name, scope) if name != "__main__" else []
    if not located or located[-1].name != name:  # a module that was loaded by its path
        if file is None or not Path(file).is_file():
            raise _missing_code(shown or name)
        located = [_Module(name, file, Path(file).name == "__init__.py")]
    walk = _Walk(scope, memo)
    for module in reversed(located):
        if not _is_name_table(module) or module.name == name:
            walk.start(module, without if module.name == name else frozenset())
    if not walk.digests:
        raise _missing_code(shown or name)
    return walk.digests


def _missing_code(shown: str) -> HarnessError:
    return HarnessError(
        f"the code of {shown} cannot be found, so nothing that it makes has a key; put it into a "
        ".py file of a package"
    )


def _scope_of(name: str, file: str | None) -> _Scope:
    """Return what is followed from a module of another package.

    It is its distribution, or its folder where that is no site-packages.
    """
    top, folder = name.partition(".")[0], ""
    if file is not None:
        depth = name.count(".") + (Path(file).name == "__init__.py") if name != "__main__" else 0
        folder = str(Path(file).resolve().parents[depth])
    else:
        folder = next(iter(_top_folders(top, _Scope())), "")
    return (
        _Scope(_distribution_of(top)) if _is_library(folder) else _Scope(frozenset({top}), folder)
    )


def _is_library(folder: str) -> bool:
    library_folders = {str(Path(path).resolve()) for path in sysconfig.get_paths().values()}
    return (
        not folder
        or folder in library_folders
        or Path(folder).name in ("site-packages", "dist-packages")
    )


@lru_cache(maxsize=8)
def _installed(path: tuple[str, ...]) -> dict[str, list[str]]:
    return dict(metadata.packages_distributions())


def _distribution_of(top: str) -> frozenset[str]:
    """Return the names that a top-level module's distribution installs, itself among them."""
    distributions_by_name = _installed(tuple(sys.path))
    distributions = set(distributions_by_name.get(top, ()))
    return frozenset(
        {
            top,
            *(name for name, homes in distributions_by_name.items() if distributions & set(homes)),
        }
        - set(OURS)
    )


def own_code_digest(module: str) -> dict[str, str]:
    """Return the digest of one module's own file, by name, without what it imports."""
    modules = _locate(module, _Scope())
    if not modules or modules[-1].name != module:
        raise _missing_code(module)
    file = modules[-1].file
    return {modules[-1].shown: read_source(file, *file_stamp(file), frozenset()).digest}
