"""Checks that every method and every task passes, ours and those of other packages, as
scikit-learn's `check_estimator`.

    from harness.testing import check_method

    def test_my_method_keeps_the_contract():
        check_method(MyMethod)

Every check has a name. The first one that fails is an `AssertionError` which names it, what was
seen, and what was declared. What this machine cannot make (a package or a GPU is missing) is not
checked: `ContractReport.skipped` says why.
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
    """A method or a task does not keep its contract: the check's name, what was seen, what was
    declared.
    """


@dataclass(frozen=True, kw_only=True)
class ContractReport:
    """What was checked, by name, and what could not be; the students of a method, in a folder that
    the caller gave.
    """

    passed: tuple[str, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    # first, again (the same seed), other (another seed)
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
    """Hold a method (its class, or its name in the registry) with some settings to the contract.
    Raises `ContractError`.

    It makes three students of the embedded pair, of 1,500 seen tokens. `folder` keeps them; without
    it they are deleted. `fresh` opens the student and imports the class in processes of their own:
    without that, neither a student that only opens here nor an import of torch is noticed.
    """
    registry = method_registry()
    name, found = (method, None) if isinstance(method, str) else (method.__name__, method)
    if found is not None:
        registry = Registry(
            "method", {**registry.table, name: f"{found.__module__}:{found.__qualname__}"}
        )
    with _trial_folder(folder) as place:
        trial = Trial(
            name=name,
            found=found,
            registry=registry,
            settings=dict(settings or {}),
            folder=place,
            fresh=fresh,
        )
        return _run_checks(METHOD_CHECKS, trial, f"method {name!r}")


def check_task(task: type[Task] | Task | str, *, items: int = 200) -> ContractReport:
    """Hold a task (its class, an instance, or a name of `harness list tasks`) to the contract, on
    so many items of each split.
    """
    from harness import catalog

    made: Any = (
        catalog.load_task(task)
        if isinstance(task, str)
        else task()
        if isinstance(task, type)
        else task
    )
    return _run_checks(
        TASK_CHECKS, TaskTrial(task=made, items=items), f"task {getattr(made, 'name', made)!r}"
    )


@contextmanager
def _trial_folder(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="check-") as made:
        yield Path(made)


def _run_checks(checks: Mapping[str, Any], trial: Any, what: str) -> ContractReport:
    """Run checks in their order; what cannot be made here leaves out the checks that need it."""
    passed: list[str] = []
    skipped: dict[str, str] = {}
    for name, check in checks.items():
        try:
            check(trial)
        except Skipped as reason:
            skipped[name] = str(reason)
        except AssertionError as problem:
            raise ContractError(f"{what}: {name}: {problem}") from problem
        # of the method's or the task's own code, or of a library that reads what it made
        except Exception as problem:
            raise ContractError(f"{what}: {name}: {in_one_line(problem)}") from problem
        else:
            passed.append(name)
    return ContractReport(
        passed=tuple(passed), skipped=skipped, students=getattr(trial, "students", {})
    )
