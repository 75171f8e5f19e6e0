"""Draws the rooms and their imports, and a table of rooms, into docs/architecture.md.

Type: python docs/draw.py.

Everything is read from the source with `ast`, nothing is imported; a test compares the page with
what this writes.
"""

import ast
import tomllib
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
TOPS = ("harness", "methods", "suites")
BEGIN, END = "<!-- drawn by docs/draw.py: {} -->", "<!-- end -->"


def module_of(path: Path) -> str:
    """Return the dotted name of a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """Return the room of a module: `gate` of `harness.gate.check`, `methods` of any method."""
    top, _, rest = module.partition(".")
    return rest.partition(".")[0] or "harness" if top == "harness" else top


def files() -> dict[str, Path]:
    """Return every module with its file."""
    return {module_of(path): path for top in TOPS for path in sorted((ROOT / top).rglob("*.py"))}


def annotations_only(node: ast.AST) -> bool:
    """Tell whether a statement is the `if TYPE_CHECKING:` of a module."""
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def imported(path: Path) -> list[tuple[str, bool]]:
    """Return the names that a file imports, and whether it imports them at once.

    Imports inside a function come later.
    """
    imports: list[tuple[str, bool]] = []

    def walk(node: ast.AST, at_once: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if annotations_only(child):
                continue
            if isinstance(child, ast.Import):
                imports.extend((alias.name, at_once) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                imports.extend((f"{child.module}.{alias.name}", at_once) for alias in child.names)
            walk(child, at_once and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))

    walk(ast.parse(path.read_text(encoding="utf-8")), True)
    return imports


def edges() -> dict[str, set[str]]:
    """Return which rooms each room imports."""
    rooms_by_room: dict[str, set[str]] = defaultdict(set)
    for module, path in files().items():
        for name, _ in imported(path):
            if (
                name.partition(".")[0] in TOPS
                and room_of(name) != room_of(module)
                and module != "harness"
            ):
                rooms_by_room[room_of(module)].add(room_of(name))
    return rooms_by_room


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Leave out arrows that others imply: what an imported room imports is reached anyway."""

    def reach(room: str) -> set[str]:
        reached: set[str] = set()
        waiting = list(graph.get(room, ()))
        while waiting:
            name = waiting.pop()
            if name not in reached:
                reached.add(name)
                waiting += graph.get(name, ())
        return reached

    beyond = {room: reach(room) for room in graph}
    return {
        room: {
            other
            for other in others
            if not any(other in beyond.get(third, ()) for third in others - {other})
        }
        for room, others in graph.items()
    }


def layers() -> list[list[str]]:
    """Return the rooms of the harness from top to bottom, as the import rules name them."""
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "importlinter"
    ]["contracts"]
    room_lines = next(rule["layers"] for rule in rules if "containers" in rule)
    return [layer.replace("|", " ").replace(":", " ").split() for layer in room_lines]


def picture() -> str:
    """Return the rooms as a Mermaid graph, a row a layer; arrows go to what is imported."""
    graph = edges()
    lines = ["```mermaid", "flowchart TD"]
    for number, layer in enumerate(layers(), 1):
        lines.append(f'    subgraph L{number}[" "]')
        lines += [f"        {room}" for room in layer]
        lines.append("    end")
    lines += ["    methods([methods])", "    suites([suites])"]
    for room, others in sorted(reduced(graph).items()):
        lines += [f"    {room} --> {other}" for other in sorted(others)]
    return "\n".join([*lines, "```"])


def torch_in(modules: list[Path]) -> str:
    """Say when a room imports torch: never, inside functions, or when a module is imported."""
    eager = sorted(
        path.stem
        for path in modules
        if any(name.split(".")[0] == "torch" and at_once for name, at_once in imported(path))
    )
    if eager:
        return (
            "at import: " + ", ".join(eager)
            if len(eager) < 4
            else f"at import: {len(eager)} modules"
        )
    lazy = any(name.split(".")[0] == "torch" for path in modules for name, _ in imported(path))
    return "inside functions" if lazy else "never"


def rooms() -> str:
    """Return a line a room: what it is for, how many modules it has, and when it imports torch."""
    lines = ["| room | what it is for | modules | torch |", "|:--|:--|--:|:--|"]
    modules_by_name = files()
    packages = [f"harness.{room}" for layer in layers() for room in layer]
    packages += sorted(
        name
        for name, path in modules_by_name.items()
        if path.name == "__init__.py" and not name.startswith("harness")
    )
    for package in packages:
        is_top = package in TOPS
        inside = [
            path
            for name, path in modules_by_name.items()
            if (name == package or name.startswith(f"{package}."))
            and (not is_top or path.parent == ROOT / package)
        ]
        doc = (
            ast.get_docstring(ast.parse(modules_by_name[package].read_text(encoding="utf-8"))) or ""
        )
        first = (
            " ".join(doc.partition("\n\n")[0].split())
            .partition(". ")[0]
            .rstrip(".")
            .replace("|", "\\|")
        )
        modules = len([path for path in inside if not path.stem.startswith("__")]) or 1
        lines.append(
            f"| `{package.replace('.', '/')}` | {first} | {modules} | {torch_in(inside)} |"
        )
    return "\n".join(lines)


def filled(page: str) -> str:
    """Return the page with its generated parts replaced."""
    for name, text in (("picture", picture()), ("rooms", rooms())):
        head, begin, rest = page.partition(BEGIN.format(name))
        if not begin:
            raise SystemExit(f"docs/architecture.md has no line {BEGIN.format(name)}")
        page = f"{head}{begin}\n\n{text}\n\n{END}{rest.partition(END)[2]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
