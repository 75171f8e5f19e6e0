"""What `harness recommend` says, for people and for programs. No torch."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from harness.analysis.decision import (
    Answer,
    Candidate,
    Decision,
    Question,
    Standing,
    TaskEvidence,
    bytes_text,
)
from harness.errors import HarnessError, unknown
from harness.escape import clean, clean_all
from harness.files.writing import nonfinite_as_null
from harness.records import columns
from harness.records.record import TEACHER, RunRecord

KEPT_HEADER = "kept"
CANDIDATE_HEADERS = [
    columns.VERDICT.header,
    columns.ROW.header,
    KEPT_HEADER,
    columns.P_HOLM.header,
    columns.DECODE_X.header,
    columns.DISK.header,
    columns.PEAK.header,
    columns.WHY.header,
]


def refuse_question(question: Question, records: Sequence[RunRecord]) -> None:
    """Raise `HarnessError` for a question that these records cannot answer, or nobody could."""
    if not 0 < question.alpha < 0.5:
        raise HarnessError(
            f"--alpha {question.alpha:g}: give a share between 0 and 0.5, such as 0.05"
        )
    for flag, ratio in (("--faster", question.faster), ("--smaller", question.smaller)):
        if ratio is not None and ratio <= 0:
            raise HarnessError(f"{flag} {ratio:g}: give a ratio to the teacher above 0, such as 2")
    tasks = list(dict.fromkeys(score.task for record in records for score in record.scores))
    for task in question.tasks:
        if task not in tasks:
            raise unknown("task", task, tasks, hint="(in --on)")
    labels = list(dict.fromkeys(record.label for record in records if record.method != TEACHER))
    for label in question.rows:
        if label not in labels:
            raise unknown("row", label, labels, hint="(in --rows)")
    if not any(record.method == TEACHER and record.status == "success" for record in records):
        raise HarnessError(
            "these records have no teacher that succeeded: nothing says what should be kept; give "
            "a run with its teacher's row"
        )


def asked_text(question: Question) -> str:
    """Return what was asked, in one line."""
    parts = [f"the {question.take} row that {question.claim} on {_tasks_text(question)}"]
    if question.memory is not None:
        parts.append(f"within {bytes_text(question.memory)}")
    if question.faster is not None:
        parts.append(f"at {question.faster:g} times the teacher's decode speed")
    if question.smaller is not None:
        parts.append(f"{question.smaller:g} times smaller on disk")
    return ", ".join(parts)


def _tasks_text(question: Question) -> str:
    return " and ".join(question.tasks) if question.tasks else "every task"


def answer_text(decision: Decision) -> str:
    """Return the answer in one line."""
    if decision.answer is Answer.no_row:
        return f"no row can: {decision.reason or 'each is shown to miss something that was asked'}"
    assert decision.row is not None
    row = decision.row
    if decision.answer is Answer.take:
        holding = sum(row.standing is Standing.holds for row in decision.candidates)
        return f"take {row.label}: the {decision.question.take} of {holding} that hold"
    more = decision.more_items
    items = f"about {more:,} more items" if more else "; ".join(row.reasons)
    return f"cannot tell: {items} (nearest: {row.label})"


def decision_text(decision: Decision) -> str:
    """Return the candidates, what was asked and the answer, for a terminal."""
    from tabulate import tabulate

    shared = shared_reasons(decision)
    rows = [
        [clean(text) for text in candidate_cells(candidate, shared)]
        for candidate in decision.candidates
    ]
    table = tabulate(rows, headers=CANDIDATE_HEADERS, tablefmt="plain", disable_numparse=True)
    parts = (
        table if rows else "",
        *(f"every row: {reason}" for reason in shared),
        f"asked: {asked_text(decision.question)}",
        family_text(decision),
        answer_text(decision),
    )
    return "\n".join(clean(part) if part is not parts[0] else part for part in parts if part)


def family_text(decision: Decision) -> str:
    """Return how retention was tested, in one line; "" where nothing was."""
    if not decision.tests:
        return ""
    return (
        f"retention: one-sided alpha {decision.question.alpha:g}, Holm over {decision.tests} rows "
        "(of choices: above chance); brackets hold each row's own 95 % interval"
    )


def shared_reasons(decision: Decision) -> list[str]:
    """Return the reasons that hold of every candidate, which are said once and not in each row."""
    first, *others = decision.candidates or (None,)
    if first is None or not others:
        return []
    return [reason for reason in first.reasons if all(reason in row.reasons for row in others)]


def candidate_cells(candidate: Candidate, shared: Sequence[str] = ()) -> list[str]:
    """Return a candidate's cells under `CANDIDATE_HEADERS`, without the reasons in `shared`."""
    is_tested = any(not task.reason for task in candidate.tasks)
    return [
        candidate.standing.value,
        candidate.label,
        ", ".join(map(_task_text, candidate.tasks)) or columns.DASH,
        columns.P_HOLM.text(candidate.p_kept if is_tested else None),
        columns.DECODE_X.with_interval(candidate.speed),
        columns.DISK.text(columns.DISK.scaled(candidate.disk)),
        columns.PEAK.text(columns.PEAK.scaled(candidate.memory)),
        "; ".join(reason for reason in candidate.reasons if reason not in shared),
    ]


def _task_text(task: TaskEvidence) -> str:
    if task.retention.value is None:
        return f"{task.task} {columns.DASH}"
    return f"{task.task} {columns.RETENTION.with_interval(task.retention)}"


def decision_json(decision: Decision) -> str:
    """Return the whole decision as JSON."""
    values = {
        "schema": 1,
        "answer": decision.answer.value,
        "exit_code": decision.exit_code,
        "row": decision.row.label if decision.row else None,
        "more_items": decision.more_items,
        "said": answer_text(decision),
        "question": asdict(decision.question),
        "tests": decision.tests,
        "candidates": [_candidate_values(candidate) for candidate in decision.candidates],
    }
    cleaned = clean_all(nonfinite_as_null(values))
    return json.dumps(cleaned, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _candidate_values(candidate: Candidate) -> dict[str, Any]:
    values = asdict(candidate)
    for part in (values["speed"], *(task["retention"] for task in values["tasks"])):
        del part["sources"]
    return values
