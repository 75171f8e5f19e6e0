"""Tables of quality: scores, retention, flips, diagnostics, and row against row. No torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import NamedTuple, cast

from harness.analysis.comparison import (
    ALPHA,
    Group,
    ResultRow,
    best_labels,
    compare,
    equality_test,
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
_LOSSES = (0.01, 0.02, 0.05)  # of the teacher's figure, whose items to show are counted


class _Cell(NamedTuple):
    """One cell: what is shown, and the exact values behind it."""

    text: str
    exact: _Exact


_TaskCells = dict[Quantity, _Cell]  # of one row on one task


def quality_table(group: Group) -> Table:
    """Return scores, retention and flips against the teacher, task by task."""
    families = {row_block(row) for row in group.rows} - {TEACHER, "control"}
    best_by_task = {task: best_labels(group, task) for task in group.tasks}
    lines = []
    for row in ordered_rows(group):
        line = _row_cells(row, with_family=len(families) > 1)
        for task in group.tasks:
            is_best = row.label in best_by_task[task]
            line.exact[columns.BEST.name.of(task)] = is_best
            for quantity, cell in _task_cells(group, row, task).items():
                column = quantity.name.of("" if len(group.tasks) == 1 else task)
                is_bold = is_best and quantity.leads and cell.text != DASH
                line.shown[column] = BestCell(cell.text) if is_bold else cell.text
                line.exact.update({key.of(task): value for key, value in cell.exact.items()})
        lines.append(line)
    tasks = ", ".join(f"{task} (n = {_item_count(group, task)})" for task in group.tasks)
    return build_table("quality", f"Quality on {tasks}", lines)


def _row_cells(row: ResultRow, *, with_family: bool) -> RowCells:
    """Return what a row is: its label, its number of seeds, and its family where there are many."""
    seeds = len(row.succeeded)
    shown = {columns.ROW.name: row_name(row), columns.SEEDS.name: str(seeds)}
    if with_family:
        shown[columns.FAMILY.name] = row_block(row)
    exact: _Exact = {
        columns.ROW.name: row.label,
        columns.FAMILY.name: row_block(row),
        columns.CONTROL.name: row.first.is_control,
        columns.SEEDS.name: seeds,
        columns.STATUS.name: failure_of(row) or "success",
    }
    return RowCells(shown, exact)


def _item_count(group: Group, task: str) -> int:
    return next((score.n for row in group.rows for score in row.scores(task)), 0)


def _task_cells(group: Group, row: ResultRow, task: str) -> _TaskCells:
    """Return the cells of one row on one task; no retention where the teacher is at chance."""
    scores, teacher = row.scores(task), group.teacher
    if not scores:
        empty = (columns.SCORE, columns.RETENTION)
        return {quantity: _Cell(DASH, {quantity.name: None}) for quantity in empty}
    first = scores[0]
    if first.kind == "perplexity" and not first.unpaired:
        return _perplexity_cells(row, teacher, task)
    further_cells = _fidelity_cells(row, task) | _answer_cells(scores)
    mean = fmean(score.value for score in scores)
    if first.lower_is_better:
        return _error_cells(row, teacher, task, mean) | further_cells
    at_chance = teacher_at_chance(group, task)

    def retention_cell(quantity: Quantity, chance: float) -> _TaskCells:
        if teacher is None or at_chance:
            return _interval_cell(quantity, Interval(None))
        return _interval_cell(quantity, compare(row, teacher, task, ratio=True, chance=chance))

    return {
        columns.SCORE: _Cell(first.format_value(mean), {columns.SCORE.name: mean}),
        **retention_cell(columns.RETENTION, 0.0),
        **_difference_cells(row, teacher, task),
        **(retention_cell(columns.ABOVE_CHANCE, first.chance) if first.chance else {}),
        **_flip_cells(row, teacher, task),
        **further_cells,
    }


def _interval_cell(quantity: Quantity, interval: Interval) -> _TaskCells:
    return {quantity: _Cell(quantity.with_interval(interval), quantity.exact(interval))}


def _number_cell(quantity: Quantity, value: float) -> _TaskCells:
    return {quantity: _Cell(quantity.text(value), {quantity.name: value})}


def _flip_counts(row: ResultRow, teacher: ResultRow | None, task: str) -> list[stats.Pairs]:
    """Return the paired counts against the teacher's first run, one for each training.

    Empty where either has no hits and misses, or not on the same items.
    """
    reference = next(iter(teacher.outcomes(task)), "") if teacher else ""
    return [
        stats.count_pairs(run, reference)
        for run in row.outcomes(task)
        if reference and len(run) == len(reference)
    ]


def _flip_cells(row: ResultRow, teacher: ResultRow | None, task: str) -> _TaskCells:
    """Return how many items were lost and won, where both rows have hits and misses."""
    counts = _flip_counts(row, teacher, task)
    if not counts:
        return {}
    losses = fmean(seed_counts.teacher_only for seed_counts in counts)
    wins = fmean(seed_counts.student_only for seed_counts in counts)
    text = f"{columns.LOSSES.text(losses)}/{columns.WINS.text(wins)}"
    exact: _Exact = {columns.LOSSES.name: losses, columns.WINS.name: wins}
    return {columns.LOSSES_WINS: _Cell(text, exact)}


def _difference_cells(row: ResultRow, teacher: ResultRow | None, task: str) -> _TaskCells:
    """Return the difference to the teacher, of a figure that all items make together.

    Such a figure has no flips, and not always a retention.
    """
    score = row.scores(task)[0]
    if not score.form or teacher is None:
        return {}
    quantity = columns.DIFFERENCE if score.unit == "share" else columns.DIFFERENCE_OF_NUMBERS
    return _interval_cell(quantity, compare(row, teacher, task, ratio=False))


def _fidelity_cells(row: ResultRow, task: str) -> _TaskCells:
    """Return how near the row's distributions are to the teacher's."""
    fidelities = [
        fidelity
        for record in row.succeeded
        for fidelity in record.fidelity
        if fidelity.task == task
    ]
    if not fidelities:
        return {}
    kls = [fidelity.kl for fidelity in fidelities]
    kl, agreement = fmean(kls), fmean(fidelity.agreement for fidelity in fidelities)
    item_errors = [fidelity.kl_stderr for fidelity in fidelities]
    error = _half_width_over_seeds(kls, item_errors, fidelities[0].items)
    exact: _Exact = {columns.KL.name: kl, columns.KL.part(columns.HALF_WIDTH.header): error}
    text = f"{columns.KL.text(kl)} ± {columns.KL.text(error)}"
    return {columns.KL: _Cell(text, exact)} | _number_cell(columns.TOP1_AGREEMENT, agreement)


def _half_width_over_seeds(
    values: Sequence[float], item_errors: Sequence[float], items: int
) -> float:
    """Return the half-width of a mean over seeds.

    It has two sources: the error over items, which the seeds share, and the scatter of the seeds.
    """
    sources = [ErrorSource(fmean(error**2 for error in item_errors), max(1, items - 1))]
    if len(values) > 1:
        sources.append(ErrorSource(variance(values) / len(values), len(values) - 1))
    return half_width(sources)


def _answer_cells(scores: Sequence[TaskScore]) -> _TaskCells:
    """Return the length of written answers, and how many cannot be read."""
    lengths = [score.tokens_per_answer for score in scores if score.tokens_per_answer is not None]
    if not lengths:
        return {}
    invalid = fmean(score.invalid_share for score in scores)
    return _number_cell(columns.TOKENS, fmean(lengths)) | _number_cell(columns.INVALID, invalid)


def _perplexity_cells(row: ResultRow, teacher: ResultRow | None, task: str) -> _TaskCells:
    """Return a perplexity, and its ratio to the teacher's.

    The ratio has an interval over documents and trainings where both read the same documents.
    """
    scores, teacher_scores = row.scores(task), teacher.scores(task) if teacher else []
    mean, in_bits = fmean(score.value for score in scores), scores[0].metric == BITS_PER_BYTE
    cells = _number_cell(columns.BITS_PER_BYTE if in_bits else columns.PERPLEXITY, mean)
    if teacher is None or not teacher_scores:
        return cells
    if len({score.items_digest for score in (*scores, *teacher_scores)}) == 1:
        is_teacher = row is teacher
        ratio = Interval(1.0, 1.0, 1.0) if is_teacher else figure_ratio(row, teacher, task)
        return cells | _ratio_cell(ratio)
    bare_ratio = mean / teacher_scores[0].value
    exact: _Exact = {columns.RATIO.name: bare_ratio}
    return cells | {columns.AGAINST_TEACHER: _Cell(columns.AGAINST_TEACHER.text(bare_ratio), exact)}


def _ratio_cell(ratio: Interval) -> _TaskCells:
    text = columns.AGAINST_TEACHER.with_interval(ratio)
    return {columns.AGAINST_TEACHER: _Cell(text, columns.RATIO.exact(ratio))}


def _error_cells(row: ResultRow, teacher: ResultRow | None, task: str, mean: float) -> _TaskCells:
    """Return a figure that is better when lower, and its ratio to the teacher's.

    Such a figure has no retention.
    """
    score = row.scores(task)[0]
    quantity = columns.PERPLEXITY if score.kind == "perplexity" else columns.ERROR
    cells: _TaskCells = {quantity: _Cell(score.format_value(mean), {quantity.name: mean})}
    if teacher is not None and teacher.scores(task):
        cells |= _ratio_cell(figure_ratio(row, teacher, task))
    return cells


# --- what stands behind the scores


def diagnostics_table(group: Group) -> Table | None:
    """Return what is behind the scores: every extractor, averages, choices picked, what was cut."""
    lines = [
        _diagnostic_cells(group, row, task, scores)
        for row in ordered_rows(group)
        for task in group.tasks
        if (scores := row.scores(task))
        and (scores[0].outcomes or scores[0].values or _items_needed(group, row, task))
    ]
    return build_table("diagnostics", "Behind the scores", lines) if lines else None


def _diagnostic_cells(
    group: Group, row: ResultRow, task: str, scores: Sequence[TaskScore]
) -> RowCells:
    """Return the line of a row on a task; a quantity without a value has no cell."""
    first = scores[0]
    figures = _mean_figures([figures_by_extractor(score) for score in scores])
    macros = [score.macro for score in scores if score.macro is not None]
    macro = fmean(macros) if macros else None
    picked = {
        letter: fmean(score.chosen.get(letter, 0.0) for score in scores) for letter in first.chosen
    }
    shares = [score.truncated_share for score in scores if score.truncated_share is not None]
    truncated = fmean(shares) if shares else None
    prompts = fmean(score.cut_prompts for score in scores)
    drop, needed = _detectable_drop(group, row, task), _items_needed(group, row, task)
    factor = 100 if first.unit == "share" else 1
    cells = {
        columns.ROW: row_name(row),
        columns.TASK: task,
        columns.CORRECT_BY: ", ".join(
            f"{name} {factor * value:.1f}" for name, value in figures.items()
        ),
        columns.MACRO: "" if macro is None else first.format_value(macro),
        columns.PICKED: " ".join(
            f"{letter} {columns.PICKED.text(share)}" for letter, share in picked.items()
        ),
        columns.TRUNCATED: "" if truncated is None else columns.TRUNCATED.text(truncated),
        columns.DROP_SHOWN: "" if drop is None else columns.DROP_SHOWN.text(drop),
        columns.ITEMS_NEEDED: " / ".join(f"{count:,}" for count in needed),
        columns.CUT_PROMPTS: columns.CUT_PROMPTS.text(prompts) if prompts else "",
    }
    exact: _Exact = {columns.ROW.name: row.label, columns.TASK.name: task}
    exact |= {Header(name, columns.CORRECT_BY): value for name, value in figures.items()}
    exact |= {columns.DROP_SHOWN.name: drop, columns.MACRO.name: macro}
    exact |= {
        columns.ITEMS_NEEDED.part(f"{100 * loss:.0f} %"): count
        for loss, count in zip(_LOSSES, needed, strict=False)
    }
    exact |= {columns.PICKED.part(letter): share for letter, share in picked.items()}
    exact |= {columns.TRUNCATED.name: truncated, columns.CUT_PROMPTS.name: prompts}
    return RowCells({quantity.name: text for quantity, text in cells.items() if text}, exact)


def _detectable_drop(group: Group, row: ResultRow, task: str) -> float | None:
    """Return the smallest true drop that the items can show at a row's own share of flips.

    None for the teacher, and where there are no flips to count.
    """
    counts = _flip_counts(row, group.teacher, task)
    if not counts or row is group.teacher:
        return None
    flips = fmean(
        (seed_counts.teacher_only + seed_counts.student_only) / seed_counts.n
        for seed_counts in counts
    )
    return stats.detectable_drop(counts[0].n, flips)


def _items_needed(group: Group, row: ResultRow, task: str) -> list[int]:
    """Return how many items show each of `_LOSSES` of the teacher's figure on a task.

    Empty for the teacher itself, and where its items cannot be paired with the row's.
    """
    teacher = group.teacher
    if teacher is None or row is teacher or not row.scores(task) or not teacher.scores(task):
        return []
    counts, score = _flip_counts(row, teacher, task), row.scores(task)[0]
    if counts:
        reached = fmean(part.value for part in teacher.scores(task))
        if not reached:
            return []
        flips = fmean(
            (seed_counts.teacher_only + seed_counts.student_only) / seed_counts.n
            for seed_counts in counts
        )
        return [stats.items_to_detect(flips, loss * reached, alpha=0.05) for loss in _LOSSES]
    if not score.lower_is_better:
        return []
    ratio = figure_ratio(row, teacher, task)
    if not ratio.value or not ratio.sources or not ratio.sources[0].variance:
        return []
    over_items = ratio.sources[0].variance
    return [stats.items_to_detect_ratio(score.n, over_items, loss) for loss in _LOSSES]


def figures_by_extractor(score: TaskScore) -> dict[str, float]:
    """Return the figure by every extractor that gives items a value, the score's own first.

    Of a choice task these are its metrics.
    """
    names = sorted([*score.outcomes, *score.values], key=lambda name: name != score.primary)
    return {name: _figure_of(score, name) for name in names}


def _figure_of(score: TaskScore, name: str) -> float:
    if name in score.values:
        return weighted_mean(score.values[name], score.parts)
    marks = score.outcomes[name]
    if score.parts:
        return weighted_mean([float(mark == "1") for mark in marks], score.parts)
    return marks.count("1") / score.n


def _mean_figures(figures_of_seeds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each figure over the seeds that have it."""
    names = dict.fromkeys(name for figures in figures_of_seeds for name in figures)
    return {
        name: fmean(figures[name] for figures in figures_of_seeds if name in figures)
        for name in names
    }


# --- row against row


@dataclass(frozen=True)
class _RowDifference:
    """The difference of two rows on one task."""

    row: str
    reference: str
    task: str
    text: str
    sign: float  # above 0: the row is the better one
    exact: Mapping[Header, object]
    p: float | None  # of "there is no difference"
    not_judged: str = ""  # why the pair has no verdict


def controls_table(group: Group) -> Table | None:
    """Return each method against its controls: differences in points on the same items.

    Verdicts are adjusted over the whole table.
    """
    differences = [
        _row_difference(group, row, control, task)
        for row in ordered_rows(group)
        for name in row.first.controls
        for control in _nearest_controls(row, [r for r in group.rows if r.first.method == name])
        for task in group.tasks
    ]
    if not differences:
        return None
    title = "Against the controls, on the same items"
    return build_table("controls", title, _difference_lines(differences))


def _difference_lines(differences: Sequence[_RowDifference]) -> list[RowCells]:
    """Return a line for each difference, with its verdict.

    Two-sided alpha .05, Holm over the lines that are judged.
    """
    judged = [line for line in differences if line.p is not None and not line.not_judged]
    p_values = stats.holm([line.p for line in judged if line.p is not None])
    adjusted = {id(line): p for line, p in zip(judged, p_values, strict=True)}
    lines = []
    for difference in differences:
        p = adjusted.get(id(difference))
        verdict = difference.not_judged or DASH
        if p is not None:
            is_different = p <= ALPHA and difference.sign != 0
            word = "better" if difference.sign > 0 else "worse"
            verdict = word if is_different else "cannot tell"
        pair = {
            columns.ROW.name: difference.row,
            columns.AGAINST.name: difference.reference,
            columns.TASK.name: difference.task,
        }
        shown = {
            **pair,
            columns.GAP.name: difference.text,
            columns.P_HOLM.name: columns.P_HOLM.text(p),
            columns.VERDICT.name: verdict,
        }
        exact: _Exact = {
            **pair,
            **difference.exact,
            columns.P.name: difference.p,
            columns.P_HOLM.name: p,
            columns.VERDICT.name: verdict,
        }
        lines.append(RowCells(shown, exact))
    return lines


def _row_difference(
    group: Group, row: ResultRow, reference: ResultRow, task: str
) -> _RowDifference:
    """Return two rows' difference on a task.

    Perplexities and errors are compared by their ratio; a ratio below 1 is better.
    """
    scores = [*row.scores(task), *reference.scores(task)]
    same_items = len(scores) > 1 and len({score.items_digest for score in scores}) == 1
    as_ratio = same_items and all(score.lower_is_better and not score.unpaired for score in scores)
    if as_ratio:
        gap = figure_ratio(row, reference, task)
        quantity, difference = columns.GAP_AS_RATIO, Interval(None)
        sign = 0.0 if gap.value is None else 1 - gap.value
    else:
        gap = difference = compare(row, reference, task, ratio=False)
        in_numbers = any(score.unit == "number" for score in scores)
        quantity = columns.GAP_OF_NUMBERS if in_numbers else columns.GAP
        sign = gap.value or 0.0
    exact: _Exact = {
        columns.DIFFERENCE.name: difference.value,
        columns.LOW.name: difference.low,
        columns.HIGH.name: difference.high,
    }
    exact |= columns.RATIO.exact(gap) if as_ratio else {}
    has_interval = gap.value is not None and gap.low is not None
    return _RowDifference(
        row.label,
        reference.label,
        task,
        quantity.with_interval(gap),
        sign,
        exact,
        equality_test(row, reference, task) if has_interval else None,
        _reason_not_judged(group, (row, reference), task, gap),
    )


def _reason_not_judged(
    group: Group, pair: tuple[ResultRow, ResultRow], task: str, gap: Interval
) -> str:
    """Return why two rows have no verdict, "" where they have one.

    Where the teacher is at chance, students that guess differently are no better and no worse. Of
    a method that was trained once nobody knows how much another training would differ.
    """
    if gap.value is None or gap.low is None:
        return f"- ({gap.reason})" if gap.reason else DASH
    if teacher_at_chance(group, task):
        return "teacher at chance: not judged"
    return "one training: not judged" if any(row.trained_once for row in pair) else ""


def against_table(group: Group, label: str) -> Table | None:
    """Return every row against the row of a label: differences in points on the same items."""
    reference = next((row for row in group.rows if row.label == label), None)
    if reference is None:
        return None
    others = [row for row in ordered_rows(group) if row.label != label and row.succeeded]
    differences = [
        _row_difference(group, row, reference, task) for row in others for task in group.tasks
    ]
    if not differences:
        return None
    name = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
    title = f"Against {label}, on the same items"
    return build_table(f"against-{name}", title, _difference_lines(differences))


def _nearest_controls(row: ResultRow, candidates: Sequence[ResultRow]) -> list[ResultRow]:
    """Return those rows of a control that share most settings with this row, stage by stage.

    A control's stage that this row does not have replaces the row's last stage, and is compared
    with it; what that stage hands on to its controls counts before its own settings.
    """
    stages = _settings_by_stage(row)
    replaced_stage = {**next(reversed(stages.values())), **row.first.inherited_settings}

    def equal_settings(control: ResultRow) -> int:
        count = 0
        for name, settings in _settings_by_stage(control).items():
            own_settings = stages.get(name, replaced_stage)
            count += sum(
                key in own_settings and own_settings[key] == value
                for key, value in settings.items()
            )
        return count

    most = max(map(equal_settings, candidates), default=0)
    return [control for control in candidates if equal_settings(control) == most]


def _settings_by_stage(row: ResultRow) -> dict[str, Mapping[str, object]]:
    """Return the settings of a row's stages by their methods' names."""
    method, settings = row.first.method, row.first.settings
    if "+" not in method:
        return {method: settings}
    return dict(cast("Mapping[str, Mapping[str, object]]", settings))
