"""Which of a teacher's answers are trained: those that ended, are right, and are distinct."""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from harness.contract import Example, Job, Progress, Task
from harness.data.contamination import overlapping_prompts
from harness.errors import CellFailed
from harness.scoring.backend import Generation

_COUNTS = (
    "traces_written",
    "traces_kept",
    "kept_in_another_form",
    "dropped_wrong",
    "dropped_unreadable",
    "dropped_in_another_form",
    "dropped_unfinished",
    "dropped_short",
    "dropped_repeats",
    "dropped_contaminated",
    "problems_without_trace",
)
_CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's marks, which a teacher imitates from its shots


class FilteredTraces(NamedTuple):
    """The answers that are trained, and how many of all were dropped for which reason."""

    kept: list[tuple[Example, str]]  # (problem, answer)
    counts: dict[str, Any]  # for the record


def filter_traces(
    examples: Sequence[Example],
    texts: Sequence[Sequence[Generation]],
    job: Job,
    *,
    shortest: int = 0,
    reject_wrong: bool = True,
) -> FilteredTraces:
    """Keep the distinct answers that ended and are right, with their problems.

    Right means: the task's primary extractor finds the gold answer, or it finds none and the most
    lenient one does (see `_graded`). Problems that are also in an evaluation split are dropped with
    all their answers, and so are answers of fewer than `shortest` tokens. With `reject_wrong=False`
    wrong answers stay: as many as the filter would have kept are sampled from all that ended. A
    task without any trace is named in the counts. Raises `CellFailed` where no task has one.
    """
    traces = _SortedTraces(
        job,
        shortest,
        contaminated_prompts=overlapping_prompts(examples, job.tasks, job.source),
        by_task={example.task: dict.fromkeys(_COUNTS, 0) for example in examples},
    )
    for example, answers in zip(examples, texts, strict=True):
        traces.add(example, answers)
    total = {name: sum(counts[name] for counts in traces.by_task.values()) for name in _COUNTS}
    longest = max(answer.tokens for answers in texts for answer in answers)
    if not traces.right:
        raise CellFailed(f"no trace survived: {_explain_losses(total, longest)}")
    kept = traces.right
    if not reject_wrong:
        kept = random.Random(job.seed).sample(traces.ended, len(traces.right))
    counts: dict[str, Any] = {
        **total,
        "traces_kept": len(kept),
        "keep_rate": round(len(traces.right) / total["traces_written"], 4),
    }
    tasks_kept = {example.task for example, _ in kept}
    without_trace = {
        task: _explain_losses(task_counts, longest)
        for task, task_counts in traces.by_task.items()
        if task not in tasks_kept
    }
    _report_tasks_without_trace(job, without_trace)
    if without_trace:
        counts["tasks_without_trace"] = without_trace
    if not reject_wrong:
        counts["wrong_among_kept"] = sum(trace not in traces.right for trace in kept)
    return FilteredTraces(kept, counts)


class _Grade(NamedTuple):
    outcome: str  # the name of the count that it adds to
    text: str  # the answer as it is trained


@dataclass
class _SortedTraces:
    """Answers, counted by task and by what became of each."""

    job: Job
    shortest: int
    contaminated_prompts: set[str]  # of problems that are also in an evaluation split
    by_task: dict[str, dict[str, int]]
    ended: list[tuple[Example, str]] = field(default_factory=list)  # distinct ones, right or wrong
    right: list[tuple[Example, str]] = field(default_factory=list)

    def add(self, example: Example, answers: Sequence[Generation]) -> None:
        """Sort the answers to one problem."""
        counts = self.by_task[example.task]
        distinct: set[str] = set()
        is_solved = False
        for answer in answers:
            counts["traces_written"] += 1
            text = _CALCULATOR.sub("", answer.text)
            grade = self._grade(example, text)
            drop_reason = self._drop_reason(example, answer, grade.text in distinct)
            counts[drop_reason or grade.outcome] += 1
            if drop_reason:
                continue
            distinct.add(grade.text)
            self.ended.append((example, grade.text))
            if not grade.outcome.startswith("dropped"):
                self.right.append((example, grade.text))
                is_solved = True
        counts["problems_without_trace"] += not is_solved

    def _grade(self, example: Example, text: str) -> _Grade:
        """Grade an answer; where nobody has said what is right, every answer counts as right."""
        task = self.job.tasks[example.task]
        if getattr(task, "has_grader", True):
            return _graded(task, example, text)
        return _Grade("traces_kept", text)

    def _drop_reason(self, example: Example, answer: Generation, is_repeat: bool) -> str:
        """Return why an answer is dropped whatever it says, as a name of the counts; "" if not."""
        if example.prompt in self.contaminated_prompts:
            return "dropped_contaminated"
        if answer.stop != "eos":
            return "dropped_unfinished"
        if answer.tokens < self.shortest:
            return "dropped_short"
        return "dropped_repeats" if is_repeat else ""


def _graded(task: Task, example: Example, text: str) -> _Grade:
    """Grade an answer.

    Where the task's primary extractor finds nothing, its most lenient one decides, and a right
    answer gets the ending that the task's own answers have.
    """
    grades = task.grade(example.gold, text)
    primary, lenient = grades[0], grades[-1]
    if primary.correct:
        return _Grade("traces_kept", text)
    if primary.extracted is None and lenient.correct:
        if example.ending:
            return _Grade("kept_in_another_form", _with_task_ending(text, example))
        return _Grade("dropped_in_another_form", text)
    if all(grade.extracted is None for grade in grades):
        return _Grade("dropped_unreadable", text)
    return _Grade("dropped_wrong", text)


def _with_task_ending(text: str, example: Example) -> str:
    """Return an answer that ends as the task's own answers do.

    An answer that is nothing but the ending becomes the task's own answer without steps.
    """
    if re.sub(r"\W", "", text) == re.sub(r"\W", "", example.ending):
        return example.answer
    has_ending = f" {' '.join(text.split())}".endswith(f" {example.ending}")
    return text if has_ending else f"{text.rstrip()}\n{example.ending}"


def _explain_losses(counts: Mapping[str, int], longest: int) -> str:
    """Say why no answer is trained, and what to do; the longest answer has `longest` tokens."""
    most_were_cut = 2 * counts["dropped_unfinished"] > counts["traces_written"]
    remedy = (
        f"most did not end: --set cot.longest={2 * longest}"
        if most_were_cut
        else "use a teacher that solves this task, or --methods sft"
    )
    return (
        f"of {counts['traces_written']} answers by the teacher {counts['dropped_wrong']} were "
        f"wrong, {counts['dropped_unreadable']} had no "
        f"readable answer, {counts['dropped_in_another_form']} were right in another form, "
        f"{counts['dropped_unfinished']} did not end, "
        f"{counts['dropped_short']} were too short and {counts['dropped_contaminated']} belong to "
        f"evaluation items; {remedy}"
    )


def _report_tasks_without_trace(job: Job, without_trace: Mapping[str, str]) -> None:
    for task, reason in without_trace.items():
        detail = f"no trace of {task} survived, so it is not trained: {reason}"
        job.progress(Progress(stage="traces", done=1, total=1, detail=detail))
