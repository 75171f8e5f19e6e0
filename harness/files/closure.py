"""The code behind a class or module: a digest of each file that it is made of, by what it imports.
No torch, nothing is run.

A key that holds these digests changes with every line of code that can change a number, and with no
other. Files are read with `ast`: imports count wherever they stand, in functions too; those under
`if TYPE_CHECKING:` do not, since nothing runs them. Comments, docstrings, blank lines and the
places of things do not count. Imports are followed inside `harness`, `methods` and `suites`, and
inside the distribution (or, outside of site-packages, the folder) of a class from elsewhere.
Libraries are not followed. An `__init__.py` on the way counts, but for those of our own packages:
they hold tables of names, and what a name leads to is in the key that asks for it.

What cannot be followed counts whole: where a class from elsewhere imports by a name that only
running it tells, every module of its package counts, and where it reads files, every file of the
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
from typing import Any

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
        """Return its file by its package's name, never by this machine's folders."""
        tail = f"/__init__{Path(self.file).suffix}" if self.is_package else Path(self.file).suffix
        return f"{self.name.replace('.', '/')}{tail}"


@dataclass(frozen=True)
class _Scope:
    """What is followed beside our packages: the names of a distribution, and a folder whose modules
    stand beside the class.
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


def _is_name_table(place: _Module) -> bool:
    """Tell whether a file is the `__init__` of a package of ours: it holds names, and what they
    lead to counts by itself.
    """
    return place.is_package and place.name.partition(".")[0] in OURS


def _module_in_folder(name: str, folder: str, part: str) -> _Module | None:
    """Return the module of a name in one folder, None where it is not there."""
    base = os.path.join(folder, part)  # noqa: PTH118  paths of a thousand imports, ten times as quick as Path
    if os.path.isfile(f"{base}/__init__.py"):  # noqa: PTH113
        return _Module(name, f"{base}/__init__.py", True)
    if os.path.isfile(f"{base}.py"):  # noqa: PTH113
        return _Module(name, f"{base}.py", False)
    if os.path.isdir(folder):  # noqa: PTH112
        binary = next(
            (one for one in sorted(Path(folder).glob(f"{part}.*")) if one.suffix in _BINARIES), None
        )
        if binary is not None:
            return _Module(name, str(binary), False)
    return _Module(name, "", True) if os.path.isdir(base) else None  # noqa: PTH112


def _top_folders(top: str, scope: _Scope) -> list[str]:
    """Return the folders in which a top-level module or package lies; nothing is imported
    for it.
    """
    loaded = sys.modules.get(top)
    if loaded is not None and getattr(loaded, "__path__", None):
        return [str(Path(one).parent) for one in loaded.__path__]
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
    return [str(Path(one).parent) for one in places if one]


def _locate(name: str, scope: _Scope) -> list[_Module]:
    """Return a module behind the packages that it lies in, each with its file; nothing where it
    does not exist.
    """
    parts = name.split(".")
    folders, found = _top_folders(parts[0], scope), list[_Module]()
    for at, part in enumerate(parts):
        place = next(
            (
                one
                for folder in folders
                if (one := _module_in_folder(".".join(parts[: at + 1]), folder, part))
            ),
            None,
        )
        if place is None:
            return found
        found.append(place)
        folders = [os.path.join(folder, part) for folder in folders] if place.is_package else []  # noqa: PTH118
    return found


def _imported_modules(
    reference: ImportReference, place: _Module, scope: _Scope
) -> Iterator[_Module]:
    """Yield the modules that one import loads: the packages on the way, the module, and what is
    taken from it where that is one.
    """
    base = reference.module
    if reference.level:
        if not place.package:
            return
        parts = place.package.split(".")
        kept = parts[: len(parts) - reference.level + 1]
        base = ".".join([*kept, *([base] if base else [])])
    for current in current_modules(base) if base and scope.follows(base) else ():
        yield from _modules_of_import(current, reference, scope)


def _modules_of_import(base: str, reference: ImportReference, scope: _Scope) -> Iterator[_Module]:
    """Yield what an import of a module, by the name that it has now, loads.

    What reads old names is left out: names are those of today before anything has a key, and it
    goes with the last old name.
    """
    if f"{base}.".startswith(_OLD_NAMES):
        return
    located = _locate(base, scope)
    whole = bool(located) and located[-1].name == base
    named = [
        part
        for name in reference.names
        if name != "*"
        for part in current_modules(f"{base}.{name}")
    ]
    inner = [_locate(name, scope) for name in named] if whole and located[-1].is_package else []
    submodules = [found[-1] for found in inner if found and found[-1].name != base]
    # something of the module itself
    taken = whole and len(submodules) < max(1, len(reference.names))
    for one in (*located, *submodules):
        if not _is_name_table(one) or (taken and reference.names and one.name == base):
            yield one


def _data_files(source: ParsedFile, place: _Module) -> Iterator[tuple[str, str]]:
    """Yield (name, path) of files that a module names and that lie beside it, or among lm-eval's
    tasks where it is a task of ours.
    """
    folders = [(str(Path(place.file).parent), place.package.replace(".", "/"))]
    if place.name.startswith("suites.") and any(one.endswith(".yaml") for one in source.texts):
        folders += [
            (f"{folder}/lm_eval/tasks", "lm_eval/tasks")
            for folder in _top_folders("lm_eval", _Scope())
        ]
    for text in source.texts:
        for folder, shown in folders:
            path = f"{folder}/{text}"
            if not text.endswith(".py") and os.path.isfile(path):  # noqa: PTH113
                yield f"{shown}/{text}" if shown else text, path


def _package_files(package: _Module, scope: _Scope, *, code: bool) -> Iterator[tuple[str, str]]:
    """Yield (name, path) of every module of a package, or of every other file in it."""
    folders = [Path(one) / package.name for one in _top_folders(package.name, scope)]
    for folder in [Path(package.file).parent] if package.file else folders:
        files = sorted(
            one for one in folder.rglob("*") if one.is_file() and "__pycache__" not in one.parts
        )[:_MAX_FILES]
        for one in files:
            if (one.suffix == ".py") is code and not any(
                part.startswith(".") for part in one.relative_to(folder).parts
            ):
                yield f"{package.name}/{one.relative_to(folder).as_posix()}", str(one)


# what files import and name
Memo = dict[tuple[str, str, _Scope], tuple[list[_Module], list[tuple[str, str]]]]


@dataclass
class _Walk:
    """The files found so far, and what is still to be read."""

    scope: _Scope
    memo: "Memo"
    found: dict[str, str] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    waiting: list[_Module] = field(default_factory=list)

    def start(self, place: _Module, without: frozenset[str]) -> None:
        """Read a root, of which the methods named in `without` are left out, and everything that it
        leads to.
        """
        self._file(place, without)
        while self.waiting:
            self._file(self.waiting.pop(), frozenset())

    def _file(self, place: _Module, without: frozenset[str]) -> None:
        if not place.file or place.file in self.seen:
            return
        self.seen.add(place.file)
        if not place.file.endswith(".py"):
            self.found[place.shown] = bytes_digest(place.file, *file_stamp(place.file))
            return
        self.take(read_source(place.file, *file_stamp(place.file), without), place)

    def take(self, source: ParsedFile, place: _Module) -> None:
        """Keep what a module says and queue what it imports."""
        self.found[place.shown] = source.digest
        modules, files = self._named_by(source, place)
        self.waiting += [one for one in modules if one.file not in self.seen]
        self.found |= {name: bytes_digest(path, *file_stamp(path)) for name, path in files}
        if place.name.partition(".")[0] not in OURS and (source.imports_unknown or source.reads):
            self._whole(source, place)

    def _named_by(
        self, source: ParsedFile, place: _Module
    ) -> tuple[list[_Module], list[tuple[str, str]]]:
        """Return the modules that a file imports and the files that it names, looked for once."""
        key = (place.file, source.digest, self.scope)
        if key not in self.memo:
            modules = dict.fromkeys(
                one
                for reference in source.imports
                for one in _imported_modules(reference, place, self.scope)
                if one.file
            )
            self.memo[key] = list(modules), list(_data_files(source, place))
        return self.memo[key]

    def _whole(self, source: ParsedFile, place: _Module) -> None:
        """Count all of a package of which only running it tells what it imports or reads."""
        top = next(iter(_locate(place.name, self.scope)), None)
        if top is None or not top.is_package:
            beside = (
                sorted(Path(self.scope.folder).glob("*.py"))
                if self.scope.folder and source.imports_unknown
                else ()
            )
            self.waiting += [_Module(one.stem, str(one), False) for one in beside]
            return
        if source.reads:
            self.found |= {
                name: bytes_digest(path, *file_stamp(path))
                for name, path in _package_files(top, self.scope, code=False)
            }
        for name, path in (
            _package_files(top, self.scope, code=True) if source.imports_unknown else ()
        ):
            module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            self.waiting.append(_Module(module, path, path.endswith("/__init__.py")))


def code_digests(
    *targets: type[Any] | ModuleType | str, without: Iterable[str] = (), memo: Memo | None = None
) -> dict[str, str]:
    """Return the digest of every file behind classes or modules, by name, sorted. Raises
    `HarnessError` for one that cannot be read.

    Methods named in `without` are left out of each target's own module, with what they alone
    import: what one part of a class does is then no part of the key of another. A `memo` that calls
    share spares them looking for the same files again.
    """
    memo = {} if memo is None else memo
    found: dict[str, str] = {}
    for target in targets:
        found |= _target_digests(target, frozenset(without), memo)
    return dict(sorted(found.items()))


def code_digest(*targets: type[Any] | ModuleType | str) -> str:
    """Return one digest of all the code behind classes or modules."""
    return hashlib.sha256(repr(code_digests(*targets)).encode()).hexdigest()


def _target_digests(
    target: type[Any] | ModuleType | str, without: frozenset[str], memo: Memo
) -> dict[str, str]:
    if isinstance(target, str | ModuleType):
        name = target if isinstance(target, str) else target.__name__
        return _module_digests(name, getattr(target, "__file__", None), without, memo)
    found = _class_digests(target, without, memo)
    # a method or task from another package, whose code is this one's too
    for base in target.__mro__[1:]:
        top = base.__module__.partition(".")[0]
        if (
            hasattr(base, "compress") or hasattr(base, "grade")
        ) and top not in sys.stdlib_module_names:
            found |= _class_digests(base, without, memo)
    return found


def _class_digests(target: type[Any], without: frozenset[str], memo: Memo) -> dict[str, str]:
    shown = f"{target.__module__}.{target.__qualname__}"
    module = sys.modules.get(target.__module__)
    file = getattr(module, "__file__", None)
    if file is None and target.__module__ == "__main__":
        return _typed_class_digests(target, shown)
    return _module_digests(target.__module__, file, without, memo, shown)


def _typed_class_digests(target: type[Any], shown: str) -> dict[str, str]:
    """Return the code of a class that was typed, by its own text; what it imports beside our
    packages is not known.
    """
    try:
        text = inspect.getsource(target)
    except (OSError, TypeError) as problem:
        raise _missing_code(shown) from problem
    walk = _Walk(_Scope(), {})
    walk.take(parse_source(inspect.cleandoc(text), shown, frozenset()), _Module(shown, "", False))
    walk.found = {shown: next(iter(walk.found.values()))}
    while walk.waiting:
        walk.start(walk.waiting.pop(), frozenset())
    return walk.found


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
    for place in reversed(located):
        if not _is_name_table(place) or place.name == name:
            walk.start(place, without if place.name == name else frozenset())
    if not walk.found:
        raise _missing_code(shown or name)
    return walk.found


def _missing_code(shown: str) -> HarnessError:
    return HarnessError(
        f"the code of {shown} cannot be found, so nothing that it makes has a key; put it into a "
        ".py file of a package"
    )


def _scope_of(name: str, file: str | None) -> _Scope:
    """Return what is followed from a module of another package: its distribution, and its folder
    where that is no site-packages.
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
    known = {str(Path(one).resolve()) for one in sysconfig.get_paths().values()}
    return not folder or folder in known or Path(folder).name in ("site-packages", "dist-packages")


@lru_cache(maxsize=8)
def _installed(path: tuple[str, ...]) -> dict[str, list[str]]:
    return dict(metadata.packages_distributions())


def _distribution_of(top: str) -> frozenset[str]:
    """Return the names that a top-level module's distribution installs, itself among them."""
    by_name = _installed(tuple(sys.path))
    own = set(by_name.get(top, ()))
    return frozenset(
        {top, *(name for name, homes in by_name.items() if own & set(homes))} - set(OURS)
    )


def own_code_digest(module: str) -> dict[str, str]:
    """Return the digest of one module's own file, without what it imports."""
    located = _locate(module, _Scope())
    if not located or located[-1].name != module:
        raise _missing_code(module)
    return {
        located[-1].shown: read_source(
            located[-1].file, *file_stamp(located[-1].file), frozenset()
        ).digest
    }
