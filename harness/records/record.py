"""The record of a cell: one JSON file that says everything about it; all else is derived. No torch.

Its schema has a number. Readers accept every older schema (`_MIGRATIONS`); a newer or foreign file
is refused by name.
"""

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from harness.errors import OneLine
from harness.files.digests import digest_of
from harness.files.untrusted import Unreadable, describe_json_type, read_json
from harness.files.writing import write_atomically
from harness.machine.gpu import Gpu
from harness.records import consistency
from harness.records.conditions import (
    Conditions,
    ModelReference,
    MustAgree,
    RowKind,
    WithFlatConditions,
)
from harness.records.consistency import Checks, ConsistentModel, nonnegative_fields
from harness.renames.labels import current_label, settings_in_records

SCHEMA = 10
Status = Literal["success", "failed", "skipped"]
Share = Annotated[float, Field(ge=0, le=1)]


class _RecordPart(ConsistentModel, BaseModel):
    """What every part of a record is: frozen, of known fields, checked when it is read."""


@lru_cache(maxsize=1024)  # a report asks for each row's again and again
def _numbers_of(outcomes: str) -> tuple[float, ...]:
    return tuple(float(mark == "1") for mark in outcomes)


class TaskScore(_RecordPart):
    """The figure of one task with its per-item outcomes, in item order, for pairing.

    An item is a hit or a miss (`outcomes`), or carries a number (`values`), or a document its part
    of a perplexity (`totals`), or it adds to a figure that only all items together have
    (`statistics`); where even those are not known the figure is `unpaired`.
    """

    checks: ClassVar[Checks] = consistency.SCORE_CHECKS

    task: str
    version: str
    kind: Literal["generate", "choose", "continue", "perplexity"]
    primary: str  # the extractor (of a choice: the metric) that `value` is made from
    chance: Share
    n: int
    value: float  # accuracy, another metric's figure, or a perplexity
    stderr: float | None
    outcomes: dict[str, str]  # extractor -> "1" right, "0" wrong, one character an item
    # of doc, prompt (or conversation) and target hashes: equal digests may be paired
    items_digest: str
    answers_digest: str  # of what was written or chosen: equal digests, not one answer differs
    # of log-probabilities and positions to the last bit; "" where none are computed or known
    likelihoods_digest: str = ""
    # extractor -> a number an item; empty where every item is hit or miss
    values: dict[str, tuple[float, ...]] = {}
    # (items, weight of each one), in item order; empty: all items count alike
    parts: tuple[tuple[int, float], ...] = ()
    metric: str = ""  # lm-eval's name of the figure; "" in records of schema 6 and before
    higher_is_better: bool = True  # of the figure; a perplexity's is known by its kind
    unit: Literal["share", "number"] = "share"  # a share of 1 is shown in per cent
    unpaired: str = ""  # why the figure cannot be compared item by item; "" where it can
    form: str = (
        # how the figure follows from `statistics` (`harness/statistics/pooled.py`): f1, mcc, bleu
        # ...; "" where it is a mean of items
        ""
    )
    # what each item adds to such a figure, in item order: numbers by spaces
    statistics: tuple[str, ...] = ()
    signed: bool = False  # the figure may be below zero, so that a ratio of two says nothing
    groups: dict[str, float] = {}  # the figure by subject, or by number of steps
    macro: float | None = None  # mean over the groups
    chosen: dict[str, Share] = {}  # how often each choice's position was picked
    invalid_share: Share
    truncated_share: Share | None = None  # answers that ran into the longest length
    tokens_per_answer: float | None = None
    cut_prompts: int = 0  # requests that lost tokens on the left, longer than the context
    # perplexity: (log-likelihood, words or bytes) of each document
    totals: tuple[tuple[float, float], ...] = ()
    seconds: float  # of computing; answers from the journal count with the seconds they took then
    from_journal: int = 0  # requests that were not computed again
    notes: tuple[str, ...] = ()

    @property
    def lower_is_better(self) -> bool:
        """Tell whether smaller figures are the better ones."""
        return self.kind == "perplexity" or not self.higher_is_better

    @property
    def retains(self) -> bool:
        """Tell whether a student's figure over its teacher's says how much was kept.

        It does where larger is better, from zero on, and items pair.
        """
        return not self.lower_is_better and not self.unpaired and not self.signed

    @property
    def hit_or_miss(self) -> bool:
        """Tell whether every item is right or wrong and all count alike.

        Flips and McNemar's test are made for such items.
        """
        return (
            self.retains
            and self.primary in self.outcomes
            and self.primary not in self.values
            and not self.parts
        )

    @property
    def numbers(self) -> tuple[float, ...]:
        """The value of every item; empty where items have none."""
        return self.values.get(self.primary) or _numbers_of(self.outcomes.get(self.primary, ""))

    def format_value(self, value: float) -> str:
        """Write a figure of this task: a share in per cent, anything else as a number."""
        return (
            f"{100 * value:.1f} %"
            if self.unit == "share" and self.kind != "perplexity"
            else f"{value:.3f}"
        )


class Fidelity(_RecordPart):
    """How near a student's distributions are to its teacher's on one task.

    Figures are means over items, with errors clustered by item.
    """

    checks: ClassVar[Checks] = (
        *consistency.finite_fields("kl"),
        *nonnegative_fields("items", "kl_stderr", "agreement_stderr"),
    )

    task: str
    form: Literal["choices", "tokens"]
    items: int
    kl: float  # teacher || student, nats a question or a token
    kl_stderr: float
    agreement: Share  # same most likely choice or token
    agreement_stderr: float


class Measurement(_RecordPart):
    """One measured quantity with its raw values."""

    checks: ClassVar[Checks] = consistency.MEASUREMENT_CHECKS

    name: str
    value: float
    unit: str
    higher_is_better: bool
    values: tuple[float, ...] = ()
    condition: str = ""
    low: float | None = None  # ends of the 95 % interval, where the value has one
    high: float | None = None
    remark: str = ""  # what makes it doubtful: a busy machine, a count that arithmetic contradicts


class SharedCost(_RecordPart):
    """What a cached artefact of the teacher's took when it was made.

    Every row that used it names the same key.
    """

    checks: ClassVar[Checks] = nonnegative_fields("tokens", "seconds", "flops")

    key: str
    tokens: int = 0
    seconds: float = 0.0
    flops: float = 0.0


class Cost(_RecordPart):
    """What making the student took; the teacher's part apart."""

    checks: ClassVar[Checks] = nonnegative_fields(
        "seen_tokens",
        "trained_tokens",
        "steps",
        "seconds",
        "devices",
        "device_seconds",
        "flops",
        "teacher_tokens",
        "teacher_seconds",
        "teacher_flops",
        "peak_bytes",
        "energy_joules",
    )

    seen_tokens: int = 0
    trained_tokens: int = 0
    steps: int = 0
    seconds: float = 0.0  # wall time in the training loop, the teacher's forward passes in it
    devices: int = 1
    device_seconds: float = 0.0  # wall time x devices
    flops: float = 0.0
    teacher_tokens: int = 0  # read by the teacher for this row alone
    teacher_seconds: float = 0.0  # within `seconds`
    teacher_flops: float = 0.0
    shared: tuple[SharedCost, ...] = ()  # the teacher's work that other rows may share
    # of the process through training: resident on a CPU (imports included), allocated on a GPU
    peak_bytes: int | None = None
    # of the whole package or GPU while it trained; None where no counter can be read
    energy_joules: float | None = None
    energy_source: str = ""
    notes: dict[str, JsonValue] = {}  # method's counts: rows kept, dropped and why

    def __add__(self, later: "Cost") -> "Cost":
        """Return what two stages of a chain took together.

        These are sums, the larger peak, and energy where both were read.
        """
        sum_fields = (
            "seen_tokens",
            "trained_tokens",
            "steps",
            "seconds",
            "device_seconds",
            "flops",
            "teacher_tokens",
            "teacher_seconds",
            "teacher_flops",
        )
        energies = [cost.energy_joules for cost in (self, later) if cost.seconds]
        peaks = [cost.peak_bytes for cost in (self, later) if cost.peak_bytes is not None]
        read_energies = [joules for joules in energies if joules is not None]
        return Cost(
            **{name: getattr(self, name) + getattr(later, name) for name in sum_fields},
            devices=max(self.devices, later.devices),
            shared=tuple({cost.key: cost for cost in (*self.shared, *later.shared)}.values()),
            peak_bytes=max(peaks, default=None),
            energy_joules=sum(read_energies)
            if energies and len(read_energies) == len(energies)
            else None,
            energy_source=self.energy_source or later.energy_source,
            notes={**self.notes, **later.notes},
        )


class StageRecord(_RecordPart):
    """One stage of a chain: its student, its cost, and the scores of its own row."""

    checks: ClassVar[Checks] = nonnegative_fields("weight_bytes")

    label: str  # the chain up to here
    method: str
    key: str  # of the student, as chains share it
    digest: str
    weight_bytes: int
    simulated: bool = False  # floats that stand for packed weights: its bytes say nothing
    cost: Cost
    scores: dict[str, float] = {}  # by task, from the stage's own row; empty where it has none


class Environment(_RecordPart):
    """Where and with what a record was made."""

    device: str
    dtype: str
    threads: Annotated[int, MustAgree("threads")]
    # how threads waited at their barriers, active or passive; "" where nobody looked
    waiting: str = ""
    cores_in_use: float | None = None  # by others, when the cell began; None where nobody looked
    machine: Annotated[str, MustAgree("machine")]
    gpu: Annotated[Gpu | None, MustAgree("gpu", lambda gpu: str(gpu) if gpu else None)] = None
    platform: str
    python: str
    versions: dict[str, str]
    commit: str | None
    dirty: bool | None


class RunRecord(WithFlatConditions, _RecordPart):
    """One finished cell. Methods cannot set its fields; the harness does."""

    checks: ClassVar[Checks] = consistency.RECORD_CHECKS

    schema_number: int = Field(default=SCHEMA, alias="schema")
    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, ser_json_inf_nan="constants"
    )
    kind: Literal["cell"] = "cell"
    key: str
    status: Status
    reason: str = ""
    trace: str = ""
    label: str  # the row: "response[temperature=4]"
    method: str
    family: str
    is_control: bool
    controls: tuple[str, ...] = ()  # methods whose rows this one must be compared with
    inherited_settings: dict[str, JsonValue] = {}  # that its controls took over
    trains: bool = False
    # what its first stage changed; "" of a teacher, and where it was not noted
    starts_from: Literal["teacher", "student", ""] = ""
    settings: dict[str, JsonValue] = {}
    # under which it was made and scored; the tasks in the order of the scores
    conditions: Conditions
    student: ModelReference | None = None
    seed: int | None = None  # None where no draw was made
    data_digest: str = ""
    path: str  # the scoring path; rows of one table share it
    scores: tuple[TaskScore, ...] = ()
    fidelity: tuple[Fidelity, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    cost: Cost = Cost()  # of a chain: all its stages together
    stages: tuple[StageRecord, ...] = ()  # of a chain
    environment: Environment | None = None
    created: str = ""  # UTC, ISO 8601
    seconds: float = 0.0

    def score(self, task: str) -> TaskScore | None:
        """Return this record's score on a task, None where it has none."""
        return next((score for score in self.scores if score.task == task), None)

    @property
    def handed_on(self) -> dict[str, JsonValue]:
        """The name that `inherited_settings` had before schema 10, for programs that read it."""
        return self.inherited_settings

    @property
    def is_starting_point(self) -> bool:
        """Tell whether its student is the one that training starts from, unchanged."""
        if not self.starts_from:
            return self.method in _STUDENTS_AS_THEY_ARE
        return self.family == "control" and not self.trains and self.starts_from == "student"

    def measurement(self, name: str) -> Measurement | None:
        """Return a measurement by name, None where it was not made."""
        return next(
            (measurement for measurement in self.measurements if measurement.name == name), None
        )


_STUDENTS_AS_THEY_ARE = ("untouched",)  # methods of records from before `starts_from` was noted
_FIRST_SIGNED_SCHEMA = 6  # the first schema whose files hold their own digest
_MIGRATIONS: Mapping[int, Callable[[dict[str, JsonValue]], dict[str, JsonValue]]] = {
    # 2 added fields with defaults: fidelity, chat, macro, chosen, cut prompts
    1: lambda old: {**old, "schema": 2},
    # 3 added fields with defaults: intervals of measurements, shared teacher work, energy
    2: lambda old: {**old, "schema": 3},
    # 4 added fields with defaults: teachers' weights, whether the rate was tuned
    3: lambda old: {**old, "schema": 4},
    4: lambda old: {**old, "schema": 5},  # 5 added fields with defaults: the stages of chains
    5: lambda old: {**old, "schema": 6},  # 6 added the file's digest
    # 7 added fields with defaults: the GPU, its driver and CUDA; values of items, direction,
    # weights, why items cannot be paired, what they add to a figure of all of them
    6: lambda old: {**old, "schema": 7},
    # 8 added a field with a default: how many items of each task a sample had
    7: lambda old: {**old, "schema": 8},
    # 9 renamed settings of methods, in labels too (harness/renames)
    8: lambda old: {**_by_new_names(old), "schema": 9},
    # 10 added data of the user's own, with defaults, and renamed what controls take over
    9: lambda old: {**_renamed(old, "handed_on", "inherited_settings"), "schema": 10},
}


def _renamed(old: Mapping[str, Any], old_name: str, new_name: str) -> dict[str, Any]:
    """Return a record with a field by its new name, where it has the field."""
    return {new_name if name == old_name else name: value for name, value in old.items()}


def _by_new_names(old: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with the current names of settings: its own, and those in labels it names.

    What is no record at all comes back as it is, for the model to refuse.
    """
    method = str(old.get("method", ""))
    method_of = {"settings": method, "handed_on": method.rpartition("+")[2]}  # by field
    renamed: dict[str, Any] = {
        field: settings_in_records(owner, old[field])
        for field, owner in method_of.items()
        if isinstance(old.get(field), dict)
    }
    if isinstance(old.get("label"), str):
        renamed["label"] = current_label(old["label"])
    if isinstance(old.get("stages"), list):
        renamed["stages"] = [
            {**stage, "label": current_label(stage["label"])}
            if isinstance(stage, dict) and isinstance(stage.get("label"), str)
            else stage
            for stage in old["stages"]
        ]
    return {**old, **renamed}


class BadRecord(OneLine):
    """A file that is no record; the message names the file and what is wrong with it."""


def read_record(path: Path) -> RunRecord:
    """Read one record, migrating older schemas.

    Raises `BadRecord` with the file's name for one that is torn, newer, edited, or contradicts
    itself.
    """
    try:
        data = read_json(path)
    except Unreadable as problem:
        raise BadRecord(
            f"{problem}; delete it and run again" if path.is_file() else str(problem)
        ) from problem
    if not isinstance(data, dict) or "schema" not in data or data.get("kind") != "cell":
        raise BadRecord(f"{path}: not a record of this harness (no schema number)")
    stated_digest, schema = data.pop("digest", None), data["schema"]
    if type(schema) is not int:
        raise BadRecord(
            f"{path}: its schema is {describe_json_type(schema)}, not a number; this version reads "
            f"up to {SCHEMA}; upgrade compression-harness"
        )
    if not 1 <= schema <= SCHEMA:
        raise BadRecord(
            f"{path}: schema {schema}, this version reads up to {SCHEMA}; upgrade "
            "compression-harness"
        )
    if stated_digest is None:
        defect = _why_unsigned(data, schema)
    else:
        defect = "" if stated_digest == _digest(data) else "its digest differs"
    if defect:
        raise BadRecord(
            f"{path}: edited after it was written ({defect}); take it back from git, or run again"
        )
    while data["schema"] != SCHEMA:
        data = _MIGRATIONS[data["schema"]](data)
    try:
        return RunRecord.model_validate(data, context=consistency.READING_CONTEXT)
    except ValidationError as problem:
        way_out = consistency.WAY_OUT if consistency.is_contradiction(problem) else ""
        raise BadRecord(f"{path}: {consistency.first_problem(problem)}{way_out}") from problem


# fields of scores, and the schema that they came with
_LATER_FIELDS = (
    *("likelihoods_digest", "values", "parts", "metric", "higher_is_better", "unit"),
    "unpaired",
)
_LATER_SCHEMA = 7


def _why_unsigned(data: Mapping[str, Any], schema: int) -> str:
    """Return why a record without a digest cannot be believed; "" for a schema that had none."""
    if schema >= _FIRST_SIGNED_SCHEMA:
        return f"schema {schema} has a digest, and it has none"
    listed = data.get("scores")
    scores = [score for score in listed if isinstance(score, dict)] if type(listed) is list else []
    for score in scores:
        for name in _LATER_FIELDS:
            default = TaskScore.model_fields[name].default
            default = list(default) if isinstance(default, tuple) else default  # as JSON has it
            if score.get(name, default) != default:
                return f"it says schema {schema}, and {name} came with schema {_LATER_SCHEMA}"
    return ""


def write_record(path: Path, record: RunRecord) -> None:
    """Write a record whole or not at all, with the digest of everything else in it."""
    data = record.model_dump(mode="json", by_alias=True)
    write_atomically(
        path, json.dumps({**data, "digest": _digest(data)}, indent=1, ensure_ascii=False) + "\n"
    )


def _digest(data: Mapping[str, JsonValue]) -> str:
    return digest_of(json.loads(json.dumps(data)))


TEACHER = "teacher"
CHECKPOINT = "checkpoint"  # the method and family of rows from outside: nothing made them here


def row_kinds(record: RunRecord) -> tuple[RowKind, ...]:
    """Return which conditions of making say something about a record.

    None of a teacher's and of a checkpoint's from outside; the budget of one that trains; the data
    of one that calibrated on the user's own.
    """
    if record.method in (TEACHER, CHECKPOINT):
        return ()
    kinds: list[RowKind] = ["students"]
    if record.trains:
        kinds.append("trained rows")
    if record.conditions.calibration_data is not None:
        kinds.append("calibrated rows")
    return tuple(kinds)
