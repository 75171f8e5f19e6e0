"""What the process of a cell is told: everything that it computes, in one file."""

from pathlib import Path

from pydantic import ConfigDict

from harness.planning.cells import PlannedCell, PlannedModel
from harness.planning.config import WorkSettings
from harness.records.conditions import WithConditions


class CellJob(WithConditions):
    """What the parent tells the process: the cell and its conditions, where things lie, and how to
    go about it.
    """

    model_config = ConfigDict(frozen=True)
    holds = ("conditions", "work")
    cell: PlannedCell
    teachers: tuple[PlannedModel, ...]  # where the models of the conditions lie
    student_base: PlannedModel
    work: WorkSettings
    measure: bool
    include_path: Path | None
    teacher_samples: Path | None  # the teacher's rows, for fidelity; None in the teacher's own cell
    cell_folder: Path
    stage_folders: tuple[Path, ...]  # where each stage's student lies; none for a teacher's row
    stage_records: tuple[Path | None, ...]  # where each stage's own row is recorded
    threads: int
    cores_in_use: float | None  # by others, when the cell began
    cache: Path
    data_dir: Path | None
