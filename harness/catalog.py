"""The one place of the harness that knows `methods` and `suites`: command, Python door and cell ask
here.

Both tables are literal and name classes as text, so that reading them imports no method, no task
and no torch.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.contract import Checkpoint, Suite, Task
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


def load_task(name: str, *, include_path: str | Path | None = None) -> Task:
    """Return a task of the table, or of `lm-eval:NAME`; `include_path` is a folder with more YAML
    tasks.
    """
    task: Task = _suites.load(name, include_path=include_path)
    return task


def count_items(name: str, *, include_path: str | Path | None = None) -> int | None:
    """Return how many items a task of lm-eval's own has; None where only its data tell."""
    return _suites.count_items(name, include_path=include_path)


def resolve_suites(
    names: Sequence[str], *, embedded: bool, include_path: str | Path | None = None
) -> dict[str, Suite]:
    """Return the named suites in one order however they were typed; those of the embedded pair hold
    `-mini` tasks.
    """
    found: dict[str, Suite] = _suites.resolve(names, embedded=embedded, include_path=include_path)
    return found


def include_path_of(names: Sequence[str], include_path: str | Path | None = None) -> Path | None:
    """Return the folder with tasks for lm-eval: the one given, else the one that a suite file
    states.
    """
    found: Path | None = _suites.include_path_of(names, include_path)
    return found


def embedded_recipes() -> Sequence[Any]:
    """Return how the embedded teachers are trained, in the order in which they are. Imports
    torch.
    """
    from methods.training import embedded_teachers

    recipes: Sequence[Any] = embedded_teachers.RECIPES
    return recipes


def train_teacher(recipe: Any, **options: Any) -> Checkpoint:
    """Train an embedded teacher by its recipe, as `methods.training.embedded_teachers` does."""
    from methods.training import embedded_teachers

    made: Checkpoint = embedded_teachers.train_teacher(recipe, **options)
    return made


def forget_training(folder: Path) -> None:
    """Remove what only a training that goes on needs. Imports torch."""
    from methods.training import state

    state.remove_state(folder)
