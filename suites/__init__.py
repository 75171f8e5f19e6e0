"""The tables of tasks and suites: a name, and the class or the tasks behind it.

Listing them imports no code of a task.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from harness.contract import Suite, Task
from harness.errors import HarnessError, unknown
from harness.files.untrusted import Unreadable, read_toml
from harness.registry import Registry
from harness.renames.modules import by_old_name

TASKS: dict[str, str] = {
    "gsm8k": "suites.gsm8k:Gsm8k",
    "gsm8k-cot": "suites.gsm8k:Gsm8kCot",
    "mmlu": "suites.mmlu:Mmlu",
    "mmlu-cloze": "suites.mmlu:MmluCloze",
    "wikitext": "suites.wikitext:WikiText",
    "gsm8k-mini": "suites.gsm8k_mini:Gsm8kMini",
    "mmlu-mini": "suites.mmlu_mini:MmluMini",
}

SUITES: dict[str, Suite] = {
    "math": Suite(
        name="math",
        version=1,
        tasks=("gsm8k",),
        help="grade-school word problems, solved step by step",
    ),
    "knowledge": Suite(
        name="knowledge",
        version=1,
        tasks=("mmlu",),
        help="four-choice questions on what the weights know",
    ),
    "mini": Suite(
        name="mini",
        version=1,
        tasks=("gsm8k-mini", "mmlu-mini"),
        help="both generated tasks, for any model: no data needed",
    ),
    "full": Suite(
        name="full",
        version=1,
        tasks=("gsm8k", "gsm8k-cot", "mmlu", "mmlu-cloze", "wikitext"),
        help="every real task: both forms of GSM8K and MMLU, and perplexity",
    ),
}

LM_EVAL_PREFIX = "lm-eval:"  # a task of lm-eval by its own name there
_FILE_KEYS = {"name": str, "tasks": list, "measure": bool, "help": str, "include_path": str}


@cache
def tasks() -> Registry:
    """Return the tasks of `TASKS` and those of installed packages (entry points `harness.tasks`).

    Raises `HarnessError` for a task of another package that has the name of a suite.
    """
    registry = Registry.with_entry_points("task", TASKS, "harness.tasks")
    for name in registry.table:
        if name in SUITES or name.startswith(LM_EVAL_PREFIX):
            raise HarnessError(
                f"the task {name!r} of {registry.table[name]} has the name of a suite, or of a "
                "task of lm-eval; rename it in its package"
            )
    return registry


def load(
    name: str,
    *,
    include_path: str | Path | None = None,
    data_folder: str | Path | None = None,
    num_fewshot: int | None = None,
) -> Task:
    """Return the task of a name in `tasks()`, or of `lm-eval:NAME`.

    `include_path` is a folder with more YAML tasks for lm-eval; `data_folder` may hold data sets of
    the Hub below `hub/`; `num_fewshot` is how many examples are shown before an item, None for the
    definition's own number. Raises `HarnessError` for an unknown name, and for a task of lm-eval
    that this harness cannot score.
    """
    if name.startswith(LM_EVAL_PREFIX):
        from suites.loading.outside import LmEvalTask

        return LmEvalTask(name, include_path, data_folder, num_fewshot)
    if num_fewshot is not None:
        raise HarnessError(
            f"--num-fewshot {num_fewshot}: {name} has fixed examples; leave it out, or score "
            "lm-eval's own task, for example --suite lm-eval:arc_easy"
        )
    task: Task = tasks().load(name)()
    return task


def count_items(
    name: str,
    *,
    include_path: str | Path | None = None,
    data_folder: str | Path | None = None,
    num_fewshot: int | None = None,
) -> int | None:
    """Return how many items a task of lm-eval has; None where only its downloaded data show it."""
    from suites.loading.outside import LmEvalTask

    return LmEvalTask(name, include_path, data_folder, num_fewshot).count()


def fetch(
    name: str,
    folder: Path,
    *,
    include_path: str | Path | None = None,
    say: Callable[[str], None],
) -> int:
    """Copy what a task, or each task of a suite, reads from the Hub into a data folder.

    Returns how many files were written; `say` receives a line for each. Raises `HarnessError` for
    an unknown name, and where the Hub cannot be reached.
    """
    from suites.loading.fetching import fetch_task

    [suite] = resolve([name], embedded=False, include_path=include_path).values()
    return sum(
        fetch_task(load(task, include_path=include_path), folder, say=say) for task in suite.tasks
    )


def resolve(
    names: Sequence[str], *, embedded: bool, include_path: str | Path | None = None
) -> dict[str, Suite]:
    """Return the named suites by name, in an order that does not depend on how they are typed.

    The order decides the order of training rows. A name is a suite, a task, `lm-eval:NAME`, or the
    path of a suite file (.toml). For the embedded pair the suites of `SUITES` have their `-mini`
    tasks only; tasks and files of the user stay as they are. Raises `HarnessError`.
    """
    custom: dict[str, Suite] = {}
    for name in dict.fromkeys(names):
        if name in SUITES:
            continue
        suite = _suite_of_task_or_file(name, include_path)
        if suite.name in SUITES or suite.name in custom:
            raise HarnessError(
                f"{name} has the suite name {suite.name!r}, which another suite has; give it "
                "another name = ..."
            )
        custom[suite.name] = suite
    fixed = {
        name: replace(suite, tasks=_mini_tasks(suite)) if embedded else suite
        for name, suite in SUITES.items()
        if name in names
    }
    return fixed | dict(sorted(custom.items()))


def include_path_of(names: Sequence[str], include_path: str | Path | None = None) -> Path | None:
    """Return `include_path`, else the one that a suite file among `names` states, else None.

    Raises `HarnessError` where suite files state different folders.
    """
    if include_path is not None:
        return Path(include_path)
    files = [Path(name) for name in names if name.endswith(".toml")]
    folders = sorted({folder for file in files if (folder := _include_path_in_file(file))})
    if len(folders) > 1:
        raise HarnessError(
            f"the suite files state {len(folders)} different include_path folders; type one: "
            f"--include-path {folders[0]}"
        )
    return folders[0] if folders else None


def _mini_tasks(suite: Suite) -> tuple[str, ...]:
    """Return the `-mini` tasks of a suite, for the embedded pair; tasks without one are dropped."""
    forms = (task if task.endswith("-mini") else f"{task}-mini" for task in suite.tasks)
    return tuple(task for task in forms if task in TASKS)


def _suite_of_task_or_file(name: str, include_path: str | Path | None) -> Suite:
    """Return a suite that is not in `SUITES`: one task, or a file. Raises `HarnessError`."""
    if name.endswith(".toml"):
        return _suite_from_file(Path(name), include_path)
    if name in tasks() or name.startswith(LM_EVAL_PREFIX):
        _refuse_unknown_task(name, include_path)
        return Suite(name=name, version=1, tasks=(name,), help=f"the task {name} alone")
    raise unknown(
        "suite",
        name,
        [*SUITES, *tasks().table],
        hint="(or lm-eval:NAME, or the path of a suite file ending in .toml)",
    )


def _refuse_unknown_task(name: str, include_path: str | Path | None) -> None:
    """Raise `HarnessError` for a name that is no task."""
    if name.startswith(LM_EVAL_PREFIX):
        load(name, include_path=include_path)
    elif name not in tasks():
        raise unknown("task", name, tasks().table, hint="(or lm-eval:NAME)")


def _include_path_in_file(path: Path) -> Path | None:
    """Return the `include_path` of a suite file, which is relative to the file; None without it."""
    folder = _read_suite_file(path).get("include_path")
    return path.parent / folder if folder else None


def _suite_from_file(path: Path, include_path: str | Path | None) -> Suite:
    """Read a suite file; a typed `include_path` takes the place of the file's own."""
    table = _read_suite_file(path)
    folder = include_path if include_path is not None else _include_path_in_file(path)
    for task in table["tasks"]:
        _refuse_unknown_task(task, folder)
    return Suite(
        name=table["name"],
        version=1,
        tasks=tuple(table["tasks"]),
        measure=table.get("measure", True),
        help=table.get("help", ""),
    )


def _read_suite_file(path: Path) -> Mapping[str, Any]:
    """Return the entries of a suite file. Raises `HarnessError` for a wrong file or entry."""
    if not path.is_file():
        raise HarnessError(
            f"no suite file at {path}; give --suite a suite or the path of a .toml file"
        )
    try:
        table = read_toml(path)
    except Unreadable as problem:
        raise HarnessError(
            f'{problem}; write for example: name = "mine", tasks = ["gsm8k-mini"]'
        ) from problem
    for key, value in table.items():
        if key not in _FILE_KEYS:
            raise unknown(f"key in {path}:", key, _FILE_KEYS)
        if not isinstance(value, _FILE_KEYS[key]):
            raise HarnessError(
                f"{path}: {key} must be a {_FILE_KEYS[key].__name__}, given {value!r}"
            )
    if (
        not table.get("name")
        or not table.get("tasks")
        or not all(isinstance(task, str) and task for task in table["tasks"])
    ):
        raise HarnessError(
            f"{path} must state a name and a list of tasks, for example: "
            'name = "mine", tasks = ["gsm8k-mini"]'
        )
    return table


__getattr__ = by_old_name(__name__)
