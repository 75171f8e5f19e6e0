"""One row per item: what a model answered, joined from lm-eval's samples.

Every figure is derived from these rows.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from harness.contract import Task
from harness.files.lines import read_signed_lines, signed_line
from harness.files.untrusted import Unreadable
from harness.files.writing import write_atomically
from harness.scoring.parts import json_value
from harness.scoring.sampling import group_of
from harness.statistics.figures import as_number

Samples = list[dict[str, Any]]  # lm-eval's samples of one item, one per filter


@dataclass(frozen=True, kw_only=True)
class ItemRow:
    """What one model answered to one item, and how the answer was graded."""

    task: str
    item: int
    group: str  # the group in breakdowns: a subject, a number of steps, or a task of a group
    doc_hash: str
    prompt_hash: str
    target_hash: str
    gold: str
    text: str  # the written answer, or the chosen letter
    extracted: dict[str, str | None]
    correct: dict[str, bool]  # by extractor: whether the metric gives full marks
    tokens: int  # written, the last one included; 0 for a choice
    stop: str  # eos, stop, length, or "" for a choice
    log_probabilities: tuple[float, ...] = ()  # of the choices, in their order; of a document, one
    # for teacher-forced comparisons; of a choice only the part after its last blank line
    prompt: str = ""
    # of a document: the number of words, or bytes, that its figure is per; 1 for the end of a text
    words: float = 0.0
    position: int | None = None  # of the chosen choice
    # by extractor: numbers other than 1 for a hit and 0 for a miss
    values: dict[str, float] = field(default_factory=dict)
    # another choice has the same text as the chosen one, so the text does not identify it
    twins: bool = False
    chance: float = 0.0  # the probability of a right guess
    # by extractor: what the metric aggregates where it gives the item no number, as JSON
    parts: dict[str, Any] = field(default_factory=dict)

    def value(self, extractor: str) -> float | None:
        """Return the number that a metric gives the item, None where it gives none."""
        if extractor in self.values:
            return self.values[extractor]
        return float(self.correct[extractor]) if extractor in self.correct else None

    @property
    def answer(self) -> object:
        """A value that is equal for two rows where their answers are the same.

        It is the text, unless the text does not show which choice it was or how it was graded.
        """
        if self.position is None or (
            set(self.correct) == {"acc"} and not self.twins and not self.values
        ):
            return self.text or self.log_probabilities
        grades = [sorted(self.correct.items()), sorted(self.values.items())]
        return [self.position, *grades] if self.correct else [self.position, self.log_probabilities]


def write_rows(path: Path, rows: Iterable[ItemRow]) -> None:
    """Write item rows as JSON lines, each with its digest."""
    write_atomically(path, "".join(signed_line(asdict(row)) for row in rows))


def read_rows(path: Path) -> list[ItemRow]:
    """Read item rows that `write_rows` wrote.

    Raises `Unreadable` where a line is cut off, edited, or from another version.
    """
    values, defects = read_signed_lines(path, complete=True)
    if not defects:
        try:
            return [
                ItemRow(**{**value, "log_probabilities": tuple(value["log_probabilities"])})
                for value in values
            ]
        except (LookupError, TypeError) as problem:
            defects = [f"a line of another shape ({problem})"]
    raise Unreadable(f"{path}: {defects[0]}")


@dataclass(frozen=True)
class ScoredTask:
    """One of lm-eval's tasks after its scoring: its samples, and the metric that judges it."""

    task: Task
    name: str
    built: Any  # lm-eval's task object
    samples: Sequence[dict[str, Any]]
    numbers: Sequence[int]  # of the documents, counted through all tasks of a group
    metric: str
    several: bool  # one of several tasks of a group

    def lower_is_better(self, metric: str) -> bool:
        """Tell a metric's direction, from the task or from lm-eval's registry."""
        return self.built.higher_is_better().get(metric) is False

    def rows(self, model: Any) -> list[ItemRow]:
        """Join the samples (one per item and filter) into one row per item."""
        samples_of: dict[int, Samples] = {}
        for sample in self.samples:
            samples_of.setdefault(int(sample["doc_id"]), []).append(sample)
        builders = {
            "choose": _choice_row,
            "continue": _continuation_row,
            "generate": _generation_row,
            "perplexity": _perplexity_row,
        }
        build: Callable[[ScoredTask, int, Samples, Any], ItemRow] = builders[self.task.kind]
        return [build(self, item, samples_of[item], model) for item in sorted(samples_of)]

    def common_fields(self, item: int, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of an item's row that do not depend on the kind of the task."""
        return {
            "task": self.task.name,
            "item": self.numbers[item],
            "group": group_of(sample["doc"], self.name, several=self.several),
            "doc_hash": sample["doc_hash"],
            "prompt_hash": sample["prompt_hash"],
            "target_hash": sample["target_hash"],
        }


class Grades(NamedTuple):
    """How an answer was graded, by extractor."""

    correct: dict[str, bool]  # whether it gets full marks
    values: dict[str, float]  # numbers other than 1 for a hit and 0 for a miss


def _grades(
    scored: ScoredTask, results: Mapping[str, object], metrics: Mapping[str, str]
) -> Grades:
    """Return the grades of an answer; `metrics` names each extractor's metric in `results`."""
    grades = Grades({}, {})
    for extractor, metric in metrics.items():
        value = as_number(results.get(extractor))
        if value is None:
            continue
        lower = scored.lower_is_better(metric)
        grades.correct[extractor] = value <= 0 if lower else value >= 1
        if lower or value not in (0.0, 1.0):
            grades.values[extractor] = value
    return grades


def _unnumbered_parts(results: Mapping[str, object]) -> dict[str, Any]:
    """Return, by extractor, what a metric aggregates where that is no number.

    For example a pair of labels, or references and a text.
    """
    parts = {name: json_value(value) for name, value in results.items() if as_number(value) is None}
    return {name: part for name, part in parts.items() if part is not None}


def _choice_row(scored: ScoredTask, item: int, samples: Samples, model: Any) -> ItemRow:
    """Return the row of a multiple-choice item: the likeliest choice is the answer.

    Its metrics stand in for extractors, the task's own metric first. `model` is not used.
    """
    sample, task = samples[0], scored.built
    options = [str(option) for option in task.doc_to_choice(sample["doc"])]
    # acc_mutual_info adds the choices without a question after these
    responses = sample["filtered_resps"][: len(options)]
    log_probabilities = tuple(float(response[0]) for response in responses)
    # in a tie the lower index wins
    chosen = max(range(len(log_probabilities)), key=lambda i: (log_probabilities[i], -i))
    texts = [str(request[1]).strip() for request in sample["arguments"][: len(options)]]
    if len(set(texts)) < len(texts):  # as in WinoGrande, where the choices are in the prompts
        texts = [option.strip() for option in options]
    golds = _gold_positions(task, sample, options)
    metrics = sorted(sample["metrics"], key=lambda name: name != scored.metric)
    correct, values = _grades(
        scored, {name: sample[name] for name in metrics}, {name: name for name in metrics}
    )
    return ItemRow(
        **scored.common_fields(item, sample),
        gold="; ".join(texts[position] for position in golds) or str(sample["target"]),
        text=texts[chosen],
        extracted=dict.fromkeys(correct, texts[chosen]),
        correct=correct,
        tokens=0,
        stop="",
        log_probabilities=log_probabilities,
        position=chosen,
        # the item itself, without the few-shot examples: what follows the last blank line
        prompt=str(sample["arguments"][0][0]).rpartition("\n\n")[2],
        values=values,
        twins=texts.count(texts[chosen]) > 1,
        chance=max(1, len(golds)) / len(options),
        parts=_unnumbered_parts({name: sample[name] for name in metrics[:1]}),
    )


def _gold_positions(task: Any, sample: Mapping[str, Any], options: Sequence[str]) -> list[int]:
    """Return the positions of the right choices, read from the target as lm-eval reads it.

    Empty where the target is not among the choices.
    """
    target = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    targets = target if isinstance(target, (list, tuple)) else [target]
    positions = [_option_position(target, options) for target in targets]
    return sorted({position for position in positions if 0 <= position < len(options)})


def _option_position(target: Any, options: Sequence[str]) -> int:
    """Return a target as a position: a number, the text of an option, or digits; -1 for others."""
    if not isinstance(target, str):
        return int(target)
    if target in options:
        return options.index(target)
    return int(target) if target.isdecimal() else -1


def _generation_row(scored: ScoredTask, item: int, samples: Samples, model: Any) -> ItemRow:
    first = samples[0]
    answer = model.generations[scored.name, item]
    target = first["target"]
    gold = "; ".join(map(str, target)) if isinstance(target, (list, tuple)) else str(target)
    results: dict[str, object] = {
        sample["filter"]: sample[scored.metric] for sample in samples if scored.metric in sample
    }
    parts = _unnumbered_parts(results)
    extracted = {
        sample["filter"]: _extracted_answer(sample["filtered_resps"]) for sample in samples
    }
    # our tasks have extractors beside lm-eval's; where lm-eval has a verdict, it counts
    if not getattr(scored.task, "judged_upstream", False):
        gold = gold.rpartition("#### ")[2].strip()
        grades = {grade.extractor: grade for grade in scored.task.grade(gold, answer.text)}
        results = {
            extractor: results.get(extractor, float(grade.correct))
            for extractor, grade in grades.items()
        }
        extracted = {extractor: grade.extracted for extractor, grade in grades.items()}
    correct, values = _grades(scored, results, dict.fromkeys(results, scored.metric))
    return ItemRow(
        **scored.common_fields(item, first),
        gold=gold,
        text=answer.text,
        extracted=extracted,
        correct=correct,
        tokens=answer.tokens,
        stop=answer.stop,
        prompt=str(first["arguments"][0][0]),
        values=values,
        parts=parts,
    )


def _continuation_row(scored: ScoredTask, item: int, samples: Samples, model: Any) -> ItemRow:
    """Return the row of a text whose end is given: how likely it is, and whether it is greedy's.

    `acc` is 1 where greedy decoding writes the given end; `perplexity` has the log-likelihood of
    the end, in nats, of which lm-eval takes exp(-mean).
    """
    sample = samples[0]
    log_probability, is_greedy = sample["filtered_resps"][0]
    numbers = {
        name: value for name in sample["metrics"] if (value := as_number(sample[name])) is not None
    }
    hits = {
        name: value >= 1
        for name, value in numbers.items()
        if name != "perplexity" and not scored.lower_is_better(name)
    }
    return ItemRow(
        **scored.common_fields(item, sample),
        gold=str(sample["target"]),
        # what greedy decoding writes in place of another end is not known
        text=str(sample["target"]) if is_greedy else "",
        extracted={},
        correct=hits,
        tokens=0,
        stop="",
        log_probabilities=(float(log_probability),),
        words=1.0,  # the perplexity is by item
        prompt=str(sample["arguments"][0][0]).rpartition("\n\n")[2],
        values={
            name: value
            for name, value in numbers.items()
            if name not in hits or value not in (0, 1)
        },
        parts=_unnumbered_parts({name: sample[name] for name in sample["metrics"]}),
    )


def _extracted_answer(responses: object) -> str | None:
    """Return what a filter extracted from an answer; None for nothing, or lm-eval's "[invalid]"."""
    value = responses[0] if isinstance(responses, (list, tuple)) and responses else responses
    while isinstance(value, (list, tuple)):
        value = value[0] if value else ""
    return None if value is None or str(value).strip() in {"", "[invalid]"} else str(value)


def _perplexity_row(scored: ScoredTask, item: int, samples: Samples, model: Any) -> ItemRow:
    sample = samples[0]
    result = sample.get(scored.metric)
    if isinstance(result, (list, tuple)) and len(result) == 2:
        log_probability, size = result
    else:
        log_probability, size = sample["filtered_resps"][0], 0.0
    return ItemRow(
        **scored.common_fields(item, sample),
        gold="",
        text="",
        extracted={},
        correct={},
        tokens=0,
        stop="",
        log_probabilities=(float(log_probability),),
        words=float(size),
    )
