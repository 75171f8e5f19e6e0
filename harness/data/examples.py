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
    """Return `rows` items of a split, equal parts of every task, rendered for the student.

    They are interleaved, in a fixed order. Tasks that measure perplexity have no training items.
    Raises `NoSplit` where no task can be trained on.
    """
    return [source.render(example) for example in plain_examples(tasks, split, source, rows=rows)]


def plain_examples(
    tasks: Mapping[str, Task], split: Split, source: DataSource, *, rows: int
) -> list[Example]:
    """Return the items of `examples_of` as their tasks have them, not rendered yet."""
    trainable = [task for task in tasks.values() if task.kind != "perplexity"]
    if not trainable:
        raise NoSplit(
            f"nothing to train on: {', '.join(tasks)} measures perplexity only; add a suite such "
            "as math"
        )
    trainable = _trainable_tasks(trainable, split, source)
    shares = shares_of(rows, [float(getattr(task, "weight", 1.0)) for task in trainable])
    parts = [
        list(islice(task.examples(split, source), share))
        for task, share in zip(trainable, shares, strict=True)
    ]
    examples = list(interleaved(parts))
    if not examples:
        raise HarnessError(f"the {split} split of {', '.join(tasks)} holds no item")
    return examples


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


def _trainable_tasks(tasks: list[Task], split: Split, source: DataSource) -> list[Task]:
    """Return the tasks that have a training split; raises `NoSplit` where none has one.

    Validation items too come from these tasks alone. Where no task has a training split, validation
    items come from all of them.
    """
    if split not in ("train", "validation"):
        return tasks
    reasons = {task.name: _missing_split(task, "train", source) for task in tasks}
    with_train_split = [task for task in tasks if not reasons[task.name]]
    if not with_train_split and split == "train":
        raise NoSplit(next(iter(reasons.values())))
    return with_train_split or tasks


def _missing_split(task: Task, split: Split, source: DataSource) -> str:
    """Return why a task has no items of a split, "" where it has some."""
    try:
        next(iter(task.examples(split, source)), None)
    except NoSplit as problem:
        return str(problem)
    return ""


def untrained_tasks(tasks: Mapping[str, Task], source: DataSource) -> dict[str, str]:
    """Return the tasks without training items, and why; not those that measure perplexity."""
    return {
        name: reason
        for name, task in tasks.items()
        if task.kind != "perplexity" and (reason := _missing_split(task, "train", source))
    }


def interleaved(parts: Sequence[Sequence[Any]]) -> Iterator[Any]:
    """Yield the first item of every part, then the second of every part, and so on."""
    for index in range(max(map(len, parts), default=0)):
        yield from (part[index] for part in parts if index < len(part))


def training_examples(tasks: Mapping[str, Task], source: DataSource, *, rows: int) -> list[Example]:
    """Return the training items; raises `HarnessError` where one is an evaluation item."""
    examples = plain_examples(tasks, "train", source, rows=rows)
    prompts = {identity_of(example) for example in examples}
    for name, task in tasks.items():
        shared = sorted(prompts & held_out_prompts(task, source))
        if shared:
            raise HarnessError(
                f"{len(shared)} evaluation items of {name} stand in the training data, for example "
                f"{shared[0][:80]!r}"
            )
    return [source.render(example) for example in examples]


def identity_of(example: Example) -> str:
    """Return the text by which two examples are one: the prompt, or the text that has none."""
    return example.prompt or example.completion


def held_out_prompts(task: Task, source: DataSource) -> set[str]:
    """Return the prompts of a task's validation and test items, of the splits that it has."""
    prompts: set[str] = set()
    splits: tuple[Split, ...] = () if task.kind == "perplexity" else ("validation", "test")
    for split in splits:
        try:
            prompts.update(map(identity_of, task.examples(split, source)))
        except NoSplit:
            continue
    return prompts


def examples_digest(examples: Iterable[Example]) -> str:
    """Return the content digest of training items, in order."""
    return digest_of(
        [(example.task, example.prompt, example.completion, example.gold) for example in examples]
    )
