"""What a plan holds: models, stages and cells, each with its key."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue

from harness.contract import Checkpoint, Start, Suite
from harness.planning.config import RunConfig
from harness.records.conditions import Conditions, ModelReference
from harness.records.record import TEACHER


class PlannedModel(BaseModel):
    """A checkpoint as it travels to the cell's process."""

    model_config = ConfigDict(frozen=True)
    path: Path
    name: str
    digest: str
    bytes_on_disk: int
    note: str = ""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "PlannedModel":
        """Take a checkpoint's identity."""
        return cls(
            path=checkpoint.path.resolve(),
            name=checkpoint.name,
            digest=checkpoint.digest,
            bytes_on_disk=checkpoint.bytes_on_disk,
            note=checkpoint.note,
        )

    def checkpoint(self) -> Checkpoint:
        """Return the checkpoint again."""
        return Checkpoint(
            path=self.path,
            name=self.name,
            digest=self.digest,
            bytes_on_disk=self.bytes_on_disk,
            note=self.note,
        )

    def reference(self) -> ModelReference:
        """Return which model it is, without where it lies."""
        return ModelReference(
            name=self.name,
            digest=self.digest,
            weight_bytes=self.bytes_on_disk or None,
            note=self.note,
        )


class PlannedStage(BaseModel):
    """One method of a chain; a lone method is a chain of one stage."""

    model_config = ConfigDict(frozen=True)
    key: str  # of the student that it makes: chains that begin alike share it
    label: str  # the chain up to here
    method: str
    settings: dict[str, JsonValue]
    family: str
    trains: bool
    starts_from: Start  # where it is the first stage
    simulated: bool = False


class PlannedCell(BaseModel):
    """One row at one seed: what its process is told."""

    model_config = ConfigDict(frozen=True)
    key: str
    student_key: str  # of the last stage; "" for a teacher's row
    label: str
    method: str
    settings: dict[str, JsonValue]
    stages: tuple[PlannedStage, ...] = ()
    family: str
    is_control: bool
    controls: tuple[str, ...]
    handed_on: dict[str, JsonValue] = {}  # settings that its controls took over
    trains: bool
    # floats that stand for packed weights: scored, neither weighed nor timed
    simulated: bool = False
    seed: int | None
    teacher: int = 0  # which teacher a row of TEACHER scores

    @property
    def is_teacher(self) -> bool:
        """Tell whether this is the first teacher's own row: the one that every other row is
        compared with.
        """
        return self.method == TEACHER and self.teacher == 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All cells of a run, in the order in which they are computed."""

    config: RunConfig
    conditions: Conditions  # of all its rows: those of one cell are `conditions_of`
    suites: Mapping[str, Suite]
    teachers: tuple[PlannedModel, ...]  # where the models of the conditions lie
    student_base: PlannedModel
    grid: str
    cells: tuple[PlannedCell, ...]
    threads: int = 1  # of each cell
    # of each key, by name: why something is made anew
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    hub_data: bool = False  # items come from the Hub, so cells may ask it, wherever the models lie

    def conditions_of(self, cell: PlannedCell) -> Conditions:
        """Return the conditions of a cell: only what trains has a learning rate to tune."""
        return self.conditions.model_copy(update={"tuned": self.conditions.tuned and cell.trains})
