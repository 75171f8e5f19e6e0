"""Tables of what students can do: scores, retention, flips, what stands behind them, and rows
against rows. No torch.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import cast

from harness.analysis.comparison import (
    ALPHA,
    Group,
    ResultRow,
    best_labels,
    compare,
    difference_p_value,
    figure_ratio,
    ordered_rows,
    row_block,
    teacher_at_chance,
)
from harness.records import columns
from harness.records.columns import DASH, Header, Quantity
from harness.records.record import TEACHER, TaskScore
from harness.reporting.table import BestCell, RowCells, Table, build_table, failure_of, row_name
from harness.statistics import stats
from harness.statistics.figures import BITS_PER_BYTE, weighted_mean
from harness.statistics.intervals import ErrorSource, Interval, half_width

_Exact = dict[Header, object]
_TaskCells = dict[Quantity, tuple[str, _Exact]]  # of one row on one task: text and exact values


def quality_table(group: Group) -> Table:
    """Scores, retention and flips against the teacher, task by task."""
    families = len({row_block(row) for row in group.rows} - {TEACHER, "control"})
    leading = {task: best_labels(group, task) for task in group.tasks}
    rows = []
    for row in ordered_rows(group):
        shown, exact = _row_cells(row, families=families > 1)
        for task in group.tasks:
            best = row.label in leading[task]
            exact[columns.BEST.name.of(task)] = best
            for quantity, (text, values) in _task_cells(
                row, group.teacher, task, chance=teacher_at_chance(group, task)
            ).items():
                column = quantity.name.of("" if len(group.tasks) == 1 else task)
                shown[column] = BestCell(text) if best and quantity.leads and text != DASH else text
                exact |= {key.of(task): value for key, value in values.items()}
        rows.append((shown, exact))
    tasks = ", ".join(f"{task} (n = {_item_count(group, task)})" for task in group.tasks)
    return build_table("quality", f"Quality on {tasks}", rows)


def _row_cells(row: ResultRow, *, families: bool) -> RowCells:
    """Return what a row is: its label, how many seeds stand behind it, its family where there are
    several.
    """
    shown = {columns.ROW.name: row_name(row), columns.SEEDS.name: str(len(row.succeeded))}
    if families:
        shown[columns.FAMILY.name] = row_block(row)
    return shown, {
        columns.ROW.name: row.label,
        columns.FAMILY.name: row_block(row),
        columns.CONTROL.name: row.first.is_control,
        columns.SEEDS.name: len(row.succeeded),
        columns.STATUS.name: failure_of(row) or "success",
    }


def _item_count(group: Group, task: str) -> int:
    return next((score.n for row in group.rows for score in row.scores(task)), 0)


def _task_cells(
    row: ResultRow, teacher: ResultRow | None, task: str, *, chance: bool
) -> _TaskCells:
    """Return the cells of one row on one task; no retention of a teacher that is at chance
    itself.
    """
    scores = row.scores(task)
    if not scores:
        return {one: (DASH, {one.name: None}) for one in (columns.SCORE, columns.RETENTION)}
    if scores[0].kind == "perplexity" and not scores[0].unpaired:
        return _perplexity_cells(row, teacher, task)
    value = fmean(score.value for score in scores)
    if scores[0].lower_is_better:
        return (
            _error_cells(row, teacher, task, value)
            | _fidelity_cells(row, task)
            | _answer_cells(scores)
        )
    guessing = scores[0].chance

    def kept(quantity: Quantity, above: float) -> _TaskCells:
        against = (
            compare(row, teacher, task, ratio=True, chance=above)
            if teacher and not chance
            else Interval(None)
        )
        return {quantity: (quantity.with_interval(against), quantity.exact(against))}

    cells: _TaskCells = {columns.SCORE: (scores[0].shown(value), {columns.SCORE.name: value})}
    cells |= kept(columns.RETENTION, 0.0) | _difference_cells(row, teacher, task)
    cells |= kept(columns.ABOVE_CHANCE, guessing) if guessing else {}
    return (
        cells | _flip_cells(row, teacher, task) | _fidelity_cells(row, task) | _answer_cells(scores)
    )


def _flip_cells(row: ResultRow, teacher: ResultRow | None, task: str) -> _TaskCells:
    """Return how many items were lost and won, where both have outcomes."""
    reference = next(iter(teacher.outcomes(task)), "") if teacher else ""
    counts = [
        stats.count_pairs(outcome, reference)
        for outcome in row.outcomes(task)
        if reference and len(outcome) == len(reference)
    ]
    if not counts:
        return {}
    lost, won = fmean(one.teacher_only for one in counts), fmean(one.student_only for one in counts)
    text = f"{columns.LOSSES.text(lost)}/{columns.WINS.text(won)}"
    return {columns.LOSSES_WINS: (text, {columns.LOSSES.name: lost, columns.WINS.name: won})}


def _difference_cells(row: ResultRow, teacher: ResultRow | None, task: str) -> _TaskCells:
    """Return the difference to the teacher's figure where all items make it together: it has no
    flips, and not always a retention.
    """
    score = row.scores(task)[0]
    if not score.form or teacher is None:
        return {}
    gap = compare(row, teacher, task, ratio=False)
    quantity = columns.DIFFERENCE if score.unit == "share" else columns.DIFFERENCE_OF_NUMBERS
    return {quantity: (quantity.with_interval(gap), quantity.exact(gap))}


def _fidelity_cells(row: ResultRow, task: str) -> _TaskCells:
    """Return how near the row's distributions are to the teacher's."""
    near = [one for record in row.succeeded for one in record.fidelity if one.task == task]
    if not near:
        return {}
    kl, agreement = fmean(one.kl for one in near), fmean(one.agreement for one in near)
    error = _error_over_seeds(
        [one.kl for one in near], [one.kl_stderr for one in near], near[0].items
    )
    exact: _Exact = {columns.KL.name: kl, columns.KL.part(columns.HALF_WIDTH.header): error}
    return {
        columns.KL: (f"{columns.KL.text(kl)} ± {columns.KL.text(error)}", exact)
    } | _number_cell(columns.TOP1_AGREEMENT, agreement)


def _number_cell(quantity: Quantity, value: float) -> _TaskCells:
    return {quantity: (quantity.text(value), {quantity.name: value})}


def _error_over_seeds(values: Sequence[float], errors: Sequence[float], items: int) -> float:
    """Return the half-width of a mean over seeds: its error over items, which the seeds share, and
    the scatter of the seeds.
    """
    sources = [ErrorSource(fmean(error**2 for error in errors), max(1, items - 1))]
    if len(values) > 1:
        sources.append(ErrorSource(variance(values) / len(values), len(values) - 1))
    return half_width(sources)


def _answer_cells(scores: list[TaskScore]) -> _TaskCells:
    """Return what is known of written answers: their length, and how many cannot be read."""
    tokens = [score.tokens_per_answer for score in scores if score.tokens_per_answer is not None]
    if not tokens:
        return {}
    return _number_cell(columns.TOKENS, fmean(tokens)) | _number_cell(
        columns.INVALID, fmean(score.invalid_share for score in scores)
    )


def _perplexity_cells(row: ResultRow, teacher: ResultRow | None, task: str) -> _TaskCells:
    """Return a perplexity, and its ratio to the teacher's with an interval over documents and
    trainings.
    """
    scores, reference = row.scores(task), teacher.scores(task) if teacher else []
    value = fmean(score.value for score in scores)
    cells = _number_cell(
        columns.BITS_PER_BYTE if scores[0].metric == BITS_PER_BYTE else columns.PERPLEXITY, value
    )
    if (
        teacher is not None
        and reference
        and len({score.items_digest for score in (*scores, *reference)}) == 1
    ):
        cells |= _ratio_cells(
            Interval(1.0, 1.0, 1.0) if row is teacher else figure_ratio(row, teacher, task)
        )
    elif reference:
        ratio = value / reference[0].value
        cells[columns.AGAINST_TEACHER] = (
            columns.AGAINST_TEACHER.text(ratio),
            {columns.RATIO.name: ratio},
        )
    return cells


def _ratio_cells(ratio: Interval) -> _TaskCells:
    return {
        columns.AGAINST_TEACHER: (
            columns.AGAINST_TEACHER.with_interval(ratio),
            columns.RATIO.exact(ratio),
        )
    }


def _error_cells(row: ResultRow, teacher: ResultRow | None, task: str, value: float) -> _TaskCells:
    """Return a figure that is better when lower, and its ratio to the teacher's on the same items:
    nothing is retained of it.
    """
    quantity = columns.PERPLEXITY if row.scores(task)[0].kind == "perplexity" else columns.ERROR
    cells: _TaskCells = {quantity: (row.scores(task)[0].shown(value), {quantity.name: value})}
    if teacher is not None and teacher.scores(task):
        cells |= _ratio_cells(figure_ratio(row, teacher, task))
    return cells


def diagnostics_table(group: Group) -> Table | None:
    """What stands behind the scores: every extractor, both averages, the choices picked, what was
    cut.
    """
    every = [
        _diagnostic_cells(group, row, task, scores)
        for row in ordered_rows(group)
        for task in group.tasks
        if (scores := [score for score in row.scores(task) if score.outcomes or score.values])
    ]
    return build_table("diagnostics", "Behind the scores", every) if every else None


def _diagnostic_cells(
    group: Group, row: ResultRow, task: str, scores: Sequence[TaskScore]
) -> RowCells:
    """Return what stands behind a row's scores on a task; what it has nothing of leaves its column
    out.
    """
    first = scores[0]
    names = dict.fromkeys(name for score in scores for name in figures_by_extractor(score))
    figures = {
        name: fmean(known[name] for s in scores if name in (known := figures_by_extractor(s)))
        for name in names
    }
    macros = [score.macro for score in scores if score.macro is not None]
    macro = fmean(macros) if macros else None
    picked = {
        letter: fmean(score.chosen.get(letter, 0.0) for score in scores) for letter in first.chosen
    }
    cut = [score.truncated_share for score in scores if score.truncated_share is not None]
    unended, prompts = fmean(cut) if cut else None, fmean(score.cut_prompts for score in scores)
    drop = _smallest_visible_drop(group, row, task)
    cells = {
        columns.ROW: row_name(row),
        columns.TASK: task,
        columns.CORRECT_BY: ", ".join(
            f"{name} {100 * value if first.unit == 'share' else value:.1f}"
            for name, value in figures.items()
        ),
        columns.MACRO: "" if macro is None else first.shown(macro),
        columns.PICKED: " ".join(
            f"{letter} {columns.PICKED.text(share)}" for letter, share in picked.items()
        ),
        columns.TRUNCATED: "" if unended is None else columns.TRUNCATED.text(unended),
        columns.DROP_SHOWN: "" if drop is None else columns.DROP_SHOWN.text(drop),
        columns.CUT_PROMPTS: columns.CUT_PROMPTS.text(prompts) if prompts else "",
    }
    exact: _Exact = {columns.ROW.name: row.label, columns.TASK.name: task}
    exact |= {Header(name, columns.CORRECT_BY): value for name, value in figures.items()}
    exact |= {columns.DROP_SHOWN.name: drop, columns.MACRO.name: macro}
    exact |= {columns.PICKED.part(letter): share for letter, share in picked.items()}
    exact |= {columns.TRUNCATED.name: unended, columns.CUT_PROMPTS.name: prompts}
    return {quantity.name: text for quantity, text in cells.items() if text}, exact


def _smallest_visible_drop(group: Group, row: ResultRow, task: str) -> float | None:
    """Return the smallest true drop that the items show at a row's own share of flips against the
    teacher; None where there are none.
    """
    teacher = group.teacher.outcomes(task) if group.teacher else []
    counts = (
        [
            stats.count_pairs(run, teacher[0])
            for run in row.outcomes(task)
            if len(run) == len(teacher[0])
        ]
        if teacher
        else []
    )
    if not counts or row is group.teacher:
        return None
    return stats.detectable_drop(
        counts[0].n, fmean((one.teacher_only + one.student_only) / one.n for one in counts)
    )


def figures_by_extractor(score: TaskScore) -> dict[str, float]:
    """Return the figure by every extractor (of a choice: every metric) that gives items a value,
    the score's own first.
    """
    names = sorted([*score.outcomes, *score.values], key=lambda name: name != score.primary)
    return {name: _figure_of(score, name) for name in names}


def _figure_of(score: TaskScore, name: str) -> float:
    if name in score.values:
        return weighted_mean(score.values[name], score.parts)
    marks = score.outcomes[name]
    return (
        weighted_mean([float(mark == "1") for mark in marks], score.parts)
        if score.parts
        else marks.count("1") / score.n
    )


@dataclass(frozen=True)
class _RowDifference:
    """Two rows on one task: what parts them, and the p of "nothing does"; `why` says why the pair
    is not judged.
    """

    row: str
    reference: str
    task: str
    shown: str
    sign: float  # above 0: the row is the better one
    exact: Mapping[Header, object]
    p: float | None
    why: str = ""


def controls_table(group: Group) -> Table | None:
    """Each method against the controls that it needs: difference in points on the same items,
    verdicts adjusted over the table.
    """
    gaps = [
        _row_difference(group, row, control, task)
        for row in ordered_rows(group)
        for name in row.first.controls
        for control in _nearest_controls(
            row, [other for other in group.rows if other.first.method == name]
        )
        for task in group.tasks
    ]
    return (
        build_table("controls", "Against the controls, on the same items", _difference_lines(gaps))
        if gaps
        else None
    )


def _difference_lines(gaps: Sequence[_RowDifference]) -> list[RowCells]:
    """Return a line a gap with its verdict: two-sided alpha .05, Holm over the lines that are
    judged.
    """
    tested = [gap for gap in gaps if gap.p is not None and not gap.why]
    adjusted = dict(
        zip(
            map(id, tested), stats.holm([gap.p for gap in tested if gap.p is not None]), strict=True
        )
    )
    lines = []
    for gap in gaps:
        p = adjusted.get(id(gap))
        verdict = gap.why or DASH
        if p is not None:
            verdict = (
                "cannot tell"
                if p > ALPHA or gap.sign == 0
                else "better"
                if gap.sign > 0
                else "worse"
            )
        pair = {
            columns.ROW.name: gap.row,
            columns.AGAINST.name: gap.reference,
            columns.TASK.name: gap.task,
        }
        said = {columns.P_HOLM.name: columns.P_HOLM.text(p), columns.VERDICT.name: verdict}
        exact: _Exact = {
            **pair,
            **gap.exact,
            columns.P.name: gap.p,
            columns.P_HOLM.name: p,
            columns.VERDICT.name: verdict,
        }
        lines.append(({**pair, columns.GAP.name: gap.shown, **said}, exact))
    return lines


def _row_difference(
    group: Group, row: ResultRow, reference: ResultRow, task: str
) -> _RowDifference:
    """Return two rows' difference on a task. Perplexities and errors are compared by their ratio,
    below 1 is better.
    """
    scores = [score for one in (row, reference) for score in one.scores(task)]
    alike = len(scores) > 1 and len({score.items_digest for score in scores}) == 1
    lower = alike and all(score.lower_is_better and not score.unpaired for score in scores)
    gap = (
        figure_ratio(row, reference, task) if lower else compare(row, reference, task, ratio=False)
    )
    numbered = any(score.unit == "number" for score in scores)
    quantity = (
        columns.GAP_AS_RATIO if lower else columns.GAP_OF_NUMBERS if numbered else columns.GAP
    )
    apart = Interval(None) if lower else gap
    exact: _Exact = {
        columns.DIFFERENCE.name: apart.value,
        columns.LOW.name: apart.low,
        columns.HIGH.name: apart.high,
    }
    exact |= columns.RATIO.exact(gap) if lower else {}
    sign = 0.0 if gap.value is None else 1 - gap.value if lower else gap.value
    p = (
        difference_p_value(row, reference, task)
        if gap.value is not None and gap.low is not None
        else None
    )
    why = _reason_not_judged(group, row, reference, task, gap)
    return _RowDifference(
        row.label, reference.label, task, quantity.with_interval(gap), sign, exact, p, why
    )


def _reason_not_judged(
    group: Group, row: ResultRow, reference: ResultRow, task: str, gap: Interval
) -> str:
    """Return why no verdict is given on two rows, "" where one is.

    Where the teacher is at chance students that guess otherwise are no better and no worse. Of a
    method that was trained once nothing says how much another training would differ.
    """
    if gap.value is None or gap.low is None:
        return f"- ({gap.reason})" if gap.reason else DASH
    if teacher_at_chance(group, task):
        return "teacher at chance: not judged"
    once = [one for one in (row, reference) if one.trained_once]
    return "one training: not judged" if once else ""


def against_table(group: Group, label: str) -> Table | None:
    """Every row against one named row: difference in points on the same items."""
    named = next((row for row in group.rows if row.label == label), None)
    others = [
        row
        for row in ordered_rows(group)
        if named is not None and row.label != label and row.succeeded
    ]
    rows = (
        _difference_lines(
            [_row_difference(group, row, named, task) for row in others for task in group.tasks]
        )
        if named is not None
        else []
    )
    name = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
    return (
        build_table(f"against-{name}", f"Against {label}, on the same items", rows)
        if rows
        else None
    )


def _nearest_controls(row: ResultRow, candidates: list[ResultRow]) -> list[ResultRow]:
    """Of several rows of one control keep those nearest to this row: the most settings alike, stage
    by stage.

    A stage that this row has not stands in the place of its last one, and is compared with what
    that one handed on first of all.
    """
    own = _settings_by_stage(row)
    replaced = {**next(reversed(own.values())), **row.first.handed_on}

    def alike(control: ResultRow) -> int:
        count = 0
        for stage, settings in _settings_by_stage(control).items():
            mine = own.get(stage, replaced)
            count += sum(name in mine and mine[name] == value for name, value in settings.items())
        return count

    most = max(map(alike, candidates), default=0)
    return [one for one in candidates if alike(one) == most]


def _settings_by_stage(row: ResultRow) -> dict[str, Mapping[str, object]]:
    """Return the settings of a row's stages by their methods' names."""
    first = row.first
    return (
        dict(cast("Mapping[str, Mapping[str, object]]", first.settings))
        if "+" in first.method
        else {first.method: first.settings}
    )
