"""What `harness run --dry-run` prints: the card, and of every row recipe, memory and time."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.estimating.expect import CellEstimate
    from harness.planning.cells import Plan, PlannedCell


def plan_lines(plan: "Plan") -> Iterator[str]:
    """Yield a plan line by line, with an estimate of each row."""
    from harness.api import estimate_cells
    from harness.estimating.estimate import duration
    from harness.records.store import Store
    from harness.running.recomputation import recomputation_lines

    store = Store(plan.config.out)
    finished = {
        cell.key for cell in plan.cells if not plan.config.force and store.finished(cell.key)
    }
    estimates = estimate_cells(plan, finished)
    hardware = estimates[0].hardware
    yield from _heading(plan, estimates[0])
    for cell, estimate in zip(plan.cells, estimates, strict=True):
        yield from _row_lines(cell, estimate, is_finished=cell.key in finished)
    if not plan.config.force:
        yield from recomputation_lines(plan, store)
    seconds = sum(estimate.seconds for estimate in estimates)
    yield (
        f"{len(plan.cells)} cells, about {duration(seconds)} to compute (by the formulas of "
        f"harness plan, on this {plan.conditions.device}: {hardware.source})"
    )


def _heading(plan: "Plan", estimate: "CellEstimate") -> Iterator[str]:
    """Yield what all rows share: models, budget, device, tasks, data."""
    from harness.estimating.memory import bytes_text
    from harness.models.shape import parameters_on_disk

    conditions, teacher = plan.conditions, plan.teachers[0]
    yield (
        f"teacher {teacher.name} ({parameters_on_disk(teacher.path):,} parameters), student "
        f"{conditions.student_recipe}, {conditions.budget_tokens:,} seen tokens for each trained "
        f"row, {conditions.device} ({estimate.hardware.name}, {bytes_text(estimate.memory)}), "
        f"{conditions.dtype}; tasks: {', '.join(conditions.task_names)}"
    )
    if plan.untrained_tasks and any(cell.trains for cell in plan.cells):
        trained = [task for task in conditions.task_names if task not in plan.untrained_tasks]
        reasons = "; ".join(f"{task}: {why}" for task, why in plan.untrained_tasks.items())
        yield f"rows train on {', '.join(trained)}, not on all tasks ({reasons})"
    yield from subset_lines(plan)
    yield from _data_lines(plan)
    if (calibration := conditions.calibration_data) is not None:
        yield f"calibration data: {calibration.name}, {calibration.examples:,} examples"


def subset_lines(plan: "Plan") -> Iterator[str]:
    """Yield a line for each task of which a subset is scored: how many items, and their power."""
    from harness import catalog
    from harness.estimating.requests import item_count
    from harness.gate.baseline_tables import power_of_task
    from harness.gate.rules import Rules

    for name in plan.conditions.task_names if plan.subset else ():
        assert plan.subset is not None
        folders = plan.config.include_path, plan.config.data_dir
        task = catalog.load_task(name, include_path=folders[0], data_folder=folders[1])
        count = plan.subset.size_of(name, item_count(name, *folders))
        power = power_of_task(task, count, Rules())
        yield f"subset {plan.subset.label}: {count:,} items of {name}; {power}"


def _data_lines(plan: "Plan") -> Iterator[str]:
    """Yield a line for each data set of `--train-data`."""
    from harness.estimating.estimate import duration
    from harness.estimating.expect import estimate_writing

    writing = estimate_writing(plan)
    for data in plan.conditions.train_data:
        contents = f"{data.examples:,} examples"
        if stage := writing.get(data.name):
            contents = (
                f"{data.examples:,} texts that {plan.teachers[0].name} writes, about "
                f"{duration(stage.seconds)} where none is cached"
            )
        yield f"training data: {data.name}, {contents}, weight {data.weight:g}"


def _row_lines(
    cell: "PlannedCell", estimate: "CellEstimate", *, is_finished: bool
) -> Iterator[str]:
    """Yield a row's line, and below it the peak of each piece of work."""
    from harness.estimating.estimate import duration
    from harness.estimating.memory import bytes_text, peak_text
    from harness.machine.memory import device_bytes

    seed = f" seed {cell.seed}" if cell.seed is not None else ""
    name = f"  {cell.label}{seed}{' (control)' if cell.is_control else ''}"
    if is_finished:
        yield f"{name}: finished"
        return
    state = f"to compute, about {duration(estimate.seconds)}"
    if estimate.recipes:
        chosen = f"recipe {', '.join(estimate.recipes)}"
        state += f"; {'; '.join(cell.recipe_notes.values()) or chosen}"
    state += f"; peak {bytes_text(estimate.peak.total)} of {bytes_text(estimate.memory)}"
    state += f" ({estimate.peak.name})"
    if estimate.training_bytes:
        state += f": {estimate.verdict}"
    if estimate.state_copy:
        state += (
            f"; {bytes_text(estimate.state_copy)} of the processor's "
            f"{bytes_text(device_bytes('cpu'))} while a state is written"
        )
    yield f"{name}: {state}"
    for peak in estimate.peaks:
        yield f"      {peak_text(peak)}"
