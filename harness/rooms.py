"""Which modules of the harness a method may use: contracts, data, models and generation.

It may not use what runs and reports methods. Our own methods are held to it by import-linter. One
of another package is checked when it is loaded, by its source and that of its own package,
including imports inside functions.
"""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from harness.errors import HarnessError
from harness.renames.modules import current_modules

FORBIDDEN_MODULES = tuple(
    f"harness.{name}"
    for name in (
        "cli",
        "api",
        "testing",
        "checking",
        "running",
        "estimating",
        "catalog",
        "planning",
        "gate",
        "reporting",
        "measuring",
        "analysis",
        "records",
        "scoring.score",
        "scoring.items",
        "scoring.outcomes",
        "scoring.lm_eval_model",
        "scoring.request_tokens",
        "scoring.cached_backend",
        "scoring.transformers_backend",
        "scoring.fidelity",
        "scoring.vllm_backend",
        "scoring.answer_cache",
    )
)
OWN_PACKAGES = ("harness", "methods", "suites")


def refuse_forbidden_imports(name: str, module: str) -> None:
    """Raise `HarnessError` where a method's module imports what it may not.

    The modules of its own package that it imports are checked too.
    """
    top = module.partition(".")[0]
    if top in OWN_PACKAGES:
        return
    visited, waiting = {module}, [module]
    while waiting:
        importer = waiting.pop()
        names = [new for name in _imported_modules(importer) for new in current_modules(name)]
        for imported in names:
            room = _forbidden_room(imported)
            if room:
                raise HarnessError(
                    f"method {name!r}: {importer} imports {room}, which runs and reports methods; "
                    "a method may use harness.contract, harness.data, harness.models and "
                    "harness.scoring.generation (docs/add-a-method.md), not "
                    f"{', '.join(FORBIDDEN_MODULES)}"
                )
            if imported.partition(".")[0] == top and imported not in visited:
                visited.add(imported)
                waiting.append(imported)


def _forbidden_room(module: str) -> str:
    """Return the forbidden module that a module is, or lies in; "" where it is allowed."""
    rooms = (room for room in FORBIDDEN_MODULES if f"{module}.".startswith(f"{room}."))
    return next(rooms, "")


def _imported_modules(module: str) -> Iterator[str]:
    """Yield the modules that a module imports anywhere, except for type checkers only.

    Names that are imported from a module count as modules.
    """
    try:
        spec = importlib.util.find_spec(module)
        tree = (
            ast.parse(Path(spec.origin).read_bytes())
            if spec and spec.origin and spec.origin.endswith(".py")
            else ast.Module([], [])
        )
    except (ImportError, OSError, ValueError, SyntaxError):
        return
    package = module if spec and spec.submodule_search_locations else module.rpartition(".")[0]
    for node in _runtime_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def _runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes below one, but for what stands under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for statement in child.orelse:
                yield statement
                yield from _runtime_nodes(statement)
            continue
        yield child
        yield from _runtime_nodes(child)
