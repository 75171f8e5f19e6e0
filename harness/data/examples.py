"""Training items of tasks: equal parts of each task, never an evaluation item."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from harness.contract import DataSource, Example, Split, Task
from harness.data.source import NoSplit
from harness.errors import HarnessError
from harness.files.digests import digest_of


def examples_of(
    tasks: Mapping[str, Task], split: Split, source: DataSource, *, rows: int
) -> list[Example]:
    """Take `rows` items of a split, in equal parts from every task, interleaved, in fixed order,
    rendered for the model.

    Tasks that measure perplexity have no training form and take no part.
    """
    return [source.render(example) for example in _plain_examples(tasks, split, source, rows=rows)]


def _plain_examples(
    tasks: Mapping[str, Task], split: Split, source: DataSource, *, rows: int
) -> list[Example]:
    asked = [task for task in tasks.values() if task.kind != "perplexity"]
    if not asked:
        raise NoSplit(
            f"nothing to train on: {', '.join(tasks)} measures perplexity only; add a suite such "
            "as math"
        )
    asked = _trainable_tasks(asked, split, source)
    shares = shares_of(rows, [float(getattr(task, "weight", 1.0)) for task in asked])
    taken = list(
        interleaved(
            [
                list(islice(task.examples(split, source), share))
                for task, share in zip(asked, shares, strict=True)
            ]
        )
    )
    if not taken:
        raise HarnessError(f"the {split} split of {', '.join(tasks)} holds no item")
    return taken


def shares_of(rows: int, weights: Sequence[float]) -> list[int]:
    """Divide rows by weights: whole numbers that sum to `rows`, each within one of its exact share.

    What is left over goes to the largest remainders, of equal ones to the first.
    """
    exact = [rows * weight / sum(weights) for weight in weights]
    shares = [math.floor(share + 1e-9) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda index: shares[index] - exact[index])
    for index in by_remainder[: rows - sum(shares)]:
        shares[index] += 1
    return shares


def _trainable_tasks(asked: list[Task], split: Split, source: DataSource) -> list[Task]:
    """Return the tasks that take part: those with a train split, of which validation is held out
    too; raises `NoSplit` where none has one.

    Where no task can be trained on, the validation items of all of them are what there is.
    """
    reasons = {task.name: _missing_split(task, "train", source) for task in asked}
    able = [task for task in asked if not reasons[task.name]]
    if able or split not in ("train", "validation"):
        return able if split in ("train", "validation") else asked
    if split == "train":
        raise NoSplit(next(iter(reasons.values())))
    return asked


def _missing_split(task: Task, split: Split, source: DataSource) -> str:
    """Say why a task has no items of a split, "" where it has."""
    try:
        next(iter(task.examples(split, source)), None)
    except NoSplit as problem:
        return str(problem)
    return ""


def untrained_tasks(tasks: Mapping[str, Task], source: DataSource) -> dict[str, str]:
    """Return the tasks that no training row is of, though others give some, and why; those that
    only measure a perplexity left out.
    """
    return {
        name: why
        for name, task in tasks.items()
        if task.kind != "perplexity" and (why := _missing_split(task, "train", source))
    }


def interleaved(parts: Sequence[Sequence[Any]]) -> Iterator[Any]:
    """Yield the first of every part, then the second of every part, and so on; short parts end
    early.
    """
    for index in range(max(map(len, parts), default=0)):
        yield from (part[index] for part in parts if index < len(part))


def training_examples(tasks: Mapping[str, Task], source: DataSource, *, rows: int) -> list[Example]:
    """Return the training items, refused if one of them is an evaluation item of the same tasks."""
    taken = _plain_examples(tasks, "train", source, rows=rows)
    prompts = {_identity(example) for example in taken}
    for name, task in tasks.items():
        shared = sorted(prompts & held_out_prompts(task, source))
        if shared:
            raise HarnessError(
                f"{len(shared)} evaluation items of {name} stand in the training data, for example "
                f"{shared[0][:80]!r}"
            )
    return [source.render(example) for example in taken]


def _identity(example: Example) -> str:
    """Return the text by which two examples are one: the prompt, or the text that has none."""
    return example.prompt or example.completion


def held_out_prompts(task: Task, source: DataSource) -> set[str]:
    """Return the prompts of a task's validation and test items, of those splits that it has."""
    prompts: set[str] = set()
    splits: tuple[Split, ...] = () if task.kind == "perplexity" else ("validation", "test")
    for split in splits:
        try:
            prompts.update(map(_identity, task.examples(split, source)))
        except NoSplit:
            continue
    return prompts


def examples_digest(examples: Iterable[Example]) -> str:
    """Return the content digest of training items, in order."""
    return digest_of(
        [(example.task, example.prompt, example.completion, example.gold) for example in examples]
    )
