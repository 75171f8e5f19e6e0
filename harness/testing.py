"""Checks of methods and tasks, like scikit-learn's `check_estimator`.

All methods and tasks must pass them, those of other packages too:

    from harness.testing import check_method

    def test_my_method_keeps_the_contract():
        check_method(MyMethod)

Every check has a name. The first one that fails raises an `AssertionError` with its name, what was
seen, and what was declared. A check that cannot run on this machine (a package or a GPU is missing)
is skipped: `ContractReport.skipped` says why.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.checking.method_checks import METHOD_CHECKS, Trial, TrialStudent
from harness.checking.task_checks import TASK_CHECKS, TaskTrial
from harness.contract import Task
from harness.errors import Skipped, in_one_line
from harness.registry import Registry
from harness.renames.modules import by_old_name

__all__ = ["ContractError", "ContractReport", "check_method", "check_task", "method_registry"]
__getattr__ = by_old_name(__name__)


class ContractError(AssertionError):
    """A method or a task breaks its contract: the check's name, what was seen and declared."""


@dataclass(frozen=True, kw_only=True)
class ContractReport:
    """Which checks passed and which were skipped, and the students that a method made."""

    passed: tuple[str, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)  # check -> reason
    # "first", "again" (the same seed), "other" (another seed); in the folder of the caller
    students: Mapping[str, TrialStudent] = field(default_factory=dict)


def method_registry() -> Registry:
    """Return the methods of this package and of all that are installed."""
    from harness import catalog

    return catalog.methods()


def check_method(
    method: type[Any] | str,
    settings: Mapping[str, object] | None = None,
    *,
    folder: Path | None = None,
    fresh: bool = True,
) -> ContractReport:
    """Check a method (its class, or its name in the registry) against the contract.

    It makes three students of the embedded models, each within 1,500 tokens seen. `folder` keeps
    them; without it they are deleted. `fresh` opens the student and imports the class in processes
    of their own: without that, the checks miss a student that opens only in this process, and an
    import of torch. Raises `ContractError`.
    """
    registry = method_registry()
    name, method_class = (method, None) if isinstance(method, str) else (method.__name__, method)
    if method_class is not None:
        place = f"{method_class.__module__}:{method_class.__qualname__}"
        registry = Registry("method", {**registry.table, name: place})
    with _trial_folder(folder) as trial_folder:
        trial = Trial(
            name=name,
            method_class=method_class,
            registry=registry,
            settings=dict(settings or {}),
            folder=trial_folder,
            fresh=fresh,
        )
        return _run_checks(METHOD_CHECKS, trial, f"method {name!r}")


def check_task(task: type[Task] | Task | str, *, items: int = 200) -> ContractReport:
    """Check a task (its class, an instance, or a name of `harness list tasks`).

    `items` is how many items of each split are read. Raises `ContractError`.
    """
    from harness import catalog

    instance: Any = task
    if isinstance(task, str):
        instance = catalog.load_task(task)
    elif isinstance(task, type):
        instance = task()
    subject = f"task {getattr(instance, 'name', instance)!r}"
    return _run_checks(TASK_CHECKS, TaskTrial(task=instance, items=items), subject)


@contextmanager
def _trial_folder(folder: Path | None) -> Iterator[Path]:
    """Yield the caller's folder, or one that is deleted afterwards."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="check-") as path:
        yield Path(path)


def _run_checks(checks: Mapping[str, Any], trial: Any, subject: str) -> ContractReport:
    """Run checks in their order. Raises `ContractError` for the first one that fails."""
    passed: list[str] = []
    skipped: dict[str, str] = {}
    for name, check in checks.items():
        try:
            check(trial)
        except Skipped as reason:
            skipped[name] = str(reason)
        except AssertionError as problem:
            raise ContractError(f"{subject}: {name}: {problem}") from problem
        # raised by the method or task itself, or by a library that reads what it wrote
        except Exception as problem:
            raise ContractError(f"{subject}: {name}: {in_one_line(problem)}") from problem
        else:
            passed.append(name)
    students = getattr(trial, "students", {})
    return ContractReport(passed=tuple(passed), skipped=skipped, students=students)
