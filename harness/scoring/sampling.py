"""Selects which items of a task are scored, and numbers them in one order for every model."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


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


def select_items(built: Mapping[str, Any], limit: int | None, *, name: str) -> SelectedItems:
    """Select all processed documents of every task, or a seeded sample of `limit` of them.

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
    if limit is None or limit >= len(items):
        selected: Sequence[int] = range(len(items))
    else:
        selected = stratified_sample([group for _, _, group in items], limit, name=name)
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
