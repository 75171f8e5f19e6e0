"""Tables of what students can do: scores, retention, flips, what stands behind them, and rows against rows. No torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import cast

from harness import stats
from harness.groups import ALPHA, BITS, TEACHER, Group, Row, block_of, by_chance, compare, leaders, ordered, times_of, unequal
from harness.intervals import Interval, Source, half_width
from harness.means import weighted
from harness.record import TaskScore
from harness.table import DASH, Best, Table, percent, plain, points, shown_name, status_of, table_of

_BOLD = ("score", "retention", "above chance", "perplexity", "bits per byte", "error", "against teacher")


_Cells = dict[str, tuple[str, dict[str, object]]]  # column -> (text, exact values)


def quality(found: Group) -> Table:
    """Scores, retention and flips against the teacher, task by task."""
    rows = []
    teacher = found.teacher
    families = len({block_of(row) for row in found.rows} - {TEACHER, "control"})
    leading = {task: leaders(found, task) for task in found.tasks}
    for row in ordered(found):
        shown: dict[str, str] = {"row": shown_name(row), "seeds": str(len(row.done))}
        if families > 1:
            shown["family"] = block_of(row)
        exact: dict[str, object] = {
            "row": row.label,
            "family": block_of(row),
            "control": row.first.is_control,
            "seeds": len(row.done),
            "status": status_of(row) or "success",
        }
        for task in found.tasks:
            best = row.label in leading[task]
            exact[f"{task} best"] = best
            for column, (text, values) in _task_cells(row, teacher, task, chance=by_chance(found, task)).items():
                name = column if len(found.tasks) == 1 else f"{task} {column}"
                shown[name] = Best(text) if best and column in _BOLD and text != DASH else text
                exact |= {f"{task} {key}": value for key, value in values.items()}
        rows.append((shown, exact))
    tasks = ", ".join(f"{task} (n = {_items(found, task)})" for task in found.tasks)
    return table_of("quality", f"Quality on {tasks}", rows)


def _items(found: Group, task: str) -> int:
    return next((score.n for row in found.rows for score in row.scores(task)), 0)


def _task_cells(row: Row, teacher: Row | None, task: str, *, chance: bool) -> _Cells:
    """Return column -> (text, exact values) of one row on one task; no retention of a teacher that is at chance itself."""
    scores = row.scores(task)
    if not scores:
        return {"score": (DASH, {"score": None}), "retention": (DASH, {"retention": None})}
    if scores[0].kind == "perplexity" and not scores[0].unpaired:
        return _perplexity_cells(row, teacher, task)
    value = fmean(score.value for score in scores)
    if scores[0].lower_is_better:
        return _error_cells(row, teacher, task, value) | _fidelity_cells(row, task) | _written_cells(scores)
    guessing = scores[0].chance
    against = compare(row, teacher, task, ratio=True) if teacher and not chance else Interval(None)
    cells: _Cells = {
        "score": (scores[0].shown(value), {"score": value}),
        "retention": (percent(against), {"retention": against.value, "retention low": against.low, "retention high": against.high}),
    }
    cells |= _apart_cells(row, teacher, task)
    if guessing:
        above = compare(row, teacher, task, ratio=True, chance=guessing) if teacher and not chance else Interval(None)
        cells["above chance"] = (
            percent(above),
            {"above chance": above.value, "above chance low": above.low, "above chance high": above.high},
        )
    if teacher and teacher.outcomes(task):
        reference = teacher.outcomes(task)[0]
        counts = [stats.pairs(reference, outcome) for outcome in row.outcomes(task) if len(outcome) == len(reference)]
        if counts:
            lost, won = fmean(one.teacher_only for one in counts), fmean(one.student_only for one in counts)
            cells["lost/won"] = (f"{lost:.0f}/{won:.0f}", {"lost": lost, "won": won})
    return cells | _fidelity_cells(row, task) | _written_cells(scores)


def _apart_cells(row: Row, teacher: Row | None, task: str) -> _Cells:
    """Return the difference to the teacher's figure where all items make it together: it has no flips, and not always a retention."""
    score = row.scores(task)[0]
    if not score.form or teacher is None:
        return {}
    gap = compare(row, teacher, task, ratio=False)
    text = points(gap) if score.unit == "share" else plain(gap)
    return {"difference": (text, {"difference": gap.value, "difference low": gap.low, "difference high": gap.high})}


def _fidelity_cells(row: Row, task: str) -> _Cells:
    """Return how near the row's distributions are to the teacher's."""
    cells: _Cells = {}
    near = [one for record in row.done for one in record.fidelity if one.task == task]
    if near:
        kl, agreement = fmean(one.kl for one in near), fmean(one.agreement for one in near)
        error = _error_over_seeds([one.kl for one in near], [one.kl_stderr for one in near], near[0].items)
        cells["KL"] = (f"{kl:.3f} ± {error:.3f}", {"KL": kl, "KL half-width": error})
        cells["same top"] = (f"{100 * agreement:.1f} %", {"same top": agreement})
    return cells


def _error_over_seeds(values: Sequence[float], errors: Sequence[float], items: int) -> float:
    """Return the half-width of a mean over seeds: its error over items, which the seeds share, and the scatter of the seeds."""
    sources = [Source(fmean(error**2 for error in errors), max(1, items - 1))]
    if len(values) > 1:
        sources.append(Source(variance(values) / len(values), len(values) - 1))
    return half_width(sources)


def _written_cells(scores: list[TaskScore]) -> _Cells:
    """Return what is known of written answers: their length, and how many cannot be read."""
    cells: _Cells = {}
    tokens = [score.tokens_per_answer for score in scores if score.tokens_per_answer is not None]
    if tokens:
        cells["tokens"] = (f"{fmean(tokens):.1f}", {"tokens": fmean(tokens)})
        invalid = fmean(score.invalid_share for score in scores)
        cells["invalid"] = (f"{100 * invalid:.1f} %", {"invalid": invalid})
    return cells


def _perplexity_cells(row: Row, teacher: Row | None, task: str) -> _Cells:
    """Return a perplexity, and its ratio to the teacher's with an interval over documents and trainings."""
    scores, reference = row.scores(task), teacher.scores(task) if teacher else []
    value = fmean(score.value for score in scores)
    bits = scores[0].metric == BITS
    cells: _Cells = {"bits per byte": (f"{value:.3f}", {"bits per byte": value})} if bits else {}
    cells = cells or {"perplexity": (f"{value:.2f}", {"perplexity": value})}
    if teacher is not None and reference and len({score.items_digest for score in (*scores, *reference)}) == 1:
        ratio = Interval(1.0, 1.0, 1.0) if row is teacher else times_of(row, teacher, task)
        cells["against teacher"] = (_times(ratio), {"ratio": ratio.value, "ratio low": ratio.low, "ratio high": ratio.high})
    elif reference:
        cells["against teacher"] = (f"x{value / reference[0].value:.3f}", {"ratio": value / reference[0].value})
    return cells


def _error_cells(row: Row, teacher: Row | None, task: str, value: float) -> _Cells:
    """Return a figure that is better when lower, and its ratio to the teacher's on the same items: nothing is retained of it."""
    name = "perplexity" if row.scores(task)[0].kind == "perplexity" else "error"
    cells: _Cells = {name: (row.scores(task)[0].shown(value), {name: value})}
    if teacher is not None and teacher.scores(task):
        ratio = times_of(row, teacher, task)
        cells["against teacher"] = (_times(ratio), {"ratio": ratio.value, "ratio low": ratio.low, "ratio high": ratio.high})
    return cells


def _times(ratio: Interval) -> str:
    """Write a ratio with its interval: x0.898 [0.880, 0.917]; very large and very small ones in powers of ten."""
    if ratio.value is None:
        return DASH
    form = ".3f" if 0.01 <= ratio.value < 1_000 else ".2g"
    ends = "" if ratio.low is None or ratio.high is None else f" [{ratio.low:{form}}, {ratio.high:{form}}]"
    return f"x{ratio.value:{form}}{ends}"


def diagnostics(found: Group) -> Table | None:
    """What stands behind the scores: every extractor, both averages, the choices picked, what was cut."""
    rows = []
    for row in ordered(found):
        for task in found.tasks:
            scores = [score for score in row.scores(task) if score.outcomes or score.values]
            if not scores:
                continue
            first = scores[0]
            names = dict.fromkeys(name for score in scores for name in by_extractor_of(score))
            by_extractor = {name: fmean(known[name] for s in scores if name in (known := by_extractor_of(s))) for name in names}
            shown = {
                "row": shown_name(row),
                "task": task,
                "correct by": ", ".join(f"{name} {100 * v if first.unit == 'share' else v:.1f}" for name, v in by_extractor.items()),
            }
            exact: dict[str, object] = {"row": row.label, "task": task, **by_extractor}
            macros = [score.macro for score in scores if score.macro is not None]
            if macros:
                shown["macro"] = first.shown(fmean(macros))
            picked = {letter: fmean(score.chosen.get(letter, 0.0) for score in scores) for letter in first.chosen}
            if picked:
                shown["picked"] = " ".join(f"{letter} {100 * share:.0f}" for letter, share in picked.items())
            cut = [score.truncated_share for score in scores if score.truncated_share is not None]
            if cut:
                shown["unended"] = f"{100 * fmean(cut):.1f} %"
            drop = _drop_shown(found, row, task)
            if drop is not None:
                shown["drop shown"] = f"{100 * drop:.1f}"
            exact["drop shown"] = drop
            if any(score.cut_prompts for score in scores):
                shown["cut prompts"] = f"{fmean(score.cut_prompts for score in scores):.0f}"
            exact |= {"macro": fmean(macros) if macros else None, **{f"picked {letter}": share for letter, share in picked.items()}}
            exact |= {"unended": fmean(cut) if cut else None, "cut prompts": fmean(score.cut_prompts for score in scores)}
            rows.append((shown, exact))
    return table_of("diagnostics", "Behind the scores", rows) if rows else None


def _drop_shown(found: Group, row: Row, task: str) -> float | None:
    """Return the smallest true drop that the items show at a row's own share of flips against the teacher; None where there are none."""
    teacher = found.teacher.outcomes(task) if found.teacher else []
    counts = [stats.pairs(teacher[0], run) for run in row.outcomes(task) if len(run) == len(teacher[0])] if teacher else []
    if not counts or row is found.teacher:
        return None
    return stats.smallest_drop(counts[0].n, fmean((one.teacher_only + one.student_only) / one.n for one in counts))


def by_extractor_of(score: TaskScore) -> dict[str, float]:
    """Return the figure by every extractor (of a choice: every metric) that gives items a value, the score's own first."""
    names = sorted([*score.outcomes, *score.values], key=lambda name: name != score.primary)
    return {name: _figure(score, name) for name in names}


def _figure(score: TaskScore, name: str) -> float:
    if name in score.values:
        return weighted(score.values[name], score.parts)
    marks = score.outcomes[name]
    return weighted([float(mark == "1") for mark in marks], score.parts) if score.parts else marks.count("1") / score.n


@dataclass(frozen=True)
class _Gap:
    """Two rows on one task: what parts them, and the p of "nothing does"; `why` says why the pair is not judged."""

    row: str
    reference: str
    task: str
    shown: str
    sign: float  # above 0: the row is the better one
    exact: Mapping[str, object]
    p: float | None
    why: str = ""


def controls(found: Group) -> Table | None:
    """Each method against the controls that it needs: difference in points on the same items, verdicts adjusted over the table."""
    gaps = [
        _gap(found, row, control, task)
        for row in ordered(found)
        for name in row.first.controls
        for control in _controls_of(row, [other for other in found.rows if other.first.method == name])
        for task in found.tasks
    ]
    return table_of("controls", "Against the controls, on the same items", _judged(gaps)) if gaps else None


def _judged(gaps: Sequence[_Gap]) -> list[tuple[dict[str, str], dict[str, object]]]:
    """Return a line a gap with its verdict: two-sided alpha .05, Holm over the lines that are judged."""
    tested = [gap for gap in gaps if gap.p is not None and not gap.why]
    adjusted = dict(zip(map(id, tested), stats.holm([gap.p for gap in tested if gap.p is not None]), strict=True))
    lines = []
    for gap in gaps:
        p = adjusted.get(id(gap))
        verdict = gap.why or DASH
        if p is not None:
            verdict = "cannot tell" if p > ALPHA or gap.sign == 0 else "better" if gap.sign > 0 else "worse"
        pair = {"row": gap.row, "against": gap.reference, "task": gap.task}
        shown = {**pair, "difference (points)": gap.shown, "p (Holm)": DASH if p is None else f"{p:.2g}", "verdict": verdict}
        exact: dict[str, object] = {**pair, **gap.exact, "p": gap.p, "p (Holm)": p, "verdict": verdict}
        lines.append((shown, exact))
    return lines


def _gap(found: Group, row: Row, reference: Row, task: str) -> _Gap:
    """Return two rows' difference on a task. Perplexities and errors are compared by their ratio, below 1 is better."""
    scores = [score for one in (row, reference) for score in one.scores(task)]
    alike = len(scores) > 1 and len({score.items_digest for score in scores}) == 1
    lower = alike and all(score.lower_is_better and not score.unpaired for score in scores)
    gap = times_of(row, reference, task) if lower else compare(row, reference, task, ratio=False)
    numbered = any(score.unit == "number" for score in scores)
    shown = _times(gap) if lower else plain(gap) if numbered else points(gap)
    exact: dict[str, object] = {"difference": gap.value, "low": gap.low, "high": gap.high}
    if lower:
        exact = {"difference": None, "low": None, "high": None, "ratio": gap.value, "ratio low": gap.low, "ratio high": gap.high}
    sign = 0.0 if gap.value is None else 1 - gap.value if lower else gap.value
    p = unequal(row, reference, task) if gap.value is not None and gap.low is not None else None
    return _Gap(row.label, reference.label, task, shown, sign, exact, p, _not_judged(found, row, reference, task, gap))


def _not_judged(found: Group, row: Row, reference: Row, task: str, gap: Interval) -> str:
    """Return why no verdict is given on two rows, "" where one is.

    Where the teacher is at chance students that guess otherwise are no better and no worse. Of a method that was trained once nothing says
    how much another training would differ.
    """
    if gap.value is None or gap.low is None:
        return f"- ({gap.reason})" if gap.reason else DASH
    if by_chance(found, task):
        return "teacher at chance: not judged"
    once = [one for one in (row, reference) if one.trained_once]
    return "one training: not judged" if once else ""


def against(found: Group, label: str) -> Table | None:
    """Every row against one named row: difference in points on the same items."""
    named = next((row for row in found.rows if row.label == label), None)
    others = [row for row in ordered(found) if named is not None and row.label != label and row.done]
    rows = _judged([_gap(found, row, named, task) for row in others for task in found.tasks]) if named is not None else []
    name = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
    return table_of(f"against-{name}", f"Against {label}, on the same items", rows) if rows else None


def _controls_of(row: Row, candidates: list[Row]) -> list[Row]:
    """Of several rows of one control keep those nearest to this row: the most settings alike, stage by stage.

    A stage that this row has not stands in the place of its last one, and is compared with what that one handed on first of all.
    """
    own = _by_stage(row)
    replaced = {**next(reversed(own.values())), **row.first.handed_on}

    def alike(control: Row) -> int:
        count = 0
        for stage, settings in _by_stage(control).items():
            mine = own.get(stage, replaced)
            count += sum(name in mine and mine[name] == value for name, value in settings.items())
        return count

    most = max(map(alike, candidates), default=0)
    return [one for one in candidates if alike(one) == most]


def _by_stage(row: Row) -> dict[str, Mapping[str, object]]:
    """Return the settings of a row's stages by their methods' names."""
    first = row.first
    return dict(cast("Mapping[str, Mapping[str, object]]", first.settings)) if "+" in first.method else {first.method: first.settings}
