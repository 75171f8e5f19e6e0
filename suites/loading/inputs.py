"""Everything that a task of the user's reads, found without running it: YAML, code, data, and the
files that its code names.

Code may read what no reader of it can know: a path that is put together while it runs, an address,
the environment. That is said, and then nothing of the task is kept from run to run.
"""

import ast
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from harness.files.untrusted import read_text_file
from suites.loading.definition import TaskDefinition, files_below, strings_in

# Calls that read something: the last part of their name. A method of a path reads what the path
# names.
_READING_CALLS = frozenset(
    {
        "open",
        "read_text",
        "read_bytes",
        "load_dataset",
        "load_from_disk",
        "read_csv",
        "read_json",
        "read_parquet",
        "read_table",
        "loadtxt",
        "genfromtxt",
        "from_json",
        "from_csv",
        "from_parquet",
        "from_text",
        "glob",
        "rglob",
        "iterdir",
        "listdir",
        "scandir",
        "walk",
    }
)
_UNKNOWABLE_CALLS = frozenset(
    {
        "urlopen",
        "urlretrieve",
        "getenv",
        "environ",
        "hf_hub_download",
        "snapshot_download",
        "check_output",
        "Popen",
        "now",
        "today",
        "urandom",
    }
)
_NETWORK_MODULES = frozenset({"requests", "httpx", "urllib", "subprocess", "socket", "boto3"})
_MAX_FILES = 100_000  # files of a folder that are looked at


@dataclass(frozen=True)
class TaskInputs:
    """The files behind a task, and why something else may be read; "" where nothing is."""

    files: tuple[Path, ...]
    unknown: str


def find_inputs(leaf: TaskDefinition) -> TaskInputs:
    """Return everything that a task reads, as far as its files say."""
    definition = definition_files(leaf.path)
    settings = leaf.settings()
    stated = {
        str(one) for one in strings_in([settings.get("dataset_kwargs"), settings.get("metadata")])
    }
    handed = {file for name in sorted(stated) for file in _files_named(name, leaf.path.parent)}
    files, unknown = set(leaf.data_files()) | handed, ""
    # its function is handed paths by name
    given = bool(handed) and settings.get("custom_dataset") is not None
    for code in sorted(one for one in definition if one.suffix == ".py"):
        found = _inputs_of_code(code, code.stat().st_mtime_ns, given)
        files.update(found.files)
        unknown = unknown or found.unknown
    return TaskInputs(tuple(sorted(definition)) + tuple(sorted(files - definition)), unknown)


def definition_files(path: Path) -> set[Path]:
    """Return a YAML file, those it includes, the Python files whose functions it names and every
    module these import from beside them.
    """
    return _collect_definition(path.resolve(), set())


def _collect_definition(path: Path, seen: set[Path]) -> set[Path]:
    if path in seen:
        return seen
    seen.add(path)
    text = read_text_file(path)
    for module in re.findall(r"!function\s+([\w.]+)\.\w+", text):
        code = path.parent / f"{module.replace('.', '/')}.py"
        if code.is_file():
            _collect_imports(code.resolve(), path.parent, seen)
    for name in strings_in(_yaml_without_tags(text).get("include")):
        _collect_definition((path.parent / name).resolve(), seen)
    return seen


def _collect_imports(code: Path, root: Path, seen: set[Path]) -> None:
    """Add a module and what it imports from its own folder, or from the folder of the YAML."""
    if code in seen:
        return
    seen.add(code)
    for module in _imported_modules(code):
        for place in dict.fromkeys((code.parent, root, *code.parents[1:3])):
            found = place / module
            for file in (found.with_suffix(".py"), found / "__init__.py"):
                if file.is_file():
                    _collect_imports(file.resolve(), root, seen)


def _imported_modules(code: Path) -> Iterator[str]:
    """Yield the paths of modules that a file imports, `a.b` as a/b and each of its packages;
    relative ones from where they lead.
    """
    for node in ast.walk(_parse(code)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up, base = "../" * max(0, node.level - 1), (node.module or "").replace(".", "/")
            names = [
                f"{up}{base}",
                *(
                    f"{up}{base}/{alias.name}".lstrip("/") if base or up else alias.name
                    for alias in node.names
                ),
            ]
        for name in names:
            parts = name.split("/") if "/" in name else name.split(".")
            yield from (
                "/".join(parts[:count])
                for count in range(1, len(parts) + 1)
                if "/".join(parts[:count]).strip("./")
            )


def _parse(code: Path) -> ast.Module:
    try:
        return ast.parse(code.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return ast.Module(body=[], type_ignores=[])  # building the task says so


def _yaml_without_tags(text: str) -> dict[str, Any]:
    """Parse YAML text with tags such as `!function` ignored and nothing included."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml is untyped here
        pass

    Loader.add_multi_constructor("!", lambda loader, tag, node: None)
    return dict(yaml.load(text, Loader=Loader))  # a SafeLoader


def _files_named(text: str, folder: Path) -> set[Path]:
    """Return the files that a text names: a file or a folder, from `folder` or from the root."""
    if not text.strip("./ ") or len(text) > 300 or "\n" in text or "\0" in text:
        return set()
    place = folder / text
    try:
        if not place.exists():
            return (
                {one for one in folder.glob(text) if one.is_file()}
                if any(sign in text for sign in "*?") and not place.is_absolute()
                else set()
            )
        return set(files_below(place)[:_MAX_FILES]) if place.resolve() != Path("/") else set()
    except (OSError, ValueError):
        return set()


@lru_cache(maxsize=256)
def _inputs_of_code(code: Path, changed: int, given: bool) -> TaskInputs:
    """Return the files that a module's calls read; `given`: its caller hands it files by name."""
    tree = _parse(code)
    values = dict(_assigned_values(tree))
    files: set[Path] = set()
    for node in ast.walk(tree):  # texts that name a file are inputs wherever they stand
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            files |= {
                one
                for one in _files_named(node.value, code.parent)
                if one.is_file() and (code.parent / node.value).is_file()
            }
    for node in ast.walk(tree):
        name = _last_name(node)
        if name in _UNKNOWABLE_CALLS or _root_name(node) in _NETWORK_MODULES:
            return TaskInputs(
                tuple(files),
                f"{code.name}, line {getattr(node, 'lineno', 0)}, reads {ast.unparse(node)[:60]}",
            )
        if isinstance(node, ast.Call) and name in _READING_CALLS:
            texts = set(_texts_in_call(node, values, 0))
            found = {
                file
                for text in texts
                for file in _files_named(text, code.parent) or _files_named(text, Path.cwd())
            }
            files |= found
            if not found and not given and not _names_hub_dataset(name, texts):
                told = " ".join(ast.unparse(node).split())[:60]
                return TaskInputs(
                    tuple(files),
                    f"{code.name}, line {node.lineno}, reads what only running it tells ({told})",
                )
    return TaskInputs(tuple(files), "")


def _assigned_values(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Yield the names of a module with what they are set to, loop over or are opened as."""
    for node in ast.walk(tree):
        pairs: list[tuple[ast.expr | None, ast.expr | None]] = []
        if isinstance(node, ast.Assign):
            pairs = [(target, node.value) for target in node.targets]
        elif isinstance(node, ast.AnnAssign):
            pairs = [(node.target, node.value)]
        elif isinstance(node, (ast.For, ast.comprehension)):
            pairs = [(node.target, node.iter)]
        elif isinstance(node, ast.withitem):
            pairs = [(node.optional_vars, node.context_expr)]
        yield from (
            (target.id, value)
            for target, value in pairs
            if isinstance(target, ast.Name) and value is not None
        )


def _names_hub_dataset(name: str, texts: set[str]) -> bool:
    """Tell whether a call loads a data set of the Hub by its name: known as far as any task's of
    the Hub.
    """
    return name == "load_dataset" and any(
        re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) for text in texts
    )


def _last_name(node: ast.AST) -> str:
    called = node.func if isinstance(node, ast.Call) else node
    return (
        called.attr
        if isinstance(called, ast.Attribute)
        else called.id
        if isinstance(called, ast.Name)
        else ""
    )


def _root_name(node: ast.AST) -> str:
    """Return the first name of a call such as `requests.get(...)`."""
    if not isinstance(node, ast.Call):
        return ""
    part: ast.AST = node.func
    while isinstance(part, ast.Attribute):
        part = part.value
    return part.id if isinstance(part, ast.Name) and isinstance(node.func, ast.Attribute) else ""


def _texts_in_call(node: ast.AST, values: Mapping[str, ast.expr], depth: int) -> Iterator[str]:
    """Yield the texts in a call, names followed to what they were set to."""
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value
        elif isinstance(part, ast.Name) and part.id in values and depth < 4:
            yield from _texts_in_call(values[part.id], values, depth + 1)


def definition_digest(leaf: TaskDefinition, inputs: TaskInputs) -> str:
    """Return the digest of all that defines a task of the user's: YAML, code and data, wherever the
    folder stands.
    """
    changes = {key: value for key, value in leaf.changes.items() if not callable(value)}
    root = leaf.path.resolve().parent
    parts = [
        (
            str(file.relative_to(root)) if root in file.parents else file.name,
            _file_digest(file, *_size_and_time(file)),
        )
        for file in inputs.files
    ]
    return hashlib.sha256(
        repr((parts, sorted(changes.items(), key=lambda pair: pair[0]))).encode()
    ).hexdigest()


def _size_and_time(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=4096)
def _file_digest(file: Path, size: int, changed: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
