"""Builds tasks of lm-eval from their definitions, and reads items, counts and chance off them.

Whatever a wrong definition makes lm-eval raise becomes one line that says what to correct.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.contract import Split
from harness.data.source import NoSplit
from harness.errors import HarnessError, in_one_line
from harness.statistics.figures import weighted_mean
from suites.loading.definition import TaskDefinition, reads_local_files
from suites.loading.hub_folder import LocalSplits
from suites.loading.lm_eval import build_task, explaining_hub_errors
from suites.loading.splits import hold_out

_MOST_BYTES_COUNTED = 50_000_000  # of a data file whose lines are counted while planning


@contextmanager
def explaining_definition_errors(name: str) -> Iterator[None]:
    """Turn what readers raise for a wrong definition into a `HarnessError` of one line."""
    from jinja2 import TemplateError

    try:
        yield
    except HarnessError:
        raise
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        OSError,
        RecursionError,
        SyntaxError,
        TypeError,
        ValueError,
        TemplateError,
    ) as problem:
        raise HarnessError(
            f"{name} is not written as lm-eval's tasks are ({in_one_line(problem)}); correct its "
            "YAML"
        ) from problem


def build_definition(definition: TaskDefinition) -> Any:
    """Build one task of lm-eval over its own data set.

    Raises `HarnessError`, with different advice where the Hub cannot be reached and where the
    user's files are wrong.
    """
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError

    name, path = definition.full_name, definition.path
    try:
        settings = definition.settings(functions=True)
    except (AttributeError, ImportError, SyntaxError, NameError, TypeError, ValueError) as problem:
        raise HarnessError(
            f"{name} cannot be built: {_first_line(problem)}; correct {path} or its code"
        ) from problem
    if not reads_local_files(settings) and settings.get("custom_dataset") is None:
        with explaining_hub_errors(
            name,
            f"run it once with a network, or where there is one type: harness data fetch {name} "
            "--to FOLDER, and give --data-dir FOLDER here",
        ):
            return build_task(settings)
    definition.data_files()  # raises for one that does not exist
    try:
        return build_task(settings)
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ImportError,
        NameError,
        AssertionError,
        DatasetsError,
        TemplateError,
    ) as problem:
        raise HarnessError(
            f"{name} cannot be built: {_first_line(problem)}; correct {path} or the data files it "
            "names"
        ) from problem


def _first_line(problem: Exception) -> str:
    """Return the first line of an exception's text, else its class; at most 200 characters."""
    return (next(iter(str(problem).splitlines()), "") or type(problem).__name__)[:200]


def chance_level(tasks: Mapping[str, Any], *, by_size: bool) -> float:
    """Return the accuracy of guessing: the mean over items of right choices over choices.

    `by_size`: every item counts alike; else every task does.
    """
    task_chances = [
        [_chance_of_item(task, item) for item in task.eval_docs] for task in tasks.values()
    ]
    weights = (
        []
        if by_size
        else [(len(chances), 1 / (len(task_chances) * len(chances))) for chances in task_chances]
    )
    return weighted_mean([chance for chances in task_chances for chance in chances], weights)


def _chance_of_item(task: Any, item: Mapping[str, Any]) -> float:
    """Return the share of an item's choices that are right."""
    choices, target = len(task.doc_to_choice(item)), task.doc_to_target(item)
    return max(1, len(set(target)) if isinstance(target, list) else 1) / choices


def count_test_items(settings: Mapping[str, Any]) -> int | None:
    """Count the lines of a task's test file.

    Returns None where the task processes its items, or the data is no plain file with one item a
    line.
    """
    splits = settings.get("custom_dataset")
    if isinstance(splits, LocalSplits) and not settings.get("process_docs"):
        return splits.count()
    files = (settings.get("dataset_kwargs") or {}).get("data_files")
    split = settings.get("test_split") or settings.get("validation_split")
    file = files.get(split) if isinstance(files, Mapping) else None
    if settings.get("dataset_path") not in ("json", "text") or settings.get("process_docs"):
        return None
    if not isinstance(file, str) or not Path(file).is_file():
        return None
    if Path(file).stat().st_size > _MOST_BYTES_COUNTED:
        return None
    lines = [line for line in Path(file).read_bytes().split(b"\n") if line.strip()]
    one_object_a_line = (
        lines and lines[0].lstrip().startswith(b"{") and lines[0].rstrip().endswith(b"}")
    )
    if file.endswith((".gz", ".zip", ".json")) and not one_object_a_line:
        return None
    return len(lines)


def items_of_split(name: str, task: Any, split: Split) -> Sequence[Mapping[str, Any]]:
    """Return the items of a split of one task, as `LmEvalTask.examples` describes them."""
    if split == "test":
        return list(task.eval_docs)
    has_own_validation = task.has_test_docs() and task.has_validation_docs()
    if split == "validation" and has_own_validation:
        return list(task.validation_docs())
    if not task.has_training_docs():
        raise NoSplit(
            f"{name} has no training split to train on; train on another suite, for example "
            "--suite math"
        )
    items = list(task.training_docs())
    if has_own_validation:
        return items
    return hold_out(items, validation=split == "validation")
