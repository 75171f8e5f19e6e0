"""Baselines: outcomes, bytes and conditions of accepted rows, in one file small enough for git.

No torch. A file holds the digest of everything else in it, so that an edit by hand is found, and
the first accepted value of every score, so that many small losses are seen as the large one that
they are. 1,000 outcomes are 125 bytes before compression.
"""

import base64
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness.errors import HarnessError
from harness.files.digests import digest_of
from harness.files.untrusted import Unreadable, read_json
from harness.files.writing import write_atomically
from harness.records import consistency
from harness.records.conditions import baseline_conditions
from harness.records.consistency import Checks, ConsistentModel, nonnegative_fields
from harness.records.record import RunRecord, Share, TaskScore, row_kinds
from harness.renames.labels import current_label

SCHEMA = 3


class _BaselinePart(ConsistentModel, BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, ser_json_inf_nan="constants"
    )


# where the items of a frozen score stand, one of them a kind of figure
ITEM_FIELDS = ("packed", "totals", "values", "statistics")


class Origin(_BaselinePart):
    """The first accepted value of a score, to which every later one is compared.

    Its items stand here once they differ from the frozen ones.
    """

    value: float
    date: str
    reason: str
    packed: str = ""
    totals: tuple[tuple[float, float], ...] = ()
    values: tuple[float, ...] = ()
    statistics: tuple[str, ...] = ()


def _bits(packed: str) -> bytes:
    """Return outcomes as packed bits. Raises `ValueError` for what is none."""
    try:
        return zlib.decompress(base64.b64decode(packed, validate=True))
    except zlib.error as problem:
        raise ValueError(str(problem)) from problem


def _packed_is_whole(score: "FrozenScore") -> str:
    """Return what is wrong where packed outcomes are no bits, or not one bit an item."""
    for packed in (score.packed, score.origin.packed if score.origin else ""):
        try:
            count = len(_bits(packed)) if packed else None
        except ValueError as problem:
            return f"no outcomes ({problem})"
        if count is not None and count != -(-score.n // 8):
            return f"{count:,} bytes of outcomes for {score.n:,} items"
    return "outcomes and values both" if score.packed and score.values else ""


def _origin_is_its_items(score: "FrozenScore") -> str:
    """Return what is wrong where the first accepted value is not the one that its items make."""
    return consistency.value_is_its_items(score.first) or consistency.n_is_its_items(score.first)


class FrozenScore(_BaselinePart):
    """One task of a row: what it scored, item by item."""

    checks: ClassVar[Checks] = (
        ("packed", _packed_is_whole),
        *consistency.FIGURE_CHECKS,
        ("origin", _origin_is_its_items),
        *nonnegative_fields("tokens"),
    )

    task: str
    version: str
    kind: Literal["generate", "choose", "continue", "perplexity"]
    primary: str
    n: int
    value: float
    items_digest: str
    answers_digest: str
    # of log-probabilities and positions, to the last bit; "" where not known
    likelihoods_digest: str = ""
    packed: str = ""  # outcomes of the primary extractor: bits, deflated, base64
    totals: tuple[tuple[float, float], ...] = ()
    values: tuple[float, ...] = ()  # of items that carry numbers
    parts: tuple[tuple[int, float], ...] = ()
    metric: str = ""
    unit: Literal["share", "number"] = "share"
    unpaired: str = ""
    form: str = ""  # of a figure of all items together
    statistics: tuple[str, ...] = ()  # what each item adds to it
    invalid_share: Share = 0.0
    truncated_share: Share | None = None
    tokens: float | None = None  # an answer, mean
    origin: Origin | None = None  # None of a score that no baseline holds yet

    @property
    def first(self) -> "FrozenScore":
        """The first accepted score in this one's place: later ones are judged against both."""
        if self.origin is None:
            return self
        items = {name: getattr(self.origin, name) for name in ITEM_FIELDS}
        if not any(items.values()):
            return self.model_copy(update={"value": self.origin.value})
        return self.model_copy(
            update={
                **items,
                "value": self.origin.value,
                "answers_digest": "",
                "likelihoods_digest": "",
            }
        )

    @property
    def outcomes(self) -> str:
        """Per-item outcomes, "1" right and "0" wrong."""
        unpacked = np.unpackbits(np.frombuffer(_bits(self.packed), dtype=np.uint8), count=self.n)
        return (unpacked + ord("0")).tobytes().decode()

    @property
    def numbers(self) -> tuple[float, ...]:
        """The value of every item; empty where items have none."""
        return self.values or (
            tuple(float(mark == "1") for mark in self.outcomes) if self.packed else ()
        )

    def format_value(self, value: float | None = None) -> str:
        """Write the figure, or another one of this task, as tables do."""
        value = self.value if value is None else value
        return (
            f"{100 * value:.1f} %"
            if self.unit == "share" and self.kind != "perplexity"
            else f"{value:.3f}"
        )


def _margin_is_one(owner: "FrozenRow | Baseline") -> str:
    """Return what is wrong where a margin is no share that could be kept or lost."""
    if owner.margin is None:
        return ""
    return (
        "" if 0 < owner.margin < 1 else f"{owner.margin:g} is no share that could be kept or lost"
    )


def _tasks_are_distinct(row: "FrozenRow") -> str:
    """Return what is wrong where a task was frozen twice."""
    tasks = [score.task for score in row.scores]
    duplicate = next((task for task in tasks if tasks.count(task) > 1), None)
    return f"{duplicate} stands there twice" if duplicate else ""


class FrozenRow(_BaselinePart):
    """One record: its row and seed, the conditions it was made and scored under, and its scores."""

    checks: ClassVar[Checks] = (
        ("margin", _margin_is_one),
        ("scores", _tasks_are_distinct),
        *nonnegative_fields("weight_bytes"),
    )

    label: str
    seed: int | None
    key: str
    control: bool = False
    trains: bool = False
    student_digest: str | None
    weight_bytes: int | None
    conditions: dict[str, str]
    machine: dict[str, str]
    # shown, never compared: seconds of two jobs are not
    decode_speedup: tuple[float, float | None, float | None] | None = None
    scores: tuple[FrozenScore, ...]
    # its own claim, in place of the baseline's, where it never met that
    margin: float | None = None
    points: bool = False  # of its own claim: what may be lost

    @staticmethod
    def conditions_of(record: RunRecord) -> dict[str, str]:
        """Return what must be equal before two records of a row are compared."""
        version = record.environment.versions.get(LM_EVAL) if record.environment else None
        scorer = {LM_EVAL: version} if version else {}
        return {
            **baseline_conditions(record.conditions, ("every row", *row_kinds(record))),
            "path": record.path,
            **scorer,
        }

    @staticmethod
    def machine_of(record: RunRecord) -> dict[str, str]:
        """Return the machine and versions within which answers must agree exactly."""
        environment = record.environment
        if environment is None:
            return {}
        versions = {
            name: environment.versions.get(name, "")
            for name in ("torch", "transformers", "tokenizers")
        }
        gpu = {"gpu": str(environment.gpu)} if environment.gpu else {}
        return {
            "machine": environment.machine,
            "platform": environment.platform,
            "threads": str(environment.threads),
            **gpu,
            **versions,
        }


class Change(_BaselinePart):
    """One move of the baseline."""

    reason: str
    date: str
    commit: str | None
    rows: tuple[str, ...]
    accepted: tuple[str, ...] = ()  # regressions that this move made the new standard
    # scores whose first accepted value started anew: other items, another scoring or other
    # conditions
    anew: tuple[str, ...] = ()


def _rows_are_distinct(baseline: "Baseline") -> str:
    """Return what is wrong where a row and seed was frozen twice."""
    rows = [(row.label, row.seed) for row in baseline.rows]
    duplicate = next((row for row in rows if rows.count(row) > 1), None)
    if duplicate is None:
        return ""
    label, seed = duplicate
    return f"{label}{'' if seed is None else f' (seed {seed})'} stands there twice"


def _history_is_there(baseline: "Baseline") -> str:
    """Return what is wrong where no move is written down: this program always writes a reason."""
    return "" if baseline.history else "no move; a baseline has one for every reason that was given"


class Baseline(_BaselinePart):
    """Everything in the file."""

    checks: ClassVar[Checks] = (
        ("margin", _margin_is_one),
        ("rows", _rows_are_distinct),
        ("history", _history_is_there),
    )

    schema_number: int = Field(default=SCHEMA, alias="schema")
    kind: Literal["baseline"] = "baseline"
    margin: float | None = None
    points: bool = False
    history: tuple[Change, ...]
    rows: tuple[FrozenRow, ...]
    digest: str = ""

    @property
    def labels(self) -> frozenset[str]:
        """Labels of the frozen rows."""
        return frozenset(row.label for row in self.rows)

    @property
    def first(self) -> "Baseline":
        """The same rows with their first accepted scores."""
        rows = tuple(
            row.model_copy(update={"scores": tuple(score.first for score in row.scores)})
            for row in self.rows
        )
        return self.model_copy(update={"rows": rows})

    def last_change(self, label: str) -> Change:
        """Return the last move of a row."""
        return next(
            (change for change in reversed(self.history) if label in change.rows), self.history[-1]
        )


def freeze_record(record: RunRecord) -> FrozenRow:
    """Freeze one record that succeeded."""
    speedup = record.measurement("decode_speedup")
    return FrozenRow(
        label=record.label,
        seed=record.seed,
        key=record.key,
        control=record.is_control,
        trains=record.trains,
        student_digest=record.student.digest if record.student else None,
        weight_bytes=record.student.weight_bytes if record.student else None,
        conditions=FrozenRow.conditions_of(record),
        machine=FrozenRow.machine_of(record),
        scores=tuple(map(freeze_score, record.scores)),
        decode_speedup=(speedup.value, speedup.low, speedup.high) if speedup else None,
    )


def freeze_score(score: TaskScore) -> FrozenScore:
    """Freeze one score of a record."""
    marks = score.outcomes.get(score.primary, "") if score.primary not in score.values else ""
    bits = (
        np.packbits(np.frombuffer(marks.encode(), dtype=np.uint8) - ord("0")).tobytes()
        if marks
        else b""
    )
    return FrozenScore(
        task=score.task,
        version=score.version,
        kind=score.kind,
        primary=score.primary,
        n=score.n,
        value=score.value,
        items_digest=score.items_digest,
        answers_digest=score.answers_digest,
        likelihoods_digest=score.likelihoods_digest,
        invalid_share=score.invalid_share,
        packed=base64.b64encode(zlib.compress(bits, 9)).decode() if marks else "",
        totals=score.totals,
        truncated_share=score.truncated_share,
        tokens=score.tokens_per_answer,
        values=score.values.get(score.primary, ()),
        parts=score.parts,
        metric=score.metric,
        unit=score.unit,
        unpaired=score.unpaired,
        form=score.form,
        statistics=score.statistics,
    )


def _digest(data: Mapping[str, Any]) -> str:
    return digest_of({name: value for name, value in data.items() if name != "digest"})


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Write a baseline with its digest, whole or not at all; the same rows give the same bytes."""
    data = baseline.model_dump(mode="json", by_alias=True)
    data["digest"] = _digest(data)
    write_atomically(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def read_baseline(path: Path) -> Baseline:
    """Read a baseline.

    Raises `HarnessError` with the file and the way out for one that is none, is newer than this
    version, or was edited by hand.
    """
    if not path.exists():
        raise HarnessError(
            f"no baseline at {path}; type: harness baseline update RECORDS --baseline {path} "
            "--reason 'first baseline'"
        )
    try:
        data = read_json(path)
    except Unreadable as problem:
        raise HarnessError(f"{problem}; take it back from git") from problem
    if not isinstance(data, dict) or data.get("kind") != "baseline":
        raise HarnessError(
            f"{path}: not a baseline; give the file that harness baseline update wrote"
        )
    if type(data.get("schema")) is not int or not 1 <= data["schema"] <= SCHEMA:
        raise HarnessError(
            f"{path}: schema {data.get('schema')}, this version reads up to {SCHEMA}; upgrade "
            "compression-harness"
        )
    if data.get("digest") != _digest(data):
        raise HarnessError(
            f"{path}: edited by hand (its digest differs); take it back from git, or delete it and "
            "freeze the rows anew"
        )
    try:
        while data["schema"] != SCHEMA:
            data = _MIGRATIONS[data["schema"]](data)
    except (AttributeError, LookupError, TypeError) as problem:
        raise HarnessError(
            f"{path}: not a whole baseline of schema {data['schema']} ({problem}); take it back "
            "from git"
        ) from problem
    try:
        return Baseline.model_validate(data, context=consistency.READING_CONTEXT)
    except ValidationError as problem:
        reason = consistency.first_problem(problem)
        raise HarnessError(
            f"{path}: {reason}; take it back from git, or delete it and freeze the rows anew"
        ) from problem


def _with_origins(old: dict[str, Any]) -> dict[str, Any]:
    """Migrate to schema 2, which keeps first accepted values.

    A baseline that did not keep them gets those that it holds, since its last move of the row.
    """

    def origin(row: dict[str, Any], score: dict[str, Any]) -> dict[str, Any]:
        last_change = next(
            (change for change in reversed(old["history"]) if row["label"] in change["rows"]),
            {"date": "", "reason": ""},
        )
        return {
            "value": score["value"],
            "date": last_change["date"],
            "reason": last_change["reason"],
        }

    rows = [
        {**row, "scores": [{**score, "origin": origin(row, score)} for score in row["scores"]]}
        for row in old["rows"]
    ]
    return {**old, "schema": 2, "rows": rows}


def _by_new_names(old: dict[str, Any]) -> dict[str, Any]:
    """Migrate to schema 3: labels, in the history too, have the current names of settings."""
    rows = [{**row, "label": current_label(row["label"])} for row in old["rows"]]
    fields_of_labels = ("rows", "accepted", "anew")

    def by_new_names(change: dict[str, Any]) -> dict[str, Any]:
        present = [name for name in fields_of_labels if name in change]
        return change | {name: [current_label(label) for label in change[name]] for name in present}

    history = [by_new_names(change) for change in old["history"]]
    return {**old, "schema": 3, "rows": rows, "history": history}


_MIGRATIONS: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: _with_origins,
    2: _by_new_names,
}


LM_EVAL = "lm-eval"  # the condition that baselines of schema 1 do not hold
