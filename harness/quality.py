"""Tables of what students can do: scores, retention, flips, what stands behind them, and rows against rows. No torch."""

import re
from collections.abc import Mapping
from statistics import fmean
from typing import cast

from harness import stats
from harness.groups import BITS, TEACHER, Group, Row, block_of, by_chance, compare, leaders, of_documents, ordered, times_of
from harness.means import weighted
from harness.record import TaskScore
from harness.stats import Interval
from harness.table import DASH, Best, Table, percent, plain, points, shown_name, status_of, table_of

_BOLD = ("score", "retention", "above chance", "perplexity", "bits per byte", "error", "against teacher")


_Cells = dict[str, tuple[str, dict[str, object]]]  # column -> (text, exact values)


def quality(found: Group) -> Table:
    """Scores, retention and flips against the teacher, task by task."""
    rows = []
    teacher = found.teacher
    families = len({block_of(row) for row in found.rows} - {TEACHER, "control"})
    stats.prepare(run for row in found.rows for task in found.tasks for run in row.outcomes(task))
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
        return _perplexity_cells(scores, teacher.scores(task) if teacher else [])
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
        error = fmean(one.kl_stderr for one in near)
        cells["KL"] = (f"{kl:.3f} ± {1.96 * error:.3f}", {"KL": kl, "KL stderr": error})
        cells["same top"] = (f"{100 * agreement:.1f} %", {"same top": agreement})
    return cells


def _written_cells(scores: list[TaskScore]) -> _Cells:
    """Return what is known of written answers: their length, and how many cannot be read."""
    cells: _Cells = {}
    tokens = [score.tokens_per_answer for score in scores if score.tokens_per_answer is not None]
    if tokens:
        cells["tokens"] = (f"{fmean(tokens):.1f}", {"tokens": fmean(tokens)})
        invalid = fmean(score.invalid_share for score in scores)
        cells["invalid"] = (f"{100 * invalid:.1f} %", {"invalid": invalid})
    return cells


def _perplexity_cells(scores: list[TaskScore], reference: list[TaskScore]) -> _Cells:
    """Return a perplexity, and its ratio to the teacher's with an interval over the documents."""
    value = fmean(score.value for score in scores)
    bits = scores[0].metric == BITS
    cells: _Cells = {"bits per byte": (f"{value:.3f}", {"bits per byte": value})} if bits else {}
    cells = cells or {"perplexity": (f"{value:.2f}", {"perplexity": value})}
    if len(scores) == len(reference) == 1 and scores[0].items_digest == reference[0].items_digest:
        ratio = of_documents(scores[0].totals, reference[0].totals, scores[0])
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
            if any(score.cut_prompts for score in scores):
                shown["cut prompts"] = f"{fmean(score.cut_prompts for score in scores):.0f}"
            exact |= {"macro": fmean(macros) if macros else None, **{f"picked {letter}": share for letter, share in picked.items()}}
            exact |= {"unended": fmean(cut) if cut else None, "cut prompts": fmean(score.cut_prompts for score in scores)}
            rows.append((shown, exact))
    return table_of("diagnostics", "Behind the scores", rows) if rows else None


def by_extractor_of(score: TaskScore) -> dict[str, float]:
    """Return the figure by every extractor (of a choice: every metric) that gives items a value, the score's own first."""
    names = sorted([*score.outcomes, *score.values], key=lambda name: name != score.primary)
    return {name: _figure(score, name) for name in names}


def _figure(score: TaskScore, name: str) -> float:
    if name in score.values:
        return weighted(score.values[name], score.parts)
    marks = score.outcomes[name]
    return weighted([float(mark == "1") for mark in marks], score.parts) if score.parts else marks.count("1") / score.n


def controls(found: Group) -> Table | None:
    """Each method against the controls that it needs: difference in points on the same items."""
    rows = []
    for row in ordered(found):
        for name in row.first.controls:
            for control in _controls_of(row, [other for other in found.rows if other.first.method == name]):
                rows += [_gap(found, row, control, task) for task in found.tasks]
    return table_of("controls", "Against the controls, on the same items", rows) if rows else None


def _gap(found: Group, row: Row, reference: Row, task: str) -> tuple[dict[str, str], dict[str, object]]:
    """Return a line of two rows' difference on a task: as shown, and exact. Perplexities are compared by their ratio, below 1 is better.

    Where the teacher is at chance a difference is shown and not judged: students that guess otherwise are no better and no worse.
    """
    scores = [score for one in (row, reference) for score in one.scores(task)]
    digests = {score.items_digest for score in scores}
    if len(scores) > 1 and len(digests) == 1 and all(score.lower_is_better and not score.unpaired for score in scores):
        return _ratio(row, reference, task)
    gap = compare(row, reference, task, ratio=False)
    if gap.value is None or gap.low is None or gap.high is None:
        verdict = DASH if not gap.reason else f"- ({gap.reason})"
    elif by_chance(found, task):
        verdict = f"{DASH} (teacher at chance)"
    else:
        verdict = "better" if gap.low > 0 else "worse" if gap.high < 0 else "cannot tell"
    pair = {"row": row.label, "against": reference.label, "task": task}
    exact: dict[str, object] = {**pair, "difference": gap.value, "low": gap.low, "high": gap.high, "verdict": verdict}
    numbered = any(score.unit == "number" for score in scores)
    return {**pair, "difference (points)": plain(gap) if numbered else points(gap), "verdict": verdict}, exact


def _ratio(row: Row, reference: Row, task: str) -> tuple[dict[str, str], dict[str, object]]:
    found = times_of(row, reference, task)
    verdict = DASH
    if found.low is not None and found.high is not None:
        verdict = "better" if found.high < 1 else "worse" if found.low > 1 else "cannot tell"
    pair = {"row": row.label, "against": reference.label, "task": task}
    exact: dict[str, object] = {**pair, "difference": None, "low": None, "high": None, "verdict": verdict}
    exact |= {"ratio": found.value, "ratio low": found.low, "ratio high": found.high}
    return {**pair, "difference (points)": _times(found), "verdict": verdict}, exact


def against(found: Group, label: str) -> Table | None:
    """Every row against one named row: difference in points on the same items."""
    named = next((row for row in found.rows if row.label == label), None)
    others = [row for row in ordered(found) if named is not None and row.label != label and row.done]
    rows = [_gap(found, row, named, task) for row in others for task in found.tasks] if named is not None else []
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
