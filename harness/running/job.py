"""The job of a cell: everything that its process needs to know, in one file."""

from pathlib import Path
from typing import Literal

from pydantic import ConfigDict

from harness.data.subsets import Subset
from harness.planning.cells import PlannedCell, PlannedModel
from harness.planning.config import WorkSettings
from harness.records.conditions import WithConditions


class CellJob(WithConditions):
    """What a run passes to the process of a cell: the cell, its conditions, paths and settings."""

    model_config = ConfigDict(frozen=True)
    holds = ("conditions", "work")
    cell: PlannedCell
    teachers: tuple[PlannedModel, ...]  # the teachers of the conditions, with their paths
    student_base: PlannedModel
    work: WorkSettings
    measure: bool
    include_path: Path | None
    num_fewshot: int | None
    teacher_samples: Path | None  # the teacher's answers; None in the teacher's own cell
    cell_folder: Path
    stage_folders: tuple[Path, ...]  # with the student of each stage; empty for a teacher's row
    stage_records: tuple[Path | None, ...]  # the record of each stage's own row
    threads: int
    cores_in_use: float | None  # by other processes, when the cell began
    cache: Path
    data_dir: Path | None
    train_data_locations: tuple[str, ...] = ()  # of the conditions' data sets, in their order
    calibration_location: str = ""
    scored_subset: Subset | None = None  # of the tasks' items; None: all
    overlap: Literal["drop", "refuse"] = "drop"
