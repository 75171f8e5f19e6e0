"""What a reader must know to trust a table: conditions, resolution, warnings, reasons for dashes.
No torch.
"""

from collections.abc import Sequence

from harness.analysis.comparison import Group, best_labels, compare, teacher_at_chance
from harness.records import columns
from harness.records.record import TEACHER, RunRecord
from harness.reporting.costs import row_scenario, table_scenario


def group_notes(group: Group) -> list[str]:
    """What a reader must know to trust the table: conditions, resolution, reasons for dashes."""
    return [
        *_conditions(group),
        *_task_notes(group),
        *_scoring_notes(group),
        *_failed_cells(group),
        *_packed_weights(group),
        *_trained_once(group),
        *_uneven_teacher_timings(group),
        *_rows_no_better_than_start(group),
        *_tasks_not_trained_on(
            group, "tasks_without_trace", "WARNING: not trained, no trace survived: "
        ),
        *_tasks_not_trained_on(group, "tasks_without_split", "not trained on: "),
        *_own_data(group),
        *_doubtful_measurements(group),
        *_rows_of_other_scenarios(group),
        *_reasons_for_no_retention(group),
        *_how_to_read(group),
    ]


def _conditions(group: Group) -> list[str]:
    """Say what all rows share: teacher, student, budget, machine, type, scoring path, tasks."""
    shared = group.shared
    student, budget = _student_name(group) or "none", shared.get("budget")
    fewer = "(`answer-only` by default sees each item as often as `sft` does, in fewer tokens)"
    trained = (
        f", student {student}; {budget} for each trained row {fewer}"
        if budget
        else "; nothing was trained"
    )
    gpu = f"{shared['gpu']}; " if shared.get("gpu") else ""
    return [
        f"Teacher {shared['teacher']}{trained}.",
        f"Device {shared['device']} ({gpu}{shared.get('machine', '-')}, "
        f"{shared.get('threads', '-')} threads), {shared['dtype']}; "
        f"scoring path {shared.get('path', '-')}; {shared['tasks']}.",
    ]


def _own_data(group: Group) -> list[str]:
    """Say on which data of the user's own rows were trained and calibrated, and how many examples
    were left out because they hold evaluation items.
    """
    trained, calibrated = (group.shared.get(name) for name in ("training data", "calibration data"))
    lines = [f"Trained on {trained}, in place of the tasks' train splits."] if trained else []
    if calibrated:
        lines.append(f"Calibrated on {calibrated}.")
    return lines + [
        f"{count:,} examples of {name} hold evaluation items and were left out."
        for name, count in _dropped_examples(group).items()
    ]


def _dropped_examples(group: Group) -> dict[str, int]:
    """Return how many examples of each data set were left out, of those that lost any."""
    dropped: dict[str, int] = {}
    for row in group.rows:
        for record in row.records:
            notes = record.cost.notes.get("train_data")
            for name, counts in notes.items() if isinstance(notes, dict) else ():
                count = counts.get("dropped_for_evaluation_text") if isinstance(counts, dict) else 0
                if isinstance(count, int) and count:
                    dropped[name] = count
    return dropped


def _task_notes(group: Group) -> list[str]:
    """Say what bears on each task's figures."""
    if group.teacher is None and group.tasks:
        return ["The teacher's row did not succeed: no retention can be given."]
    return [
        line
        for task in group.tasks
        for line in (*_kind_of_figure(group, task), *_task_warnings(group, task))
    ]


def _scoring_notes(group: Group) -> list[str]:
    """Say in what form prompts were shown, whether items are a sample, and what was done to
    teachers' weights to open them.
    """
    lines = (
        [f"Prompts are shown in the {group.shared['prompts']}."] if group.shared["prompts"] else []
    )
    if group.shared["limited"]:
        lines.append(
            "A TRIAL: scored on a sample of the items (--limit); not for quoting, and no baseline."
        )
    teachers = [
        one for row in group.rows for record in row.records for one in record.conditions.teachers
    ]
    return [*lines, *dict.fromkeys(f"{one.name}: {one.note}." for one in teachers if one.note)]


def _failed_cells(group: Group) -> list[str]:
    """Name the cells that did not succeed, with their reasons, and how many records are not
    shown.
    """
    lines = [
        f"{row.label}{_seed_text(record)} {record.status}: {record.reason}"
        for row in group.rows
        for record in row.records
        if record.status != "success"
    ]
    return (
        [*lines, f"{group.superseded} older records of the same rows are not shown."]
        if group.superseded
        else lines
    )


def _seed_text(record: RunRecord) -> str:
    return f" (seed {record.seed})" if record.seed is not None else ""


def _rows_of_other_scenarios(group: Group) -> list[str]:
    """Name the rows that were timed under another scenario than the table's."""
    others = [row for row in group.rows if row_scenario(row) not in ("", table_scenario(group))]
    if not others:
        return []
    scenarios = ", ".join(dict.fromkeys(map(row_scenario, others)))
    labels = ", ".join(row.label for row in others)
    return [f"{labels}: timed under another scenario than the table's ({scenarios}): dashes."]


def _reasons_for_no_retention(group: Group) -> list[str]:
    """Say why a row that has a score has no retention."""
    pairs = [
        (row, task) for row in group.rows if row.succeeded for task in group.tasks if group.teacher
    ]
    scored = [
        (row, task) for row, task in pairs if any(score.retains for score in row.scores(task))
    ]
    reasons = [
        (row, task, compare(row, group.teacher, task, ratio=True).reason)
        for row, task in scored
        if group.teacher
    ]
    return [
        f"{row.label}, {task}: no retention, {reason}." for row, task, reason in reasons if reason
    ]


def _how_to_read(group: Group) -> list[str]:
    """Say what bold, verdicts and dashes mean."""
    lines = []
    if any(best_labels(group, task) for task in group.tasks):
        lines.append(
            "Bold: the best row that is no control, and all that are not significantly worse on "
            "the same items (alpha .05, Holm)."
        )
    if any(row.first.controls for row in group.rows):
        lines.append(
            "Verdicts against controls hold for the whole table (Holm, alpha .05); each interval "
            "is of its line alone."
        )
    return [
        *lines,
        "A dash: not measured for this row (no training, no teacher, a choice task writes no "
        "tokens), or undefined there.",
    ]


def _kind_of_figure(group: Group, task: str) -> list[str]:
    """Say of a task what is not as it is with right and wrong answers: why nothing is paired, which
    way is better, what counts how much.
    """
    scores = [score for row in group.rows for score in row.scores(task)]
    lines = [
        f"{task}: no retention and no flips: {why}."
        for why in dict.fromkeys(score.unpaired for score in scores)
        if why
    ]
    first = scores[0] if scores else None
    if first is not None and first.kind != "perplexity" and first.lower_is_better:
        said = f"{first.metric or first.primary} is better when lower"
        lines.append(
            f"{task}: {said}: it stands under {columns.ERROR.header}, and a ratio below 1 is "
            "better."
        )
    if any(score.values for score in scores) and not any(score.unpaired for score in scores):
        lines.append(
            f"{task}: items carry numbers, so intervals are those of paired means and there are no "
            "flips."
        )
    if first is not None and first.form:
        lines.append(
            f"{task}: all items make its {first.metric} together; its intervals are of items drawn "
            "again, the same for both models."
        )
    if first is not None and first.signed:
        lines.append(
            f"{task}: no retention: {first.metric} may be below zero, and a ratio of two says "
            "nothing; see the difference."
        )
    if any(
        score.parts and (not score.form or len({weight for _, weight in score.parts}) > 1)
        for score in scores
    ):
        lines.append(
            f"{task}: its {len(next(score.parts for score in scores if score.parts))} tasks count "
            "alike, whatever their size."
        )
    return lines


def _packed_weights(group: Group) -> list[str]:
    """Say of every row whose weights were packed how many bits they take, and what table and head
    became.
    """
    lines = []
    for row in group.rows:
        for told in row.succeeded[0].cost.notes.values() if row.succeeded else ():
            if not isinstance(told, dict) or "bits_per_weight" not in told:
                continue
            each = (
                f" ({told['bits_of_a_packed_weight']:g} in the blocks)"
                if "bits_of_a_packed_weight" in told
                else ""
            )
            head = {
                "int8": "; table and head in int8",
                "skip": "; table and head as they were",
            }.get(str(told.get("table_and_head")), "")
            skipped = told.get("skipped")
            left = (
                f"; left as they were: {', '.join(map(str, skipped))}"
                if isinstance(skipped, list) and skipped
                else ""
            )
            lines.append(
                f"{row.label}: {told['bits_per_weight']:g} bits on disk for each weight of the "
                f"model{each}{head}{left}."
            )
    return lines


def _rows_no_better_than_start(group: Group) -> list[str]:
    """Name the trained rows that no epoch made better, on held-out rows, than they were before the
    first step.
    """
    lines = []
    for row in group.rows:
        for record in row.succeeded:
            start, best = (record.cost.notes.get(name) for name in ("start_ce", "best_ce"))
            if isinstance(start, float) and isinstance(best, float) and best >= start:
                seen = (
                    f"no epoch's held-out loss was below that of the untouched start ({best:.4g} "
                    f"against {start:.4g})"
                )
                lines.append(
                    f"{row.label}{_seed_text(record)}: "
                    f"{seen}{'' if record.conditions.tuned else '; try --tune'}."
                )
    return lines


def _trained_once(group: Group) -> list[str]:
    """Name the rows of which one draw was made: their checkpoints are judged, their methods are
    not.
    """
    once = [row.label for row in group.rows if row.trained_once]
    if not once:
        return []
    return [
        f"{', '.join(once)}: one training (or draw) each. Retention is of this checkpoint; whether "
        "the method is better than another one "
        "is not judged, and nothing stands in bold beside it: --seeds 3 asks for more."
    ]


def _uneven_teacher_timings(group: Group) -> list[str]:
    """Say where the teacher, timed by turns with itself, was not as fast as itself: one interval in
    twenty misses 1 by chance.
    """
    lines = []
    for record in group.teacher.succeeded if group.teacher else ():
        for one in record.measurements:
            if (
                one.name.endswith("_speedup")
                and one.low is not None
                and one.high is not None
                and not one.low <= 1 <= one.high
            ):
                lines.append(
                    f"The teacher beside itself: {one.name.removesuffix('_speedup')} "
                    f"x{one.value:.4f} [{one.low:.4f}, {one.high:.4f}] "
                    f"misses 1 ({one.condition}); one in twenty such intervals does by chance, "
                    "more say that the machine was not quiet."
                )
    return lines


def _tasks_not_trained_on(group: Group, note: str, said: str) -> list[str]:
    """Name the rows that were trained without one of the table's tasks: no trace survived there, or
    it has no train split.
    """
    told = [
        (row.label, record.cost.notes.get(note)) for row in group.rows for record in row.succeeded
    ]
    return list(
        dict.fromkeys(
            f"{task}, {label}: {said}{why}."
            for label, tasks in told
            if isinstance(tasks, dict)
            for task, why in tasks.items()
        )
    )


def _doubtful_measurements(group: Group) -> list[str]:
    """Say which measurements are doubtful and why, each reason once with the rows that it
    concerns.
    """
    rows: dict[str, list[str]] = {}
    for row in group.rows:
        for record in row.succeeded:
            for one in record.measurements:
                if (
                    one.remark
                    and not one.name.startswith(columns.FLIPS.key)
                    and row.label not in rows.setdefault(one.remark, [])
                ):
                    rows[one.remark].append(row.label)
    dirty = [(reason, names) for reason, names in sorted(rows.items())]
    return [f"Measured, {', '.join(names)}: {reason}." for reason, names in dirty]


def _weak_teachers(group: Group, task: str) -> list[str]:
    """Warn of distilled rows whose teachers were, on this task, no better than the student before
    any training.
    """
    before = next(
        (score for row in group.rows if row.first.is_starting_point for score in row.scores(task)),
        None,
    )
    teachers = {
        record.conditions.teachers[0].name
        if row is group.teacher and record.conditions.teachers
        else row.label.removeprefix("teacher "): score
        for row in group.rows
        if row.first.method == TEACHER and row.succeeded
        for record, score in zip(row.succeeded[:1], row.scores(task)[:1], strict=False)
    }
    if before is None or not before.primary or before.lower_is_better:
        return []
    poor: dict[str, list[str]] = {}
    for row in group.rows:
        told = row.succeeded[0].cost.notes.get("taught_by") if row.succeeded else []
        if not isinstance(told, list):  # a record of before this was noted
            told = (
                [row.first.settings.get("teacher") or next(iter(teachers), "")]
                if row.first.family == "distillation"
                else []
            )
        known = [
            teachers[name]
            for name in told
            if isinstance(name, str) and name in teachers and row.first.family != "chain"
        ]
        best = max(known, key=lambda score: score.value, default=None)
        if best is not None and best.value <= before.value:
            name = next(name for name, score in teachers.items() if score is best)
            poor.setdefault(f"{name} ({best.shown(best.value)})", []).append(row.label)
    return [
        f"{task}, {', '.join(rows)}: WARNING: the teacher {teacher} is not better than the student "
        "was before any training "
        f"({before.shown(before.value)}), so it has little to teach here."
        for teacher, rows in poor.items()
    ]


_COLUMNS_WITHOUT_RETENTION = (
    columns.KL,
    columns.TOP1_AGREEMENT,
    columns.PERPLEXITY,
)  # where no retention does


def _task_warnings(group: Group, task: str) -> list[str]:
    """Say what else bears on a task's figures: a teacher with nothing to teach, the noise floor,
    cut prompts, what the scorer told.
    """
    lines = _weak_teachers(group, task)
    if group.teacher and teacher_at_chance(group, task):
        score = group.teacher.scores(task)[0]
        lines.append(
            f"{task}: teacher at chance ({score.shown(score.value)} of {score.n}, guessing gives "
            f"{100 * score.chance:.1f} %): no retention "
            "means anything, and none is shown; read "
            f"{', '.join(one.header for one in _COLUMNS_WITHOUT_RETENTION)}, speed and bytes."
        )
    floor = next(
        (
            one
            for record in (group.teacher.succeeded if group.teacher else ())
            if (one := record.measured(f"{columns.FLIPS.key}:{task}"))
        ),
        None,
    )
    if floor is not None and not floor.values:
        lines.append(f"{task}: no noise floor: {floor.remark}.")
    elif floor is not None:
        items = int(floor.values[0])
        lines.append(
            f"{task}: noise floor: the teacher against itself ({floor.condition}) flips "
            f"{floor.value * items:.0f} of {items} items."
        )
    for row in group.rows:
        for score in row.scores(task)[:1]:
            if score.cut_prompts:
                lines.append(
                    f"{task}, {row.label}: {score.cut_prompts} requests were longer than the "
                    "context and lost tokens on the left."
                )
            lines += [f"{task}, {row.label}: {note}." for note in score.notes]
    return lines


def mixed_conditions(groups: Sequence[Group]) -> list[str]:
    """Say why records of the same tasks stand in several tables: every field that differs, with its
    values.
    """
    lines = []
    for names in dict.fromkeys(map(_task_names, groups)):
        alike = [found for found in groups if _task_names(found) == names]
        fields = dict.fromkeys(field for found in alike for field in found.shared)
        differing = {
            field: sorted({found.shared.get(field, "") for found in alike}) for field in fields
        }
        told = [
            f"{name} ({' | '.join(one[:60] or 'none' for one in values)})"
            for name, values in differing.items()
            if len(values) > 1
        ]
        if told:
            lines.append(
                f"The records of {names} stand in {len(alike)} tables, since a column never mixes: "
                f"{'; '.join(told)}."
            )
    return lines


def _task_names(group: Group) -> str:
    return ", ".join(task.partition("@")[0] for task in group.shared["tasks"].split(", "))


def group_heading(group: Group) -> str:
    """Name a group of tables: its tasks, its teacher and, where a row started from one, the
    student.
    """
    return (
        f"{_task_names(group)}: "
        f"{group.shared['teacher']}{f' to {student}' if (student := _student_name(group)) else ''}"
    )


def _student_name(group: Group) -> str:
    """Name the student that rows of these tables were trained from or are; "" where every row was
    made from the teacher itself.
    """
    started = any(row.first.trains or row.first.is_starting_point for row in group.rows)
    return group.shared.get("student", "") if started else ""
