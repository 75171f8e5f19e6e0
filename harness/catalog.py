"""The only module of the harness that imports `methods` and `suites`.

Command, Python door and cell ask it. Both tables are literal and name classes as text, so that
reading them imports no method, no task and no torch.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.contract import Checkpoint, Example, Job, Suite, Task
from harness.registry import Registry
from harness.siblings import refuse_other_packages

refuse_other_packages("methods", "suites")

import methods as _methods  # noqa: E402  looked at before its code runs
import suites as _suites  # noqa: E402

METHODS: Mapping[str, str] = _methods.METHODS
METHODS_FOLDER = Path(_methods.__file__ or "").parent
SUITES: Mapping[str, Suite] = _suites.SUITES
OUTSIDE: str = _suites.LM_EVAL_PREFIX  # what the name of a task of lm-eval's own begins with


def methods() -> Registry:
    """Return the methods of this project and of installed packages, by name."""
    return Registry.with_entry_points("method", METHODS, "harness.methods")


def tasks() -> Registry:
    """Return the tasks of this project and of installed packages, by name."""
    registry: Registry = _suites.tasks()
    return registry


def load_task(
    name: str,
    *,
    include_path: str | Path | None = None,
    data_folder: str | Path | None = None,
    num_fewshot: int | None = None,
) -> Task:
    """Return a task of the table, or of `lm-eval:NAME`.

    `include_path` is a folder with more YAML tasks, `data_folder` one that may hold data sets of
    the Hub.
    """
    task: Task = _suites.load(
        name, include_path=include_path, data_folder=data_folder, num_fewshot=num_fewshot
    )
    return task


def count_items(
    name: str,
    *,
    include_path: str | Path | None = None,
    data_folder: str | Path | None = None,
    num_fewshot: int | None = None,
) -> int | None:
    """Return how many items a task of lm-eval's own has; None where only its data tell."""
    return _suites.count_items(
        name, include_path=include_path, data_folder=data_folder, num_fewshot=num_fewshot
    )


def fetch_data(
    name: str,
    folder: Path,
    *,
    include_path: str | Path | None = None,
    say: Callable[[str], None],
) -> int:
    """Copy what a task, or each task of a suite, reads from the Hub into a data folder.

    Returns how many files were written; `say` receives a line for each. Raises `HarnessError`.
    """
    return _suites.fetch(name, folder, include_path=include_path, say=say)


def resolve_suites(
    names: Sequence[str], *, embedded: bool, include_path: str | Path | None = None
) -> dict[str, Suite]:
    """Return the named suites, in one order however they were typed.

    The suites of the embedded pair hold `-mini` tasks.
    """
    suites_by_name: dict[str, Suite] = _suites.resolve(
        names, embedded=embedded, include_path=include_path
    )
    return suites_by_name


def include_path_of(names: Sequence[str], include_path: str | Path | None = None) -> Path | None:
    """Return the folder with tasks for lm-eval: the given one, else that of a suite file."""
    folder: Path | None = _suites.include_path_of(names, include_path)
    return folder


def embedded_recipes() -> Sequence[Any]:
    """Return the recipes of the embedded teachers, in training order. Imports torch."""
    from methods.training import embedded_teachers

    recipes: Sequence[Any] = embedded_teachers.RECIPES
    return recipes


def train_teacher(recipe: Any, **options: Any) -> Checkpoint:
    """Train an embedded teacher by its recipe, as `methods.training.embedded_teachers` does."""
    from methods.training import embedded_teachers

    teacher: Checkpoint = embedded_teachers.train_teacher(recipe, **options)
    return teacher


# writes texts for training; the keys of data that a teacher writes hold its code
WRITER = "methods.training.traces"


def write_traces(job: Job, examples: Sequence[Example], **sampling: Any) -> Any:
    """Let a teacher write, as `methods.training.traces.teacher_traces` does. Imports torch."""
    from methods.training import traces

    return traces.teacher_traces(job, examples, **sampling)


def forget_training(folder: Path) -> None:
    """Remove what only a training that goes on needs. Imports torch."""
    from methods.training import state

    state.remove_state(folder)
