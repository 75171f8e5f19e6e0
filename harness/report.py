"""Tables from records alone: Markdown and CSV, byte for byte the same wherever they are made again. No torch.

Records are grouped before anything is compared: rows of one table share teacher, student shape, budget, device,
dtype, scoring path, machine and task versions. What was not measured is a dash, and a note says why.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from harness import stats
from harness.checkpoint import digest_of
from harness.record import RunRecord, TaskScore
from harness.stats import Interval

if TYPE_CHECKING:
    import pandas

DASH = "-"
TEACHER = "teacher"

GLOSSARY = {
    "row": "the method that made the student; settings that differ from the defaults in brackets",
    "seeds": "independent training runs, pooled; 1 for rows without a random draw",
    "score": "accuracy by the task's primary extractor, mean over seeds",
    "retention": "student's score / teacher's score on the same items, with its 95 % interval (one seed: paired log ratio; several: "
    "bootstrap over seeds and items)",
    "above chance": "the same ratio after the chance level is taken from both: what is left of the part above guessing",
    "lost/won": "items the teacher has right and the student wrong / the reverse, mean over seeds",
    "KL": "divergence of the student's distributions from the teacher's, nats a question's choices or a token of the teacher's answers, "
    "with 1.96 standard errors clustered by item",
    "same top": "share of those in which both put the same choice or token first",
    "perplexity": "by word, as lm-eval counts words; lower is better",
    "against teacher": "student's perplexity / teacher's, with its 95 % interval over documents",
    "correct by": "accuracy by each extractor or metric; the first is the score's own",
    "macro": "mean accuracy over subjects, or over problems' numbers of steps",
    "picked": "how often each position was chosen, in percent",
    "unended": "answers that ran into the longest length",
    "cut prompts": "requests longer than the context, which lost tokens on the left as in lm-eval",
    "tokens": "tokens written per answer, the ending one included",
    "invalid": "share of answers in which the primary extractor finds nothing",
    "decode x": "teacher's seconds per written token / the student's, alternating in one process, batch 1",
    "prefill x": "the same for reading the prompt",
    "disk": "bytes of the weight files; (x) the teacher's / the student's",
    "resident": "bytes of parameters and buffers in memory, each storage once",
    "rise": "how far one inference run lifts the process's peak memory above the resting model",
    "peak": "peak resident memory of the cell's process through training and scoring, imports (about 700 MiB) included",
    "s/problem": "seconds per problem of the scored run, batched, natural answer lengths",
    "seen": "tokens that passed through the student in training, prompts included, padding not",
    "train s": "seconds in the training loop",
    "FLOPs": "training: 3 x forward (2 per weight outside the embedding, head and attention included) x seen tokens",
    "teacher s": "seconds the teacher spent for this row (writing traces once, even where the cache served them; forward passes)",
    "teacher FLOPs": "its forward passes and written tokens, 2 per weight and token, head and attention included",
}


@dataclass(frozen=True)
class Row:
    """All records of one label: the seeds of one row."""

    label: str
    records: tuple[RunRecord, ...]

    @property
    def done(self) -> tuple[RunRecord, ...]:
        """The records that succeeded."""
        return tuple(record for record in self.records if record.status == "success")

    @property
    def first(self) -> RunRecord:
        """Any record of the row, for what all of them share."""
        return self.records[0]

    def scores(self, task: str) -> list[TaskScore]:
        """The row's scores on a task, one a seed."""
        return [score for record in self.done if (score := record.score(task)) is not None]

    def by_seed(self, task: str) -> dict[int | None, str]:
        """Per-item outcomes by seed."""
        return {
            record.seed: score.outcomes[score.primary]
            for record in self.done
            if (score := record.score(task)) is not None and score.primary in score.outcomes
        }

    def outcomes(self, task: str) -> list[str]:
        """Per-item outcomes of the primary extractor, one string a seed."""
        return list(self.by_seed(task).values())


@dataclass(frozen=True)
class Group:
    """Records that may stand in one table, and what they share."""

    shared: Mapping[str, str]
    rows: tuple[Row, ...]
    tasks: tuple[str, ...]
    superseded: int

    @property
    def teacher(self) -> Row | None:
        """The teacher's row, when it succeeded."""
        return next((row for row in self.rows if row.label == TEACHER and row.done), None)


@dataclass(frozen=True)
class Table:
    """One table: header cells, rows of text, and the same numbers unrounded for the CSV."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    frame: "pandas.DataFrame"


def _scored_under(record: RunRecord) -> dict[str, str]:
    """What every row of a table shares, known for failed records too."""
    return {
        "teacher": " and ".join(one.name for one in record.teachers),
        "teacher digest": " ".join(one.digest for one in record.teachers),
        "tasks": ", ".join(record.tasks),
        "device": record.device,
        "dtype": record.dtype,
        "limited": "a sample of the items" if record.limited else "",
        "prompts": f"chat template{f', system prompt {record.system!r}' if record.system else ''}" if record.chat else "",
    }


def _measured_under(record: RunRecord) -> dict[str, str]:
    """What rows that succeeded share beside that."""
    environment = record.environment
    return {
        "path": record.path,
        "items": digest_of([score.items_digest for score in record.scores]),
        "threads": str(environment.threads) if environment else "",
        "machine": environment.machine if environment else "",
    }


def _made_under(record: RunRecord) -> dict[str, str]:
    """What rows of one table share in how their students were made; the teacher's row has none of it."""
    if record.label == TEACHER:
        return {}
    shape = {"student": record.student_recipe, "student base": record.student_base.digest}
    return shape | ({"budget": f"{record.budget_tokens:,} seen tokens, {record.budget_rows:,} items"} if record.trains else {})


def _fits(record: RunRecord, made: Mapping[str, str]) -> bool:
    """Tell whether a record may stand in a table of students made so: it names nothing else than they do."""
    return all(made.get(name) == value for name, value in _made_under(record).items())


def group(records: Iterable[RunRecord]) -> list[Group]:
    """Split records into tables. The teacher and untrained rows join every table that they fit; failed ones too."""
    every = list(records)
    groups: list[Group] = []
    for scored in _distinct(_scored_under(record) for record in every):
        here = [record for record in every if _scored_under(record) == scored]
        worked = [record for record in here if record.status == "success"]
        failed = [record for record in here if record.status != "success"]
        for measured in _distinct(_measured_under(record) for record in worked) or [{}]:
            alike = [record for record in worked if _measured_under(record) == measured]
            members = [*alike, *failed]
            made = _distinct(_made_under(record) for record in members if record.trains)
            made = made or _distinct(_made_under(record) for record in members if record.label != TEACHER) or [{}]
            groups += [_group([r for r in members if _fits(r, one)], {**scored, **measured, **one}) for one in made]
    return sorted(groups, key=lambda one: sorted(one.shared.items()))


def _distinct(conditions: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    return list({digest_of(one): one for one in conditions}.values())


def _group(records: Sequence[RunRecord], shared: Mapping[str, str]) -> Group:
    """Keep the newest record of each row and seed; one that succeeded before one that did not."""
    newest: dict[tuple[str, int | None], RunRecord] = {}
    for record in sorted(records, key=lambda r: (r.status == "success", r.created, r.key)):
        newest[record.label, record.seed] = record
    labels = dict.fromkeys(label for label, _ in sorted(newest, key=lambda pair: (pair[0], pair[1] or 0)))
    rows = tuple(
        Row(label, tuple(record for (name, _), record in sorted(newest.items(), key=_by_seed) if name == label)) for label in labels
    )
    sample = next((record for record in newest.values() if record.status == "success"), None)
    tasks = tuple(score.task for score in sample.scores) if sample else ()
    return Group(shared, rows, tasks, len(records) - len(newest))


def _by_seed(pair: tuple[tuple[str, int | None], RunRecord]) -> tuple[str, int]:
    return pair[0][0], pair[0][1] or 0


def _ordered(found: Group) -> list[Row]:
    """Teacher, then methods, then controls; within each by mean score, best first."""

    def place(row: Row) -> tuple[int, float, str]:
        kind = 0 if row.label == TEACHER else 2 if row.first.is_control else 1
        values = [score.value for task in found.tasks for score in row.scores(task)]
        return kind, -fmean(values) if values else 1.0, row.label

    return sorted(found.rows, key=place)


def compare(student: Row, reference: Row, task: str, *, ratio: bool, chance: float = 0.0) -> Interval:
    """Compare two rows on a task, on the same items: analytic for one seed against one, bootstrap otherwise."""
    ours, theirs = student.scores(task), reference.scores(task)
    if not ours or not theirs:
        return Interval(None, reason="not scored")
    if len({score.items_digest for score in [*ours, *theirs]}) > 1:
        return Interval(None, reason="scored on different items")
    left, right = student.by_seed(task), reference.by_seed(task)
    if len(left) == len(right) == 1:
        counts = stats.pairs(*right.values(), *left.values())
        if not ratio:
            return stats.difference(counts)
        return stats.retention_above_chance(counts, chance) if chance else stats.retention(counts)
    shared = sorted(set(left) & set(right), key=str)
    if len(left) > 1 and len(right) > 1 and shared:  # seeds stand against the same seeds
        return stats.two_level([left[seed] for seed in shared], [right[seed] for seed in shared], ratio=ratio, chance=chance)
    return stats.two_level(list(left.values()), list(right.values()), ratio=ratio, chance=chance)


def _percent(found: Interval, *, digits: int = 1) -> str:
    if found.value is None:
        return DASH
    text = f"{100 * found.value:.{digits}f} %"
    return text if found.low is None or found.high is None else f"{text} [{100 * found.low:.{digits}f}, {100 * found.high:.{digits}f}]"


def _points(found: Interval) -> str:
    if found.value is None:
        return DASH
    text = f"{100 * found.value:+.1f}"
    return text if found.low is None or found.high is None else f"{text} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def _status(row: Row) -> str:
    broken = [record for record in row.records if record.status != "success"]
    return "" if not broken else f"{broken[0].status}: {broken[0].reason}"


def _name(row: Row) -> str:
    return f"{row.label} (control)" if row.first.is_control else row.label


def _table(name: str, title: str, rows: Sequence[tuple[dict[str, str], dict[str, object]]]) -> Table:
    """Build a table from (shown, exact) pairs of rows."""
    import pandas

    columns = tuple(dict.fromkeys(column for shown, _ in rows for column in shown))
    frame = pandas.DataFrame([exact for _, exact in rows])
    return Table(name, title, columns, tuple(tuple(shown.get(column, DASH) for column in columns) for shown, _ in rows), frame)


def quality(found: Group) -> Table:
    """Scores, retention and flips against the teacher, task by task."""
    rows = []
    teacher = found.teacher
    for row in _ordered(found):
        shown: dict[str, str] = {"row": _name(row), "seeds": str(len(row.done))}
        exact: dict[str, object] = {
            "row": row.label,
            "control": row.first.is_control,
            "seeds": len(row.done),
            "status": _status(row) or "success",
        }
        for task in found.tasks:
            for column, (text, values) in _task_cells(row, teacher, task).items():
                name = column if len(found.tasks) == 1 else f"{task} {column}"
                shown[name] = text
                exact |= {f"{task} {key}": value for key, value in values.items()}
        rows.append((shown, exact))
    tasks = ", ".join(f"{task} (n = {_items(found, task)})" for task in found.tasks)
    return _table("quality", f"Quality on {tasks}", rows)


def _items(found: Group, task: str) -> int:
    return next((score.n for row in found.rows for score in row.scores(task)), 0)


def _task_cells(row: Row, teacher: Row | None, task: str) -> dict[str, tuple[str, dict[str, object]]]:
    """Return column -> (text, exact values) of one row on one task."""
    scores = row.scores(task)
    if not scores:
        return {"score": (DASH, {"score": None}), "retention": (DASH, {"retention": None})}
    if scores[0].kind == "perplexity":
        return _perplexity_cells(scores, teacher.scores(task) if teacher else [])
    value = fmean(score.value for score in scores)
    chance = scores[0].chance
    kept = compare(row, teacher, task, ratio=True) if teacher else Interval(None, reason="no teacher row")
    cells: dict[str, tuple[str, dict[str, object]]] = {
        "score": (f"{100 * value:.1f} %", {"score": value}),
        "retention": (_percent(kept), {"retention": kept.value, "retention low": kept.low, "retention high": kept.high}),
    }
    if chance:
        above = compare(row, teacher, task, ratio=True, chance=chance) if teacher else Interval(None)
        cells["above chance"] = (
            _percent(above),
            {"above chance": above.value, "above chance low": above.low, "above chance high": above.high},
        )
    if teacher and teacher.outcomes(task):
        reference = teacher.outcomes(task)[0]
        counts = [stats.pairs(reference, outcome) for outcome in row.outcomes(task) if len(outcome) == len(reference)]
        if counts:
            lost, won = fmean(one.teacher_only for one in counts), fmean(one.student_only for one in counts)
            cells["lost/won"] = (f"{lost:.0f}/{won:.0f}", {"lost": lost, "won": won})
    near = [one for record in row.done for one in record.fidelity if one.task == task]
    if near:
        kl, agreement = fmean(one.kl for one in near), fmean(one.agreement for one in near)
        error = fmean(one.kl_stderr for one in near)
        cells["KL"] = (f"{kl:.3f} ± {1.96 * error:.3f}", {"KL": kl, "KL stderr": error})
        cells["same top"] = (f"{100 * agreement:.1f} %", {"same top": agreement})
    tokens = [score.tokens_per_answer for score in scores if score.tokens_per_answer is not None]
    if tokens:
        cells["tokens"] = (f"{fmean(tokens):.1f}", {"tokens": fmean(tokens)})
        invalid = fmean(score.invalid_share for score in scores)
        cells["invalid"] = (f"{100 * invalid:.1f} %", {"invalid": invalid})
    return cells


def _perplexity_cells(scores: list[TaskScore], reference: list[TaskScore]) -> dict[str, tuple[str, dict[str, object]]]:
    """Return a perplexity, and its ratio to the teacher's with an interval over the documents."""
    value = fmean(score.value for score in scores)
    cells: dict[str, tuple[str, dict[str, object]]] = {"perplexity": (f"{value:.2f}", {"perplexity": value})}
    if len(scores) == len(reference) == 1 and scores[0].items_digest == reference[0].items_digest:
        ratio = stats.perplexity_ratio(scores[0].totals, reference[0].totals)
        text = DASH if ratio.value is None else f"x{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
        cells["against teacher"] = (text, {"ratio": ratio.value, "ratio low": ratio.low, "ratio high": ratio.high})
    elif reference:
        cells["against teacher"] = (f"x{value / reference[0].value:.3f}", {"ratio": value / reference[0].value})
    return cells


def diagnostics(found: Group) -> Table | None:
    """What stands behind the scores: every extractor, both averages, the choices picked, what was cut."""
    rows = []
    for row in _ordered(found):
        for task in found.tasks:
            scores = [score for score in row.scores(task) if score.outcomes]
            if not scores:
                continue
            first = scores[0]
            by_extractor = {name: fmean(s.outcomes[name].count("1") / s.n for s in scores) for name in first.outcomes}
            shown = {"row": _name(row), "task": task, "correct by": ", ".join(f"{name} {100 * v:.1f}" for name, v in by_extractor.items())}
            exact: dict[str, object] = {"row": row.label, "task": task, **by_extractor}
            macros = [score.macro for score in scores if score.macro is not None]
            if macros:
                shown["macro"] = f"{100 * fmean(macros):.1f} %"
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
    return _table("diagnostics", "Behind the scores", rows) if rows else None


_MIB = 2**20


def cost(found: Group) -> Table:
    """Speed, memory and training cost."""
    rows = []
    teacher = found.teacher
    for row in _ordered(found):
        shown: dict[str, str] = {"row": _name(row)}
        exact: dict[str, object] = {"row": row.label}

        def add(
            column: str, value: float | None, form: Callable[[float], str], shown: dict[str, str] = shown, exact: dict[str, object] = exact
        ) -> None:
            shown[column] = DASH if value is None else form(value)
            exact[column] = value

        add("decode tok/s", _mean(row, "decode_tokens_per_second"), lambda v: f"{v:.0f}")
        add("decode x", _mean(row, "decode_speedup"), lambda v: f"{v:.2f}")
        add("prefill tok/s", _mean(row, "prefill_tokens_per_second"), lambda v: f"{v:.0f}")
        add("prefill x", _mean(row, "prefill_speedup"), lambda v: f"{v:.2f}")
        disk = _mean(row, "weight_bytes_disk")
        base = _mean(teacher, "weight_bytes_disk") if teacher else None
        add("disk MiB", None if disk is None else disk / _MIB, lambda v: f"{v:.2f}")
        add("disk x", base / disk if base and disk else None, lambda v: f"{v:.2f}")
        resident = _mean(row, "weight_bytes_resident")
        add("resident MiB", None if resident is None else resident / _MIB, lambda v: f"{v:.2f}")
        rise = _mean(row, "inference_rise_bytes")
        add("rise MiB", None if rise is None else rise / _MIB, lambda v: f"{v:.1f}")
        peak = _mean(row, "peak_process_bytes")
        add("peak MiB", None if peak is None else peak / _MIB, lambda v: f"{v:.0f}")
        for task in found.tasks:
            name = "s/problem" if len(found.tasks) == 1 else f"s/problem {task}"
            add(name, _mean(row, f"seconds_per_problem:{task}"), lambda v: f"{v:.4f}")
        trained = [record.cost for record in row.done if record.trains]
        add("seen", fmean(one.seen_tokens for one in trained) if trained else None, lambda v: f"{v:,.0f}")
        add("train s", fmean(one.seconds for one in trained) if trained else None, lambda v: f"{v:.1f}")
        add("FLOPs", fmean(one.flops for one in trained) if trained else None, lambda v: f"{v:.2e}")
        taught = [one for one in trained if one.teacher_tokens]
        add("teacher s", fmean(one.teacher_seconds for one in taught) if taught else None, lambda v: f"{v:.1f}")
        add("teacher FLOPs", fmean(one.teacher_flops for one in taught) if taught else None, lambda v: f"{v:.2e}")
        rows.append((shown, exact))
    return _table("cost", "Speed, memory and training cost", rows)


def _mean(row: Row | None, name: str) -> float | None:
    found = [one.value for record in (row.done if row else ()) if (one := record.measured(name)) is not None]
    return fmean(found) if found else None


def controls(found: Group) -> Table | None:
    """Each method against the controls that it needs: difference in points on the same items."""
    rows = []
    for row in _ordered(found):
        for name in row.first.controls:
            for control in [other for other in found.rows if other.first.method == name]:
                for task in found.tasks:
                    gap = compare(row, control, task, ratio=False)
                    if gap.value is None or gap.low is None or gap.high is None:
                        verdict = DASH if not gap.reason else f"- ({gap.reason})"
                    else:
                        verdict = "better" if gap.low > 0 else "worse" if gap.high < 0 else "cannot tell"
                    pair = {"row": row.label, "against": control.label, "task": task}
                    exact: dict[str, object] = {**pair, "difference": gap.value, "low": gap.low, "high": gap.high, "verdict": verdict}
                    rows.append(({**pair, "difference (points)": _points(gap), "verdict": verdict}, exact))
    return _table("controls", "Against the controls, on the same items", rows) if rows else None


def notes(found: Group) -> list[str]:
    """What a reader must know to trust the table: conditions, resolution, reasons for dashes."""
    shared = found.shared
    student, budget = shared.get("student", "none"), shared.get("budget", "nothing was trained")
    lines = [
        f"Teacher {shared['teacher']}, student {student}; {budget} for each trained row "
        "(`answer-only` by default sees each item as often as `sft` does, in fewer tokens).",
        f"Device {shared['device']} ({shared.get('machine', '-')}, {shared.get('threads', '-')} threads), {shared['dtype']}; "
        f"scoring path {shared.get('path', '-')}; {shared['tasks']}.",
    ]
    for task in found.tasks:
        teacher = found.teacher
        if teacher is None:
            lines.append("The teacher's row did not succeed: no retention can be given.")
            break
        reference = next(iter(teacher.outcomes(task)), "")
        lines += _warnings(found, task)
        flips = [
            (counts.teacher_only + counts.student_only) / counts.n
            for row in found.rows
            if row.label != TEACHER
            for counts in [stats.pairs(reference, outcome) for outcome in row.outcomes(task) if len(outcome) == len(reference)]
        ]
        if flips:
            share = sorted(flips)[len(flips) // 2]
            drop = stats.smallest_drop(len(reference), share)
            lines.append(
                f"{task}: with {len(reference)} items and the median share of flips here ({100 * share:.0f} %) one seed shows drops from "
                f"{100 * (drop or 0):.1f} points on."
            )
    if shared["prompts"]:
        lines.append(f"Prompts are shown in the {shared['prompts']}.")
    if shared["limited"]:
        lines.append("A TRIAL: scored on a sample of the items (--limit); not for quoting, and no baseline.")
    unpacked = dict.fromkeys(
        f"{one.name}: {one.note}." for row in found.rows for record in row.records for one in record.teachers if one.note
    )
    lines += [*unpacked]
    for row in found.rows:
        for record in row.records:
            if record.status != "success":
                seed = f" (seed {record.seed})" if record.seed is not None else ""
                lines.append(f"{row.label}{seed} {record.status}: {record.reason}")
    if found.superseded:
        lines.append(f"{found.superseded} older records of the same rows are not shown.")
    for row in found.rows:
        for task in found.tasks:
            kept = compare(row, found.teacher, task, ratio=True) if found.teacher else Interval(None)
            if row.done and kept.reason:
                lines.append(f"{row.label}, {task}: no retention, {kept.reason}.")
    lines.append("A dash: not measured for this row (no training, no teacher, a choice task writes no tokens), or undefined there.")
    return lines


def _warnings(found: Group, task: str) -> list[str]:
    """Say what else bears on a task's figures: the noise floor, prompts that were cut, what the scorer had to tell."""
    lines = []
    floor = next((one for record in (found.teacher.done if found.teacher else ()) if (one := record.measured(f"noise_flips:{task}"))), None)
    if floor is not None:
        items = int(floor.values[0])
        lines.append(
            f"{task}: noise floor: the teacher against itself ({floor.condition}) flips {floor.value * items:.0f} of {items} items."
        )
    for row in found.rows:
        for score in row.scores(task)[:1]:
            if score.cut_prompts:
                lines.append(f"{task}, {row.label}: {score.cut_prompts} requests were longer than the context and lost tokens on the left.")
            lines += [f"{task}, {row.label}: {note}." for note in score.notes]
    return lines


def tables(found: Group) -> list[Table]:
    """All tables of a group of records."""
    return [table for table in (quality(found), cost(found), controls(found), diagnostics(found)) if table is not None]


def markdown(records: Sequence[RunRecord]) -> str:
    """Return every table of these records as one Markdown page."""
    from tabulate import tabulate

    parts: list[str] = []
    for found in group(records):
        names = ", ".join(task.partition("@")[0] for task in found.shared["tasks"].split(", "))
        parts.append(f"## {names}: {found.shared['teacher']} to {found.shared.get('student', 'itself')}\n")
        for table in tables(found):
            alignment = [
                "left" if column in {"row", "against", "task", "verdict", "correct by", "picked"} else "right" for column in table.columns
            ]
            text = tabulate(table.rows, headers=table.columns, tablefmt="pipe", colalign=alignment, disable_numparse=True)
            parts.append(f"**{table.title}**\n\n{text}\n")
        parts.append("\n".join(f"- {line}" for line in notes(found)) + "\n")
    return "\n".join(parts)


def write_tables(records: Sequence[RunRecord], folder: Path) -> list[Path]:
    """Write `table.md` and one CSV per table; return what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "table.md"]
    written[0].write_text(markdown(records), encoding="utf-8", newline="\n")
    groups = group(records)
    for number, found in enumerate(groups, 1):
        for table in tables(found):
            path = folder / (f"{table.name}.csv" if len(groups) == 1 else f"{table.name}-{number}.csv")
            table.frame.to_csv(path, index=False, float_format="%.6g", lineterminator="\n")
            written.append(path)
    return written


def glossary() -> str:
    """Return the meaning of every column."""
    width = max(map(len, GLOSSARY))
    return "\n".join(f"{name:{width}}  {meaning}" for name, meaning in GLOSSARY.items())
