"""The parts of a plan: models, stages and cells, each with its key."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue

from harness.contract import Checkpoint, Start, Suite
from harness.data.subsets import Subset
from harness.planning.config import RunConfig
from harness.records.conditions import Conditions, ModelReference
from harness.records.record import TEACHER


class PlannedModel(BaseModel):
    """A checkpoint, in the form in which it is passed to the process of a cell."""

    model_config = ConfigDict(frozen=True)
    path: Path
    name: str
    digest: str
    bytes_on_disk: int
    note: str = ""
    base: Path | None = None  # folder of the model that an adapter in `path` is laid on
    parents: tuple[str, ...] = ()  # digests

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "PlannedModel":
        """Return the planned model of a checkpoint."""
        return cls(
            path=checkpoint.path.resolve(),
            name=checkpoint.name,
            digest=checkpoint.digest,
            bytes_on_disk=checkpoint.bytes_on_disk,
            note=checkpoint.note,
            base=None if checkpoint.base is None else checkpoint.base.resolve(),
            parents=checkpoint.parents,
        )

    def checkpoint(self) -> Checkpoint:
        """Return the checkpoint that this model was planned from."""
        return Checkpoint(
            path=self.path,
            name=self.name,
            digest=self.digest,
            bytes_on_disk=self.bytes_on_disk,
            note=self.note,
            base=self.base,
            parents=self.parents,
        )

    @property
    def model_folder(self) -> Path:
        """The folder with configuration and tokenizer: of an adapter, those of its base."""
        return self.base or self.path

    def reference(self) -> ModelReference:
        """Return what a record says of the model: everything except its path."""
        return ModelReference(
            name=self.name,
            digest=self.digest,
            weight_bytes=self.bytes_on_disk or None,
            note=self.note,
        )


class PlannedStage(BaseModel):
    """One method of a chain; a lone method is a chain of one stage."""

    model_config = ConfigDict(frozen=True)
    key: str  # of its student: chains that begin with the same stages share it
    label: str  # of the chain up to and including this stage
    method: str
    settings: dict[str, JsonValue]
    family: str
    trains: bool
    starts_from: Start  # if it is the first stage
    simulated: bool = False
    calibrates: bool = False


class PlannedCell(BaseModel):
    """One row at one seed: what a process computes."""

    model_config = ConfigDict(frozen=True)
    key: str
    student_key: str  # key of the last stage; "" for a teacher's row
    label: str
    method: str
    settings: dict[str, JsonValue]
    stages: tuple[PlannedStage, ...] = ()
    family: str
    is_control: bool
    controls: tuple[str, ...]
    inherited_settings: dict[str, JsonValue] = {}  # that its controls take over
    trains: bool
    recipe_notes: dict[str, str] = {}  # method -> why it does not train by its first recipe
    # its packed weights are stored as floats: it is scored, but not weighed or timed
    simulated: bool = False
    seed: int | None
    teacher: int = 0  # index of the teacher that a teacher's row scores
    checkpoint: PlannedModel | None = None  # that a row from outside scores, as it is

    @property
    def is_teacher(self) -> bool:
        """Tell whether this is the first teacher's row: all other rows are compared with it."""
        return self.method == TEACHER and self.teacher == 0

    @property
    def record_fields(self) -> dict[str, Any]:
        """The fields of its record that the plan decides, by name."""
        return {
            "key": self.key,
            "label": self.label,
            "method": self.method,
            "family": self.family,
            "is_control": self.is_control,
            "controls": self.controls,
            "inherited_settings": self.inherited_settings,
            "trains": self.trains,
            "starts_from": self.stages[0].starts_from if self.stages else "",
            "settings": self.settings,
            "seed": self.seed,
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All cells of a run, in the order in which they are computed."""

    config: RunConfig
    conditions: Conditions  # of all rows; `conditions_of` gives those of one cell
    suites: Mapping[str, Suite]
    teachers: tuple[PlannedModel, ...]  # the teachers of the conditions, with their paths
    student_base: PlannedModel
    grid: str
    rounds: int | str
    cells: tuple[PlannedCell, ...]
    threads: int = 1  # of each cell
    # key -> its parts by name, to say why something is computed again
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    request: Mapping[str, object] = field(default_factory=dict)  # what identities are made of
    subset: Subset | None = None  # of the tasks' items; None: all
    hub_data: bool = False  # items come from the Hub, so cells may contact it
    # task -> why no row trains on it, as its definition tells; empty where own data is trained on
    untrained_tasks: Mapping[str, str] = field(default_factory=dict)

    def conditions_of(self, cell: PlannedCell) -> Conditions:
        """Return the conditions of a cell: those of training and calibration only where it does."""
        calibrates = any(stage.calibrates for stage in cell.stages)
        calibration = self.conditions.calibration_data if calibrates else None
        tuned = self.conditions.tuned and cell.trains
        return self.conditions.model_copy(update={"tuned": tuned, "calibration_data": calibration})
