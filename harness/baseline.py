"""Frozen records: per-item outcomes, bytes and conditions of rows that were accepted, in one file small enough for git. No torch.

A file holds the digest of everything else in it, so that an edit by hand is found; it moves by `harness baseline update` with a reason,
never from a failed, limited or dirty run. 1,000 outcomes are 125 bytes before compression.
"""

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness.checkpoint import digest_of, write_whole
from harness.errors import HarnessError
from harness.gate import Checked, Rules, Verdict, check
from harness.groups import TEACHER
from harness.record import RunRecord, TaskScore
from harness.stats import pairs
from harness.store import twice

SCHEMA = 1


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class FrozenScore(_Frozen):
    """One task of a row: what it scored, item by item."""

    task: str
    version: str
    kind: Literal["generate", "choose", "perplexity"]
    primary: str
    n: int
    value: float
    items_digest: str
    answers_digest: str
    packed: str = ""  # outcomes of the primary extractor: bits, deflated, base64
    totals: tuple[tuple[float, float], ...] = ()
    values: tuple[float, ...] = ()  # of items that carry numbers
    parts: tuple[tuple[int, float], ...] = ()
    metric: str = ""
    unit: Literal["share", "number"] = "share"
    unpaired: str = ""
    form: str = ""  # of a figure of all items together
    statistics: tuple[str, ...] = ()  # what each item adds to it
    invalid_share: float = 0.0
    truncated_share: float | None = None
    tokens: float | None = None  # an answer, mean

    @property
    def outcomes(self) -> str:
        """Per-item outcomes, "1" right and "0" wrong."""
        bits = np.unpackbits(np.frombuffer(zlib.decompress(base64.b64decode(self.packed)), dtype=np.uint8), count=self.n)
        return (bits + ord("0")).tobytes().decode()

    @property
    def numbers(self) -> tuple[float, ...]:
        """The value of every item; empty where items have none."""
        return self.values or (tuple(float(mark == "1") for mark in self.outcomes) if self.packed else ())

    def shown(self) -> str:
        """Write the figure as tables do."""
        return f"{100 * self.value:.1f} %" if self.unit == "share" and self.kind != "perplexity" else f"{self.value:.3f}"


class FrozenRow(_Frozen):
    """One record: its row and seed, the conditions it was made and scored under, and its scores."""

    label: str
    seed: int | None
    key: str
    control: bool = False
    trains: bool = False
    student_digest: str | None
    weight_bytes: int | None
    conditions: dict[str, str]
    machine: dict[str, str]
    decode_speedup: tuple[float, float | None, float | None] | None = None  # shown, never compared: seconds of two jobs are not
    scores: tuple[FrozenScore, ...]

    @staticmethod
    def conditions_of(record: RunRecord) -> dict[str, str]:
        """Return what must be equal before two records of a row are compared."""
        made = {} if record.method == TEACHER else {"student": record.student_recipe, "student base": record.student_base.digest}
        trained = {"budget": f"{record.budget_tokens} tokens, {record.budget_rows} items"} if record.trains else {}
        return {
            "teacher": " ".join(one.digest for one in record.teachers), "device": record.device, "dtype": record.dtype, "path": record.path,
            "prompts": f"chat {record.system or ''}" if record.chat else "plain",
            "limited": "yes" if record.limited else "no", **made, **trained,
        }  # fmt: skip

    @staticmethod
    def machine_of(record: RunRecord) -> dict[str, str]:
        """Return within what answers must agree to the last: processor, GPU, platform, threads, versions."""
        known = record.environment
        if known is None:
            return {}
        versions = {name: known.versions.get(name, "") for name in ("torch", "transformers", "tokenizers")}
        gpu = {"gpu": str(known.gpu)} if known.gpu else {}
        return {"machine": known.machine, "platform": known.platform, "threads": str(known.threads), **gpu, **versions}


class Change(_Frozen):
    """One move of the baseline."""

    reason: str
    date: str
    commit: str | None
    rows: tuple[str, ...]
    accepted: tuple[str, ...] = ()  # regressions that this move made the new standard


class Baseline(_Frozen):
    """Everything in the file."""

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


def freeze(record: RunRecord) -> FrozenRow:
    """Freeze one record that succeeded."""
    speed = record.measured("decode_speedup")
    return FrozenRow(
        label=record.label, seed=record.seed, key=record.key, control=record.is_control, trains=record.trains,
        student_digest=record.student.digest if record.student else None,
        weight_bytes=record.student.weight_bytes if record.student else None, conditions=FrozenRow.conditions_of(record),
        machine=FrozenRow.machine_of(record), scores=tuple(map(_freeze_score, record.scores)),
        decode_speedup=(speed.value, speed.low, speed.high) if speed else None,
    )  # fmt: skip


def _freeze_score(score: TaskScore) -> FrozenScore:
    marks = score.outcomes.get(score.primary, "") if score.primary not in score.values else ""
    bits = np.packbits(np.frombuffer(marks.encode(), dtype=np.uint8) - ord("0")).tobytes() if marks else b""
    return FrozenScore(
        task=score.task, version=score.version, kind=score.kind, primary=score.primary, n=score.n, value=score.value,
        items_digest=score.items_digest, answers_digest=score.answers_digest, invalid_share=score.invalid_share,
        packed=base64.b64encode(zlib.compress(bits, 9)).decode() if marks else "", totals=score.totals,
        truncated_share=score.truncated_share, tokens=score.tokens_per_answer, values=score.values.get(score.primary, ()),
        parts=score.parts, metric=score.metric, unit=score.unit, unpaired=score.unpaired, form=score.form, statistics=score.statistics,
    )  # fmt: skip


def _digest(data: Mapping[str, Any]) -> str:
    return digest_of({name: value for name, value in data.items() if name != "digest"})


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Write a baseline with its digest, whole or not at all; the same rows give the same bytes."""
    data = baseline.model_dump(mode="json", by_alias=True)
    data["digest"] = _digest(data)
    write_whole(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def read_baseline(path: Path) -> Baseline:
    """Read a baseline; a file that is none, is newer, or was edited by hand raises `HarnessError` naming it and the way out."""
    if not path.is_file():
        raise HarnessError(f"no baseline at {path}; type: harness baseline update RECORDS --baseline {path} --reason 'first baseline'")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as problem:
        raise HarnessError(f"{path}: not a whole JSON file ({problem}); take it back from git") from problem
    if not isinstance(data, dict) or data.get("kind") != "baseline":
        raise HarnessError(f"{path}: not a baseline; give the file that harness baseline update wrote")
    if data.get("schema") != SCHEMA:
        raise HarnessError(f"{path}: schema {data.get('schema')}, this version reads {SCHEMA}; upgrade compression-harness")
    if data.get("digest") != _digest(data):
        raise HarnessError(f"{path}: edited by hand (its digest differs); take it back from git, or delete it and freeze the rows anew")
    try:
        return Baseline.model_validate(data)
    except ValidationError as problem:
        first = problem.errors()[0]
        raise HarnessError(f"{path}: field {'.'.join(map(str, first['loc']))}: {first['msg']}") from problem


CLAIM = 0.95  # of the teacher's score: what is asked where neither a margin nor a baseline says


def rules_of(baseline: Baseline | None, rules: Rules) -> Rules:
    """Take the margin of the baseline where the rules have none, the usual claim where there is no baseline either."""
    if rules.margin is not None:
        return rules
    return replace(rules, margin=CLAIM) if baseline is None else replace(rules, margin=baseline.margin, points=baseline.points)


def update(
    path: Path,
    records: Sequence[RunRecord],
    *,
    reason: str,
    rules: Rules,
    rows: Sequence[str] = (),
    accept: bool = False,
    drop: bool = False,
) -> tuple[Baseline, Baseline | None, Checked | None]:
    """Freeze records into `path`; return the new baseline, the old one, and what the check against the old one said.

    Refuses without a reason, from failed, limited or dirty runs, two records of one row and seed, two teachers, and, unless `accept`, from
    a run that the old baseline calls regressed, unless `drop`, one that lacks frozen rows. With `rows` only these (and the teacher) move.
    """
    if not reason.strip():
        raise HarnessError("--reason is empty; say in a few words why the baseline moves")
    wanted = [one for one in records if not rows or one.label in rows or one.label == TEACHER]
    for label in rows:
        if label not in {one.label for one in records}:
            raise HarnessError(f"no record of the row {label!r}; there are: {', '.join(sorted({one.label for one in records}))}")
    _fit_to_freeze(wanted)
    old = read_baseline(path) if path.exists() else None
    checked = check(wanted, Rules(rows=tuple(rows), exact=False), old) if old is not None else None
    regressed = [one for one in checked.findings if one.verdict is Verdict.regressed] if checked else []
    if regressed and not accept:
        raise HarnessError(
            f"{path} does not move: {regressed[0].name} regressed ({regressed[0].told}); mend it, or accept it with --accept-regression"
        )
    fresh = {(row.label, row.seed): row for row in map(freeze, wanted)}
    left = [row for row in (old.rows if old else ()) if (row.label, row.seed) not in fresh]
    if left and not rows and not drop:
        raise HarnessError(
            f"{path} holds {left[0].label}, of which there is no record here; move single rows with --rows, or drop it with --drop"
        )
    stay = left if rows else []
    teachers = {row.conditions["teacher"] for row in (*stay, *fresh.values())}
    if len(teachers) > 1:
        raise HarnessError(f"{path}: its other rows have another teacher than these records; freeze all rows of the new teacher together")
    frozen = sorted([*stay, *fresh.values()], key=lambda row: (row.label != TEACHER, row.label, row.seed or 0))
    environment = next((one.environment for one in wanted if one.environment), None)
    change = Change(
        reason=reason.strip(), date=max(one.created for one in wanted), commit=environment.commit if environment else None,
        rows=tuple(dict.fromkeys(row.label for row in fresh.values())), accepted=tuple(one.name for one in regressed),
    )  # fmt: skip
    made = Baseline(
        margin=rules.margin if rules.margin is not None else old.margin if old else None,
        points=rules.points if rules.margin is not None else old.points if old else False,
        history=(*(old.history if old else ()), change), rows=tuple(frozen),
    )  # fmt: skip
    write_baseline(path, made)
    return made, old, checked


def _fit_to_freeze(records: Sequence[RunRecord]) -> None:
    """Refuse what no baseline may be made of, naming the first reason."""
    if not any(one.status == "success" and one.method != TEACHER for one in records):
        raise HarnessError("there is no row that succeeded to freeze; type first: harness run --methods ...")
    if double := twice(records):
        raise HarnessError(f"two records of {double}; name one run's file (results/runs/runs/NAME.json) in place of the store")
    for one in records:
        name = f"{one.label}{f' (seed {one.seed})' if one.seed is not None else ''}"
        if one.status != "success":
            raise HarnessError(f"{name} {one.status}: {one.reason}; a baseline is made of whole runs: mend it, or name others with --rows")
        if one.limited:
            raise HarnessError(f"{name} was scored on a sample of the items; run it again without --limit before you freeze it")
        if one.environment and one.environment.dirty:
            raise HarnessError(f"{name} was made from a working tree with changes; commit them and run again: its code must be found")
    teachers = {" ".join(teacher.digest for teacher in one.teachers) for one in records}
    if len(teachers) > 1:
        raise HarnessError(f"the records have {len(teachers)} different teachers; a baseline has one: name one run's file")


Line = dict[str, str]


def rows_shown(baseline: Baseline) -> list[Line]:
    """Return what `harness baseline show` prints, a line a row and task."""
    lines: list[Line] = []
    for row in baseline.rows:
        for score in row.scores:
            shown = score.shown()
            speed = "-" if row.decode_speedup is None else f"{row.decode_speedup[0]:.2f}"
            size = "-" if row.weight_bytes is None else f"{row.weight_bytes:,}"
            seed = "-" if row.seed is None else str(row.seed)
            lines.append({"row": row.label, "seed": seed, "task": f"{score.task}@{score.version}", "n": f"{score.n:,}", "score": shown,
                          "bytes": size, "decode x": speed})  # fmt: skip
    return lines


def difference(old: Baseline | None, new: Baseline) -> list[Line]:
    """Return what changed between two baselines, a line a row and task: scores, items lost and won, bytes."""
    before = {(row.label, row.seed, score.task): (row, score) for row in (old.rows if old else ()) for score in row.scores}
    after = {(row.label, row.seed, score.task): (row, score) for row in new.rows for score in row.scores}
    lines: list[Line] = []
    for key in sorted(dict.fromkeys([*before, *after]), key=lambda one: (one[0] != TEACHER, one[0], one[1] or 0, one[2])):
        label, seed, task = key
        line = {"row": label, "seed": "-" if seed is None else str(seed), "task": task}
        then, now = before.get(key), after.get(key)
        if then is None or now is None:
            there = now or then
            assert there is not None
            lines.append(
                {**line, "change": "new" if then is None else "gone", "score": f"{there[1].value:.4f}", "lost/won": "-", "bytes": "-"}
            )
            continue
        moved = then[1].answers_digest != now[1].answers_digest or then[1].items_digest != now[1].items_digest
        flips = "-"
        if then[1].items_digest == now[1].items_digest and then[1].packed and now[1].packed:
            counts = pairs(then[1].outcomes, now[1].outcomes)
            flips = f"{counts.teacher_only}/{counts.student_only}"
        size = "same" if then[0].weight_bytes == now[0].weight_bytes else f"{then[0].weight_bytes:,} -> {now[0].weight_bytes:,}"
        change = "other items" if then[1].items_digest != now[1].items_digest else "answers" if moved else "none"
        lines.append({**line, "change": change, "score": f"{then[1].value:.4f} -> {now[1].value:.4f}", "lost/won": flips, "bytes": size})
    return lines
