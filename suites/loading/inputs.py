"""All files that a user's task reads, found without running it: YAML, code, data, named files.

Code may read what its text does not show: a path that is put together while it runs, an address,
the environment. Then `TaskInputs.unknown` says so, and no result of the task is reused.
"""

import ast
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from harness.files.untrusted import read_text_file
from suites.loading.definition import TaskDefinition, files_below, strings_in

# Calls that read something, by the last part of their name. A method of a path reads the file that
# the path names.
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
_MAX_FILES = 100_000  # of a folder


@dataclass(frozen=True)
class TaskInputs:
    """The files that a task reads, and why it may read something else; "" where it cannot."""

    files: tuple[Path, ...]
    unknown: str


def find_inputs(task: TaskDefinition) -> TaskInputs:
    """Return all files that a task reads, as far as its files say."""
    definition = definition_files(task.path)
    settings = task.settings()
    names = {
        str(name) for name in strings_in([settings.get("dataset_kwargs"), settings.get("metadata")])
    }
    named = {file for name in sorted(names) for file in _files_named(name, task.path.parent)}
    files, unknown = set(task.data_files()) | named, ""
    # a function that makes the data set gets these names as arguments
    gets_names = bool(named) and settings.get("custom_dataset") is not None
    for code in sorted(file for file in definition if file.suffix == ".py"):
        inputs = _inputs_of_code(code, code.stat().st_mtime_ns, gets_names)
        files.update(inputs.files)
        unknown = unknown or inputs.unknown
    return TaskInputs(tuple(sorted(definition)) + tuple(sorted(files - definition)), unknown)


def definition_files(path: Path) -> set[Path]:
    """Return a YAML file, the YAML files it includes, and the Python files that they use.

    Those are the modules whose functions are named, and what these import from their own folder.
    """
    return _collect_definition(path.resolve(), set())


def _collect_definition(path: Path, files: set[Path]) -> set[Path]:
    """Add a YAML file and what it refers to, also through other files."""
    if path in files:
        return files
    files.add(path)
    text = read_text_file(path)
    for module in re.findall(r"!function\s+([\w.]+)\.\w+", text):
        code = path.parent / f"{module.replace('.', '/')}.py"
        if code.is_file():
            _collect_imports(code.resolve(), path.parent, files)
    for name in strings_in(_yaml_without_tags(text).get("include")):
        _collect_definition((path.parent / name).resolve(), files)
    return files


def _collect_imports(code: Path, root: Path, files: set[Path]) -> None:
    """Add a module, and what it imports from its own folder, the YAML's, or two folders above."""
    if code in files:
        return
    files.add(code)
    for module in _imported_modules(code):
        for folder in dict.fromkeys((code.parent, root, *code.parents[1:3])):
            path = folder / module
            for file in (path.with_suffix(".py"), path / "__init__.py"):
                if file.is_file():
                    _collect_imports(file.resolve(), root, files)


def _imported_modules(code: Path) -> Iterator[str]:
    """Yield the modules that a file imports as paths: for `a.b` both a and a/b.

    Paths of relative imports begin with `../` for every level above the file's package.
    """
    for node in ast.walk(_parse(code)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            levels, base = "../" * max(0, node.level - 1), (node.module or "").replace(".", "/")
            names = [
                f"{levels}{base}",
                *(
                    f"{levels}{base}/{alias.name}".lstrip("/") if base or levels else alias.name
                    for alias in node.names
                ),
            ]
        for name in names:
            parts = name.split("/") if "/" in name else name.split(".")
            paths = ("/".join(parts[:count]) for count in range(1, len(parts) + 1))
            yield from (path for path in paths if path.strip("./"))


def _parse(code: Path) -> ast.Module:
    """Parse a Python file; one with errors counts as empty: building the task reports them."""
    try:
        return ast.parse(code.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return ast.Module(body=[], type_ignores=[])


def _yaml_without_tags(text: str) -> dict[str, Any]:
    """Parse YAML text; tags such as `!function` become None, and nothing is included."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml is untyped here
        pass

    Loader.add_multi_constructor("!", lambda loader, tag, node: None)
    return dict(yaml.load(text, Loader=Loader))  # a SafeLoader


def _files_named(text: str, folder: Path) -> set[Path]:
    """Return the files that a text names: a file, a folder or a pattern, seen from `folder`."""
    if not text.strip("./ ") or len(text) > 300 or "\n" in text or "\0" in text:
        return set()
    path = folder / text
    try:
        if not path.exists():
            return (
                {file for file in folder.glob(text) if file.is_file()}
                if any(sign in text for sign in "*?") and not path.is_absolute()
                else set()
            )
        return set(files_below(path)[:_MAX_FILES]) if path.resolve() != Path("/") else set()
    except (OSError, ValueError):
        return set()


@lru_cache(maxsize=256)
def _inputs_of_code(code: Path, changed: int, gets_names: bool) -> TaskInputs:
    """Return the files that a module names and that its calls read.

    `changed` is the file's time, for the cache. `gets_names`: the caller passes file names to
    it, so that a call without a name in the code is no unknown input.
    """
    tree = _parse(code)
    values = dict(_assigned_values(tree))
    files = _files_in_constants(tree, code.parent)
    for node in ast.walk(tree):
        name = _last_name(node)
        if name in _UNKNOWABLE_CALLS or _root_name(node) in _NETWORK_MODULES:
            return TaskInputs(
                tuple(files),
                f"{code.name}, line {getattr(node, 'lineno', 0)}, reads {ast.unparse(node)[:60]}",
            )
        if isinstance(node, ast.Call) and name in _READING_CALLS:
            texts = set(_texts_in_call(node, values, 0))
            files_read = {
                file
                for text in texts
                for file in _files_named(text, code.parent) or _files_named(text, Path.cwd())
            }
            files |= files_read
            if not files_read and not gets_names and not _names_hub_dataset(name, texts):
                call = " ".join(ast.unparse(node).split())[:60]
                return TaskInputs(
                    tuple(files),
                    f"{code.name}, line {node.lineno}, reads a file that is known only when it "
                    f"runs ({call})",
                )
    return TaskInputs(tuple(files), "")


def _files_in_constants(tree: ast.Module, folder: Path) -> set[Path]:
    """Return the files that texts of a module name, wherever they stand in it."""
    files: set[Path] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            files |= {
                file
                for file in _files_named(node.value, folder)
                if file.is_file() and (folder / node.value).is_file()
            }
    return files


def _assigned_values(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Yield the names of a module with what they are assigned, loop over, or are opened as."""
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
    """Tell whether a call loads a data set of the Hub by its name, as tasks of lm-eval do."""
    return name == "load_dataset" and any(
        re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) for text in texts
    )


def _last_name(node: ast.AST) -> str:
    """Return the last name of a call or of a dotted name; "" for anything else."""
    called = node.func if isinstance(node, ast.Call) else node
    if isinstance(called, ast.Attribute):
        return called.attr
    return called.id if isinstance(called, ast.Name) else ""


def _root_name(node: ast.AST) -> str:
    """Return the first name of a call such as `requests.get(...)`; "" for anything else."""
    if not isinstance(node, ast.Call):
        return ""
    part: ast.AST = node.func
    while isinstance(part, ast.Attribute):
        part = part.value
    return part.id if isinstance(part, ast.Name) and isinstance(node.func, ast.Attribute) else ""


def _texts_in_call(node: ast.AST, values: Mapping[str, ast.expr], depth: int) -> Iterator[str]:
    """Yield the texts in a call; names are followed to what they were assigned."""
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value
        elif isinstance(part, ast.Name) and part.id in values and depth < 4:
            yield from _texts_in_call(values[part.id], values, depth + 1)


def definition_digest(task: TaskDefinition, inputs: TaskInputs) -> str:
    """Return the digest of all files of a task and of the groups' changes.

    It is the same wherever the folder of the files is.
    """
    changes = {key: value for key, value in task.changes.items() if not callable(value)}
    root = task.path.resolve().parent
    parts = [
        (
            str(file.relative_to(root)) if root in file.parents else file.name,
            _file_digest(file, *_file_stamp(file)),
        )
        for file in inputs.files
    ]
    content = repr((parts, sorted(changes.items(), key=lambda pair: pair[0])))
    return hashlib.sha256(content.encode()).hexdigest()


class _FileStamp(NamedTuple):
    """What shows that a file changed: its size in bytes, and its time in nanoseconds."""

    size: int
    changed: int


def _file_stamp(file: Path) -> _FileStamp:
    """Return the size and the time of a file."""
    status = file.stat()
    return _FileStamp(status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _file_digest(file: Path, size: int, changed: int) -> str:
    """Return the digest of a file; size and time are for the cache."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
