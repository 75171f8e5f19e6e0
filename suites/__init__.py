"""Tasks and suites, as literal tables: a name and where it lives. Listing imports no task's
machinery.
"""

from collections.abc import Mapping, Sequence
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


def load(name: str, *, include_path: str | Path | None = None) -> Task:
    """Return the task of a name in `tasks()`, or of `lm-eval:NAME`.

    `include_path` is a folder with more YAML tasks for lm-eval.

    Raises `HarnessError` for an unknown name and for a task of lm-eval that this harness cannot
    score.
    """
    if name.startswith(LM_EVAL_PREFIX):
        from suites.loading.outside import LmEvalTask

        return LmEvalTask(name, include_path=include_path)
    task: Task = tasks().load(name)()
    return task


def count_items(name: str, *, include_path: str | Path | None = None) -> int | None:
    """Return how many items a task of lm-eval's own has; None where only its data tell."""
    from suites.loading.outside import LmEvalTask

    return LmEvalTask(name, include_path=include_path).count()


def resolve(
    names: Sequence[str], *, embedded: bool, include_path: str | Path | None = None
) -> dict[str, Suite]:
    """Return the named suites, in one order however they were typed: it orders the training rows.

    A name is a suite, a task, `lm-eval:NAME`, or the path of a suite file (.toml). For the embedded
    pair the suites of this module hold their `-mini` tasks only; what the user puts together is
    taken as typed. Raises `HarnessError`.
    """
    given: dict[str, Suite] = {}
    for name in [one for one in dict.fromkeys(names) if one not in SUITES]:
        suite = _suite_of_task_or_file(name, include_path)
        if suite.name in SUITES or suite.name in given:
            raise HarnessError(
                f"{name} names its suite {suite.name!r}, as another one is named; give it another "
                "name = ..."
            )
        given[suite.name] = suite
    fixed = {
        name: replace(suite, tasks=_mini_tasks(suite)) if embedded else suite
        for name, suite in SUITES.items()
        if name in names
    }
    return fixed | dict(sorted(given.items()))


def include_path_of(names: Sequence[str], include_path: str | Path | None = None) -> Path | None:
    """Return the folder with tasks for lm-eval: the one given, else the one that a suite file among
    `names` states.
    """
    if include_path is not None:
        return Path(include_path)
    stated = sorted(
        {
            path
            for name in names
            if name.endswith(".toml")
            for path in [_include_path_in_file(Path(name))]
            if path
        }
    )
    if len(stated) > 1:
        raise HarnessError(
            f"the suite files state {len(stated)} different include_path folders; type one: "
            f"--include-path {stated[0]}"
        )
    return stated[0] if stated else None


def _mini_tasks(suite: Suite) -> tuple[str, ...]:
    """Return a suite's tasks for the embedded pair; a task without a `-mini` form is dropped."""
    forms = (task if task.endswith("-mini") else f"{task}-mini" for task in suite.tasks)
    return tuple(task for task in forms if task in TASKS)


def _suite_of_task_or_file(name: str, include_path: str | Path | None) -> Suite:
    """Return a suite that is not in `SUITES`: of one task, or from a file."""
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
    if name.startswith(LM_EVAL_PREFIX):
        load(name, include_path=include_path)
    elif name not in tasks():
        raise unknown("task", name, tasks().table, hint="(or lm-eval:NAME)")


def _include_path_in_file(path: Path) -> Path | None:
    stated = _read_suite_file(path).get("include_path")
    return path.parent / stated if stated else None


def _suite_from_file(path: Path, include_path: str | Path | None) -> Suite:
    """Read a suite file; its `include_path` is relative to it and yields to one that is typed."""
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
