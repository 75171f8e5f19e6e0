"""The sentences below a table: conditions, noise, warnings, and reasons for dashes. No torch."""

from collections.abc import Iterator, Mapping, Sequence

from pydantic import JsonValue

from harness.analysis.comparison import Group, best_labels, compare, teacher_at_chance
from harness.records import columns
from harness.records.record import CHECKPOINT, TEACHER, Measurement, RunRecord, TaskScore
from harness.reporting.costs import row_scenario, table_scenario


def group_notes(group: Group) -> list[str]:
    """Return what a reader must know to trust the tables of a group, a line for each point."""
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
            group, "tasks_without_trace", "WARNING: not trained on this task, no trace survived: "
        ),
        *_tasks_not_trained_on(group, "tasks_without_split", "not trained on this task: "),
        *_own_data(group),
        *_chosen_recipes(group),
        *_doubtful_measurements(group),
        *_rows_of_other_scenarios(group),
        *_reasons_for_no_retention(group),
        *_how_to_read(group),
    ]


def _conditions(group: Group) -> list[str]:
    """Say what all rows share: teacher, student, budget, machine, type, scoring path, tasks."""
    shared = group.shared
    models, budget = f"Teacher {shared['teacher']}", shared.get("budget")
    if budget:
        student = _student_name(group) or "none"
        training = (
            f"{models}, student {student}. Each trained row has {budget}; `answer-only` sees each "
            "item as often as `sft` by default, so it sees fewer tokens."
        )
    else:
        training = f"{models}. Nothing was trained."
    gpu = f"{shared['gpu']}; " if shared.get("gpu") else ""
    machine, threads = shared.get("machine", "-"), shared.get("threads", "-")
    return [
        training,
        f"Device {shared['device']} ({gpu}{machine}, {threads} threads), {shared['dtype']}; "
        f"scoring path {shared.get('path', '-')}; {shared['tasks']}.",
    ]


def _own_data(group: Group) -> list[str]:
    """Say which data of the user's own was used, and how many examples of it were left out.

    Examples are left out because they hold evaluation items.
    """
    trained = group.shared.get("training data")
    lines = [f"Trained on {trained}, instead of the tasks' train splits."] if trained else []
    calibrations = {
        (data.name, data.digest[:8])
        for row in group.rows
        for record in row.records
        if (data := record.conditions.calibration_data) is not None
    }
    lines += [f"Calibrated on {name} ({digest})." for name, digest in sorted(calibrations)]
    counts = _data_counts(group)
    lines += [
        f"{dropped:,} examples of {name} hold evaluation items and were left out."
        for name, notes in counts.items()
        if isinstance(dropped := notes.get("dropped_for_evaluation_text"), int) and dropped
    ]
    return lines + [line for name, notes in counts.items() for line in _writing_notes(name, notes)]


def _data_counts(group: Group) -> dict[str, Mapping[str, JsonValue]]:
    """Return what records say of each data set of the user's own, by its name."""
    return {
        name: counts
        for row in group.rows
        for record in row.records
        if isinstance(by_name := record.cost.notes.get("train_data"), dict)
        for name, counts in by_name.items()
        if isinstance(counts, dict)
    }


def _writing_notes(name: str, counts: Mapping[str, JsonValue]) -> list[str]:
    """Say what a teacher wrote for training, and what of it was left out."""
    numbers = {
        key: value for key, value in counts.items() if isinstance(value, (int, float)) and value
    }
    if not {"written", "tokens", "seconds"} <= numbers.keys():
        return []
    reasons = {"unfinished": "did not end", "empty": "were empty", "repeats": "were repeats"}
    left_out = [f"{numbers[key]:,} {reason}" for key, reason in reasons.items() if key in numbers]
    return [
        f"{name}: the teacher wrote {numbers['written']:,} texts ({numbers['tokens']:,} tokens, "
        f"{numbers['seconds']:,.0f} s){'; left out: ' if left_out else ''}{', '.join(left_out)}."
    ]


def _chosen_recipes(group: Group) -> list[str]:
    """Say why rows were trained by another recipe than the first, where a plan chose it."""
    lines = [
        f"{row.label}: {note}."
        for row in group.rows
        for record in row.records
        if isinstance(notes := record.cost.notes.get("recipe_chosen"), dict)
        for note in notes.values()
    ]
    return [*dict.fromkeys(lines)]


def _task_notes(group: Group) -> list[str]:
    """Say what matters for each task's figures."""
    if group.teacher is None and group.tasks:
        return ["The teacher's row did not succeed, so there is no retention."]
    return [
        line
        for task in group.tasks
        for line in (*_kind_of_figure(group, task), *_task_warnings(group, task))
    ]


def _scoring_notes(group: Group) -> list[str]:
    """Say how prompts look, whether items are a sample, and how teachers' files were opened."""
    prompts, lines = group.shared["prompts"], []
    if prompts:
        lines.append(f"Prompts are shown in the {prompts}.")
    if group.shared["limited"]:
        lines.append(
            "A TRIAL: scored on a sample of the items (--limit). Do not quote it; it cannot become "
            "a baseline."
        )
    if subset := group.shared.get("subset", ""):
        lines.append(
            f"Scored on the frozen subset {subset} of each task's items. Its figures stand for all "
            "items within their intervals; rows of it may become a baseline of this subset."
        )
    teachers = [
        teacher
        for row in group.rows
        for record in row.records
        for teacher in record.conditions.teachers
    ]
    opened = dict.fromkeys(
        f"{teacher.name}: {teacher.note}." for teacher in teachers if teacher.note
    )
    return [*lines, *opened, *_outside_notes(group)]


def _outside_notes(group: Group) -> list[str]:
    """Say which models the rows from outside are, and how they were opened."""
    records = {
        row.label: record
        for row in group.rows
        for record in row.succeeded
        if record.method == CHECKPOINT and record.student is not None
    }
    lines = []
    for label, record in records.items():
        assert record.student is not None
        is_other_path = record.path != group.shared.get("path", record.path)
        details = (record.student.note, f"scored by {record.path}" if is_other_path else "")
        words = ", ".join(
            filter(None, (f"the checkpoint {record.student.name} as it is", *details))
        )
        lines.append(f"{label}: {words}.")
    return lines


def _failed_cells(group: Group) -> list[str]:
    """Name the cells without success and their reasons, and count the records that are left out."""
    lines = [
        f"{row.label}{_seed_text(record)} {record.status}: {record.reason}"
        for row in group.rows
        for record in row.records
        if record.status != "success"
    ]
    if group.superseded:
        lines.append(f"{group.superseded} older records of the same rows are not shown.")
    return lines


def _seed_text(record: RunRecord) -> str:
    return f" (seed {record.seed})" if record.seed is not None else ""


def _rows_of_other_scenarios(group: Group) -> list[str]:
    """Name the rows that were timed under another scenario than the table's."""
    rows = [row for row in group.rows if row_scenario(row) not in ("", table_scenario(group))]
    if not rows:
        return []
    scenarios = ", ".join(dict.fromkeys(map(row_scenario, rows)))
    labels = ", ".join(row.label for row in rows)
    return [
        f"{labels}: timed under another scenario than the table's ({scenarios}), so the speeds are "
        "dashes."
    ]


def _reasons_for_no_retention(group: Group) -> list[str]:
    """Say why a row that has a score has no retention."""
    lines = []
    for row in group.rows:
        for task in group.tasks:
            if group.teacher and any(score.retains for score in row.scores(task)):
                reason = compare(row, group.teacher, task, ratio=True).reason
                lines += [f"{row.label}, {task}: no retention: {reason}."] if reason else []
    return lines


def _how_to_read(group: Group) -> list[str]:
    """Say what bold, verdicts and dashes mean."""
    lines = []
    if any(best_labels(group, task) for task in group.tasks):
        lines.append(
            "Bold: the best row, and all rows that are not significantly worse on the same items "
            "(alpha .05, Holm). Controls are never bold."
        )
    if any(row.first.controls for row in group.rows):
        lines.append(
            "Verdicts against controls are adjusted for the number of lines in the table (Holm, "
            "alpha .05). Intervals are not: each holds for its own line."
        )
    return [
        *lines,
        "A dash: not measured for this row (no training, no teacher, a choice task writes no "
        "tokens), or not defined.",
    ]


def _kind_of_figure(group: Group, task: str) -> list[str]:
    """Say what differs from right and wrong answers: pairing, direction, weights of items."""
    scores = [score for row in group.rows for score in row.scores(task)]
    reasons = dict.fromkeys(score.unpaired for score in scores if score.unpaired)
    lines = [f"{task}: no retention and no flips: {reason}." for reason in reasons]
    first = scores[0] if scores else None
    if first is not None and first.kind != "perplexity" and first.lower_is_better:
        lines.append(
            f"{task}: {first.metric or first.primary} is better when lower. It is in the column "
            f"{columns.ERROR.header}, and a ratio below 1 is better."
        )
    if any(score.values for score in scores) and not reasons:
        lines.append(
            f"{task}: items have numbers, so intervals are those of paired means and there are no "
            "flips."
        )
    if first is not None and first.form:
        lines.append(
            f"{task}: {first.metric} is one figure of all items together. Its intervals come from "
            "resampled items, the same for both models."
        )
    if first is not None and first.signed:
        lines.append(
            f"{task}: no retention: {first.metric} may be below zero, and a ratio of two says "
            "nothing; see the difference."
        )
    weighted = [score for score in scores if score.parts and _has_equal_parts(score)]
    if weighted:
        lines.append(
            f"{task}: its {len(weighted[0].parts)} subtasks have equal weights, whatever their "
            "sizes."
        )
    return lines


def _has_equal_parts(score: TaskScore) -> bool:
    """Tell whether parts of different sizes have equal weights; a corpus figure may weigh items."""
    return not score.form or len({weight for _, weight in score.parts}) > 1


_HEAD_WORDS = {
    "int8": "; token table and head in int8",
    "skip": "; token table and head unchanged",
}


def _packed_weights(group: Group) -> list[str]:
    """Say how many bits packed weights take, and which layers were not packed like the others."""
    lines = []
    for row in group.rows:
        notes = row.succeeded[0].cost.notes.values() if row.succeeded else ()
        for packing in notes:
            if not isinstance(packing, dict) or "bits_per_weight" not in packing:
                continue
            block_bits, unpacked = packing.get("bits_of_a_packed_weight"), packing.get("skipped")
            in_blocks = "" if block_bits is None else f" ({block_bits:g} in the blocks)"
            head = _HEAD_WORDS.get(str(packing.get("table_and_head")), "")
            unchanged = ", ".join(map(str, unpacked)) if isinstance(unpacked, list) else ""
            lines.append(
                f"{row.label}: {packing['bits_per_weight']:g} bits on disk for each weight of the "
                f"model{in_blocks}{head}{f'; unchanged: {unchanged}' if unchanged else ''}."
            )
    return lines


def _rows_no_better_than_start(group: Group) -> list[str]:
    """Name the trained rows whose held-out loss never fell below that of their start."""
    lines = []
    for row in group.rows:
        for record in row.succeeded:
            start, best = (record.cost.notes.get(name) for name in ("start_ce", "best_ce"))
            if isinstance(start, float) and isinstance(best, float) and best >= start:
                advice = "" if record.conditions.tuned else "; try --tune"
                lines.append(
                    f"{row.label}{_seed_text(record)}: the held-out loss never fell below that of "
                    f"the start ({best:.4g} against {start:.4g}){advice}."
                )
    return lines


def _trained_once(group: Group) -> list[str]:
    """Name the rows that were trained or drawn once: their methods are not judged."""
    labels = [row.label for row in group.rows if row.trained_once]
    if not labels:
        return []
    return [
        f"{', '.join(labels)}: one training (or draw) each. Retention is that of this checkpoint. "
        "One training does not show whether a method is better than another one, so that is not "
        "judged and no row is bold. Type --seeds 3 for more."
    ]


def _uneven_teacher_timings(group: Group) -> list[str]:
    """Say where the teacher, timed by turns with itself, was not as fast as itself."""
    return [
        f"The teacher timed against itself: {measurement.name.removesuffix('_speedup')} "
        f"x{measurement.value:.4f} [{measurement.low:.4f}, {measurement.high:.4f}], an interval "
        f"without 1 ({measurement.condition}). One in twenty misses 1 by chance; more than that "
        "means that other work disturbed the machine."
        for record in (group.teacher.succeeded if group.teacher else ())
        for measurement in record.measurements
        if measurement.name.endswith("_speedup") and _misses_one(measurement)
    ]


def _misses_one(ratio: Measurement) -> bool:
    if ratio.low is None or ratio.high is None:
        return False
    return not ratio.low <= 1 <= ratio.high


def _tasks_not_trained_on(group: Group, note: str, words: str) -> list[str]:
    """Name the rows that were trained without one of the table's tasks, by a note of their cost."""
    lines = []
    for row in group.rows:
        for record in row.succeeded:
            reasons = record.cost.notes.get(note)
            if isinstance(reasons, dict):
                lines += [
                    f"{task}, {row.label}: {words}{reason}." for task, reason in reasons.items()
                ]
    return list(dict.fromkeys(lines))


def _doubtful_measurements(group: Group) -> list[str]:
    """Say which measurements are doubtful: each reason once, with the rows that it concerns."""
    rows: dict[str, list[str]] = {}
    for row in group.rows:
        for record in row.succeeded:
            for measurement in record.measurements:
                is_doubtful = measurement.remark and not _is_noise_floor(measurement)
                if is_doubtful and row.label not in rows.setdefault(measurement.remark, []):
                    rows[measurement.remark].append(row.label)
    return [f"Measurements of {', '.join(rows[remark])}: {remark}." for remark in sorted(rows)]


def _is_noise_floor(measurement: Measurement) -> bool:
    return measurement.name.startswith(columns.FLIPS.key)


def _weak_teachers(group: Group, task: str) -> list[str]:
    """Warn of distilled rows whose teachers were no better on a task than the untrained student."""
    untrained = next(
        (score for row in group.rows if row.first.is_starting_point for score in row.scores(task)),
        None,
    )
    if untrained is None or not untrained.primary or untrained.lower_is_better:
        return []
    teachers = dict(_teacher_scores(group, task))
    labels_by_teacher: dict[str, list[str]] = {}
    for row in group.rows:
        if row.first.family == "chain" or not row.succeeded:
            continue
        names = [name for name in _teachers_of(row.succeeded[0], teachers) if name in teachers]
        best = max(names, key=lambda name: teachers[name].value, default=None)
        if best is not None and teachers[best].value <= untrained.value:
            teacher = f"{best} ({teachers[best].format_value(teachers[best].value)})"
            labels_by_teacher.setdefault(teacher, []).append(row.label)
    return [
        f"{task}, {', '.join(labels)}: WARNING: the teacher {teacher} is not better than the "
        f"student was before training ({untrained.format_value(untrained.value)}), so it has "
        "little to teach here."
        for teacher, labels in labels_by_teacher.items()
    ]


def _teacher_scores(group: Group, task: str) -> Iterator[tuple[str, TaskScore]]:
    """Yield each teacher's name and its score on a task."""
    for row in group.rows:
        if row.first.method != TEACHER or not row.succeeded or not row.scores(task):
            continue
        teachers = row.succeeded[0].conditions.teachers
        if row is group.teacher and teachers:
            yield teachers[0].name, row.scores(task)[0]
        else:
            yield row.label.removeprefix("teacher "), row.scores(task)[0]


def _teachers_of(record: RunRecord, teachers: Mapping[str, TaskScore]) -> list[str]:
    """Return the names of the teachers that a row was distilled from; empty for other rows."""
    names = record.cost.notes.get("taught_by")
    if isinstance(names, list):
        return [name for name in names if isinstance(name, str)]
    # records of older versions do not name them
    name = record.settings.get("teacher") or next(iter(teachers), "")
    return [name] if record.family == "distillation" and isinstance(name, str) else []


# figures that still say something where no retention does
_COLUMNS_WITHOUT_RETENTION = (columns.KL, columns.TOP1_AGREEMENT, columns.PERPLEXITY)


def _task_warnings(group: Group, task: str) -> list[str]:
    """Warn of weak teachers, a teacher at chance, noise, cut prompts, and what the scorer noted."""
    lines = _weak_teachers(group, task)
    if group.teacher and teacher_at_chance(group, task):
        score = group.teacher.scores(task)[0]
        headers = ", ".join(quantity.header for quantity in _COLUMNS_WITHOUT_RETENTION)
        lines.append(
            f"{task}: teacher at chance ({score.format_value(score.value)} of {score.n}, guessing "
            f"gives {100 * score.chance:.1f} %), so no retention is shown; read {headers}, speed "
            "and bytes instead."
        )
    lines += _noise_floor(group, task)
    for row in group.rows:
        for score in row.scores(task)[:1]:
            if score.cut_prompts:
                lines.append(
                    f"{task}, {row.label}: {score.cut_prompts} requests were longer than the "
                    "context; their first tokens were cut."
                )
            lines += [f"{task}, {row.label}: {note}." for note in score.notes]
    return lines


def _noise_floor(group: Group, task: str) -> list[str]:
    """Say how many items flip when the teacher is scored twice under different conditions."""
    name = f"{columns.FLIPS.key}:{task}"
    records = group.teacher.succeeded if group.teacher else ()
    floor = next((floor for record in records if (floor := record.measurement(name))), None)
    if floor is None:
        return []
    if not floor.values:
        return [f"{task}: no noise floor: {floor.remark}."]
    items = int(floor.values[0])
    return [
        f"{task}: noise floor: {floor.value * items:.0f} of {items} items flip between two runs of "
        f"the teacher ({floor.condition})."
    ]


def mixed_conditions(groups: Sequence[Group]) -> list[str]:
    """Say why records of the same tasks stand in several tables: which conditions differ."""
    lines = []
    for tasks in dict.fromkeys(map(_task_names, groups)):
        same_tasks = [group for group in groups if _task_names(group) == tasks]
        names = dict.fromkeys(name for group in same_tasks for name in group.shared)
        values = {
            name: sorted({group.shared.get(name, "") for group in same_tasks}) for name in names
        }
        differing = [
            f"{name} ({' | '.join(value[:60] or 'none' for value in values[name])})"
            for name in names
            if len(values[name]) > 1
        ]
        if differing:
            lines.append(
                f"The records of {tasks} stand in {len(same_tasks)} tables, because a table never "
                f"mixes conditions. They differ in {'; '.join(differing)}."
            )
    return lines


def _task_names(group: Group) -> str:
    return ", ".join(task.partition("@")[0] for task in group.shared["tasks"].split(", "))


def group_heading(group: Group) -> str:
    """Return the heading of a group's tables: tasks, teacher, and the student if there is one."""
    student = _student_name(group)
    pair = f"{group.shared['teacher']} to {student}" if student else group.shared["teacher"]
    return f"{_task_names(group)}: {pair}"


def _student_name(group: Group) -> str:
    """Return the student that rows were trained from; "" where all were made from the teacher."""
    has_student = any(row.first.trains or row.first.is_starting_point for row in group.rows)
    return group.shared.get("student", "") if has_student else ""
