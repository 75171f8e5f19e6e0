"""One row an item: what a model made of it, joined from lm-eval's samples. Rows are the truth from
which every figure is derived.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness.contract import Task
from harness.files.lines import read_signed_lines, signed_line
from harness.files.untrusted import Unreadable
from harness.files.writing import write_atomically
from harness.scoring.parts import plain
from harness.scoring.sampling import group_of
from harness.statistics.figures import as_number

Samples = list[dict[str, Any]]  # of one item, one a filter


@dataclass(frozen=True, kw_only=True)
class ItemRow:
    """What one model made of one item: the truth from which every figure is derived."""

    task: str
    item: int
    group: str  # subject, number of steps, or task of a group: what a breakdown is made by
    doc_hash: str
    prompt_hash: str
    target_hash: str
    gold: str
    text: str  # what was written, or the chosen letter
    extracted: dict[str, str | None]
    correct: dict[str, bool]  # whether a metric gives full marks
    tokens: int  # written, the ending one included; 0 for a choice
    stop: str  # eos, stop, length, or "" for a choice
    log_probabilities: tuple[float, ...] = ()  # of the choices, in their order; of a document, one
    # what was shown, for teacher-forced comparisons; of a choice its last part, without the shots
    prompt: str = ""
    words: float = 0.0  # of a document: the words, or bytes, that its figure is for each of
    position: int | None = None  # of the chosen choice
    # where a metric gives an item another number than 1 for a hit and 0 for a miss
    values: dict[str, float] = field(default_factory=dict)
    # another choice reads like the chosen one: its text does not say which it was
    twins: bool = False
    chance: float = 0.0  # of guessing it
    # by extractor: what a metric that gives it no number aggregates of it, as JSON
    parts: dict[str, Any] = field(default_factory=dict)

    def value(self, extractor: str) -> float | None:
        """Return what a metric gives the item, None where it gives it nothing."""
        if extractor in self.values:
            return self.values[extractor]
        return float(self.correct[extractor]) if extractor in self.correct else None

    @property
    def answer(self) -> object:
        """Return what must be equal where an answer is the same: its text, unless that hides which
        choice it was or how it was judged.
        """
        if self.position is None or (
            set(self.correct) == {"acc"} and not self.twins and not self.values
        ):
            return self.text or self.log_probabilities
        judged = [sorted(self.correct.items()), sorted(self.values.items())]
        return [self.position, *judged] if self.correct else [self.position, self.log_probabilities]


def write_rows(path: Path, rows: Iterable[ItemRow]) -> None:
    """Write item rows as JSON lines, each with its digest."""
    write_atomically(path, "".join(signed_line(asdict(row)) for row in rows))


def read_rows(path: Path) -> list[ItemRow]:
    """Read what `write_rows` wrote. Raises `Unreadable` where a line is torn, edited, or of another
    version.
    """
    values, wrong = read_signed_lines(path, complete=True)
    if not wrong:
        try:
            return [
                ItemRow(**{**one, "log_probabilities": tuple(one["log_probabilities"])})
                for one in values
            ]
        except (LookupError, TypeError) as problem:
            wrong = [f"a line of another shape ({problem})"]
    raise Unreadable(f"{path}: {wrong[0]}")


@dataclass(frozen=True)
class Scored:
    """One of lm-eval's tasks as it was scored: its samples, each document's number, and the metric
    that it is judged by.
    """

    task: Task
    name: str
    built: Any
    samples: Sequence[dict[str, Any]]
    numbers: Sequence[int]
    metric: str
    several: bool  # one of several tasks of a group

    def lower_is_better(self, metric: str) -> bool:
        """Tell a metric's direction, as the task or lm-eval's registry states it."""
        return self.built.higher_is_better().get(metric) is False

    def rows(self, model: Any) -> list[ItemRow]:
        """Join the samples (one per item and filter) into one row per item."""
        by_item: dict[int, Samples] = {}
        for sample in self.samples:
            by_item.setdefault(int(sample["doc_id"]), []).append(sample)
        makers = {"choose": _chosen, "generate": _written, "perplexity": _read}
        make: Callable[[Scored, int, Samples, Any], ItemRow] = makers[self.task.kind]
        return [make(self, item, by_item[item], model) for item in sorted(by_item)]

    def base(self, item: int, first: Mapping[str, Any]) -> dict[str, Any]:
        """Return what every row says of its item."""
        return {
            "task": self.task.name,
            "item": self.numbers[item],
            "group": group_of(first["doc"], self.name, several=self.several),
            "doc_hash": first["doc_hash"],
            "prompt_hash": first["prompt_hash"],
            "target_hash": first["target_hash"],
        }


def _judged(
    one: Scored, given: Mapping[str, object], metrics: Mapping[str, str]
) -> tuple[dict[str, bool], dict[str, float]]:
    """Return (full marks, other numbers) by extractor; `metrics` names each extractor's metric
    among those `given`.
    """
    correct: dict[str, bool] = {}
    values: dict[str, float] = {}
    for extractor, metric in metrics.items():
        value = as_number(given.get(extractor))
        if value is None:
            continue
        lower = one.lower_is_better(metric)
        correct[extractor] = value <= 0 if lower else value >= 1
        if lower or value not in (0.0, 1.0):
            values[extractor] = value
    return correct, values


def _parts(given: Mapping[str, object]) -> dict[str, Any]:
    """Return what a metric hands to its aggregation where that is no number (a pair of labels,
    references and a text), by extractor.
    """
    found = {name: plain(value) for name, value in given.items() if as_number(value) is None}
    return {name: part for name, part in found.items() if part is not None}


def _chosen(one: Scored, item: int, samples: Samples, model: Any) -> ItemRow:
    first, task = samples[0], one.built
    options = [str(option) for option in task.doc_to_choice(first["doc"])]
    # what stands behind them are the choices without a question (acc_mutual_info)
    pairs = first["filtered_resps"][: len(options)]
    log_probabilities = tuple(float(pair[0]) for pair in pairs)
    # a true tie: the lower index
    chosen = max(range(len(log_probabilities)), key=lambda i: (log_probabilities[i], -i))
    shown = [str(request[1]).strip() for request in first["arguments"][: len(options)]]
    if len(set(shown)) < len(shown):  # WinoGrande's form: the choices stand in the prompts
        shown = [option.strip() for option in options]
    golds = _golds(task, first, options)
    names = sorted(first["metrics"], key=lambda name: name != one.metric)
    correct, values = _judged(
        one, {name: first[name] for name in names}, {name: name for name in names}
    )
    return ItemRow(
        **one.base(item, first),
        gold="; ".join(shown[at] for at in golds) or str(first["target"]),
        text=shown[chosen],
        extracted=dict.fromkeys(correct, shown[chosen]),
        correct=correct,
        tokens=0,
        stop="",
        log_probabilities=log_probabilities,
        position=chosen,
        prompt=str(first["arguments"][0][0]).rpartition("\n\n")[2],
        values=values,
        twins=shown.count(shown[chosen]) > 1,
        chance=max(1, len(golds)) / len(options),
        parts=_parts({name: first[name] for name in names[:1]}),
    )


def _golds(task: Any, sample: Mapping[str, Any], options: Sequence[str]) -> list[int]:
    """Return the positions of the right choices, as lm-eval reads them; none where the target is
    not among them.
    """
    told = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    listed = told if isinstance(told, (list, tuple)) else [told]
    found = [
        int(one)
        if not isinstance(one, str)
        else options.index(one)
        if one in options
        else int(one)
        if one.isdecimal()
        else -1
        for one in listed
    ]
    return sorted({at for at in found if 0 <= at < len(options)})


def _written(one: Scored, item: int, samples: Samples, model: Any) -> ItemRow:
    first = samples[0]
    written = model.generations[one.name, item]
    target = first["target"]
    gold = "; ".join(map(str, target)) if isinstance(target, (list, tuple)) else str(target)
    given: dict[str, object] = {
        sample["filter"]: sample[one.metric] for sample in samples if one.metric in sample
    }
    parts = _parts(given)
    extracted = {sample["filter"]: _extracted(sample["filtered_resps"]) for sample in samples}
    # ours has extractors beside lm-eval's, whose verdict stands where it has one
    if not getattr(one.task, "judged_upstream", False):
        gold = gold.rpartition("#### ")[2].strip()
        grades = {grade.extractor: grade for grade in one.task.grade(gold, written.text)}
        given = {
            extractor: given.get(extractor, float(grade.correct))
            for extractor, grade in grades.items()
        }
        extracted = {extractor: grade.extracted for extractor, grade in grades.items()}
    correct, values = _judged(one, given, dict.fromkeys(given, one.metric))
    return ItemRow(
        **one.base(item, first),
        gold=gold,
        text=written.text,
        extracted=extracted,
        correct=correct,
        tokens=written.tokens,
        stop=written.stop,
        prompt=str(first["arguments"][0][0]),
        values=values,
        parts=parts,
    )


def _extracted(responses: object) -> str | None:
    """Return what a filter left of an answer, None where it found nothing ("[invalid]" is lm-eval's
    word for that).
    """
    found = responses[0] if isinstance(responses, (list, tuple)) and responses else responses
    while isinstance(found, (list, tuple)):
        found = found[0] if found else ""
    return None if found is None or str(found).strip() in {"", "[invalid]"} else str(found)


def _read(one: Scored, item: int, samples: Samples, model: Any) -> ItemRow:
    first = samples[0]
    found = first.get(one.metric)
    pair = (
        found
        if isinstance(found, (list, tuple)) and len(found) == 2
        else (first["filtered_resps"][0], 0.0)
    )
    return ItemRow(
        **one.base(item, first),
        gold="",
        text="",
        extracted={},
        correct={},
        tokens=0,
        stop="",
        log_probabilities=(float(pair[0]),),
        words=float(pair[1]),
    )
