"""Selects which items of a task are scored, and numbers them in one order for every model."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.contract import Task
from harness.data.seeding import prepare_tasks, seeded_as_lm_eval
from harness.data.source import LocalOrHubData
from harness.data.subsets import Subset, document_digests, items_name


@dataclass(frozen=True)
class ItemChoice:
    """Which items of a task are scored: all or those of a subset, or a sample of `limit`."""

    limit: int | None = None
    subset: Subset | None = None


@dataclass(frozen=True)
class SelectedItems:
    """The tasks with their selected documents, and the number of each document.

    Documents are numbered through all tasks, the ones that were not selected included.
    """

    tasks: dict[str, Any]
    numbers: dict[str, list[int]]

    @property
    def count(self) -> int:
        """The number of items."""
        return sum(map(len, self.numbers.values()))


def select_items(
    built: Mapping[str, Any], limit: int | ItemChoice | None, *, name: str
) -> SelectedItems:
    """Select all processed documents of every task, those of a subset, or a sample of `limit`.

    The tasks of `built` are changed to have these documents only. lm-eval processes documents again
    each time it needs them; fixed once, an item stays the same from prompt to grade.
    """
    docs = {key: task.eval_docs for key, task in built.items()}
    several = len(built) > 1
    items = [
        (key, index, group_of(doc, key, several=several))
        for key in built
        for index, doc in enumerate(docs[key])
    ]
    choice = limit if isinstance(limit, ItemChoice) else ItemChoice(limit)
    groups = [group for _, _, group in items]
    selected: Sequence[int] = range(len(items))
    if choice.subset is not None:
        digests = document_digests(docs[key][index] for key, index, _ in items)
        selected = choice.subset.numbers(name, groups, digests)
    if choice.limit is not None and choice.limit < len(selected):
        sampled_groups = [groups[number] for number in selected]
        sample = stratified_sample(sampled_groups, choice.limit, name=name)
        selected = [selected[position] for position in sample]
    numbers: dict[str, list[int]] = {key: [] for key in built}
    indices: dict[str, list[int]] = {key: [] for key in built}
    for number in selected:
        key, index, _ = items[number]
        numbers[key].append(number)
        indices[key].append(index)
    nonempty = [key for key in built if indices[key]]
    for key in nonempty:
        _set_documents(built[key], docs[key], indices[key])
    return SelectedItems(
        {key: built[key] for key in nonempty}, {key: numbers[key] for key in nonempty}
    )


def _set_documents(task: Any, docs: Any, selected: Sequence[int]) -> None:
    """Make a task have the selected documents only.

    Few-shot examples are still drawn for the others too, so that a sample has the prompts of a
    full run.
    """
    if len(selected) < len(docs):
        _draw_shots_of_all(task, docs, selected)
        docs = (
            docs.select(selected)
            if hasattr(docs, "select")
            else [docs[index] for index in selected]
        )
    if task.has_test_docs():
        task.test_docs = lambda: docs
    else:
        task.validation_docs = lambda: docs


def _draw_shots_of_all(task: Any, docs: Any, selected: Sequence[int]) -> None:
    """Make a task draw the few-shot examples of unselected items too, and discard these.

    All items draw from one random stream, in order.
    """
    original = task.fewshot_context
    previous = [-1, *selected]
    skipped = iter(
        [range(before + 1, index) for before, index in zip(previous, selected, strict=False)]
    )
    # where examples come from the scored split, an item is never among its own examples
    same_split = task.fewshot_cfg.split == task.config.test_split

    def fewshot_context(doc: Any, num_fewshot: int, **settings: Any) -> Any:
        for index in next(skipped) if num_fewshot else ():
            task.sampler.sample(n=num_fewshot, eval_doc=docs[index] if same_split else None)
        return original(doc, num_fewshot=num_fewshot, **settings)

    task.fewshot_context = fewshot_context


def group_of(doc: Mapping[str, Any], task: str = "", *, several: bool = False) -> str:
    """Return the group of an item in breakdowns: its subject, its number of steps, or its task.

    A subject that is no plain value is ignored. The task counts where there are `several`.
    """
    value = next((doc[name] for name in ("subject", "steps") if name in doc), None)
    is_plain = isinstance(value, (str, int)) and not isinstance(value, bool)
    return str(value) if is_plain else task if several else ""


def stratified_sample(groups: Sequence[str], count: int, *, name: str) -> list[int]:
    """Draw `count` item numbers, spread over the groups as evenly as possible.

    `groups` holds the group of each item. The draw is seeded by `name`, the same for every model.
    """
    generator = random.Random(f"limit/{name}")
    members_of: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        members_of.setdefault(group, []).append(number)
    for members in members_of.values():
        generator.shuffle(members)
    numbers: list[int] = []
    while len(numbers) < min(count, len(groups)):
        one_of_each = [members.pop() for members in members_of.values() if members]
        numbers += one_of_each[: count - len(numbers)]
    return sorted(numbers)


def subset_items(subset: Subset, task: Task, source: LocalOrHubData) -> tuple[list[str], int]:
    """Return the digests of a task's items that a subset has, and how many items the task has.

    Raises `HarnessError` where a subset file lists items of other data.
    """
    with seeded_as_lm_eval():
        built = task.lm_eval_tasks(source)
        prepare_tasks(built.values())
        documents = [
            (group_of(doc, key, several=len(built) > 1), doc)
            for key, part in built.items()
            for doc in part.eval_docs
        ]
    digests = list(document_digests(doc for _, doc in documents))
    numbers = subset.numbers(items_name(task), [group for group, _ in documents], digests)
    return [digests[number] for number in numbers], len(documents)
