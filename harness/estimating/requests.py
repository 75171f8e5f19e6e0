"""What a run asks an estimate for: shapes, budget, data, and how many items its tasks have."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from harness import catalog
from harness.data.sizes import ITEMS_BY_TASK
from harness.data.subsets import parse_subset
from harness.estimating.workload import EstimateRequest
from harness.models.shape import Shape
from harness.models.shaping import parse_student_cut
from harness.planning.config import RunConfig
from harness.planning.spec import limit_for

_DEFAULT_ITEMS = 1_000  # of a task of unknown size
_NO_LIMIT = 10**9


def item_count(name: str, include_path: Path | None, data_folder: Path | None = None) -> int:
    """Return how many items a task has: as published, by its data files, or 1,000 if unknown."""
    if name in ITEMS_BY_TASK or not name.startswith(catalog.OUTSIDE):
        return ITEMS_BY_TASK.get(name, _DEFAULT_ITEMS)
    count: int | None = catalog.count_items(
        name, include_path=include_path, data_folder=data_folder
    )
    return _DEFAULT_ITEMS if count is None else count


def items_of(
    tasks: Sequence[str],
    include_path: Path | None,
    limit: int | Mapping[str, int] | None,
    *,
    data_folder: Path | None = None,
) -> dict[str, int]:
    """Return how many items of each task are scored."""
    return {
        task: min(item_count(task, include_path, data_folder), limit_for(limit, task) or _NO_LIMIT)
        for task in tasks
    }


def are_generated(tasks: Sequence[str]) -> bool:
    """Tell whether all tasks are the generated ones, which have short rows."""
    return all(task.endswith("-mini") for task in tasks)


def request_of_run(
    config: RunConfig,
    *,
    teacher: Shape,
    base: Shape,
    tasks: Sequence[str],
    budget: int,
    grid: str,
    rounds: int = 6,
) -> EstimateRequest:
    """Return what all rows of a run share; `base` is the model that `--student` may cut."""
    cut = parse_student_cut(config.student)
    return EstimateRequest(
        teacher=teacher,
        student=cut.shape_of(base) if cut else base,
        chain=(),
        budget=budget,
        rows=config.rows,
        mini=are_generated(tasks),
        rounds=rounds,
        items=_scored_items(config, tasks),
        grid=grid,
    )


def _scored_items(config: RunConfig, tasks: Sequence[str]) -> dict[str, int]:
    """Return how many items of each task a run scores: all, those of its subset, or a sample."""
    counts = items_of(tasks, config.include_path, config.limit, data_folder=config.data_dir)
    if config.subset is None:
        return counts
    subset = parse_subset(config.subset)
    return {task: subset.size_of(task, count) for task, count in counts.items()}
