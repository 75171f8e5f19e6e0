"""Which items of a task are scored: processed documents, numbered in one order for every model."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Picked:
    """The tasks with the documents that are scored, and each document's number, counted through all
    tasks.
    """

    tasks: dict[str, Any]
    numbers: dict[str, list[int]]

    @property
    def count(self) -> int:
        """How many items there are."""
        return sum(map(len, self.numbers.values()))


def pick(built: Mapping[str, Any], limit: int | None, *, name: str) -> Picked:
    """Fix every task's documents as its `process_docs` leaves them, or a seeded sample of `limit`
    of them.

    lm-eval processes documents anew whenever it is asked for them: fixed here, an item is the same
    one from prompt to grade.
    """
    docs = {key: one.eval_docs for key, one in built.items()}
    several = len(built) > 1
    owners = [
        (key, index, group_of(doc, key, several=several))
        for key in built
        for index, doc in enumerate(docs[key])
    ]
    whole = limit is None or limit >= len(owners)
    taken = (
        range(len(owners))
        if whole
        else sample([group for _, _, group in owners], limit or 0, name=name)
    )
    numbers: dict[str, list[int]] = {key: [] for key in built}
    local: dict[str, list[int]] = {key: [] for key in built}
    for number in taken:
        key, index, _ = owners[number]
        numbers[key].append(number)
        local[key].append(index)
    for key in [key for key in built if local[key]]:
        _fix(built[key], docs[key], local[key])
    return Picked(
        {key: built[key] for key in built if local[key]},
        {key: numbers[key] for key in built if local[key]},
    )


def _fix(task: Any, docs: Any, taken: Sequence[int]) -> None:
    """Make a task hold these documents and no others; what is left out draws its shots all the
    same.
    """
    if len(taken) < len(docs):
        _draw_for_all(task, docs, taken)
        docs = docs.select(taken) if hasattr(docs, "select") else [docs[index] for index in taken]
    if task.has_test_docs():
        task.test_docs = lambda: docs
    else:
        task.validation_docs = lambda: docs


def _draw_for_all(task: Any, docs: Any, taken: Sequence[int]) -> None:
    """Draw the shots of the items that are left out too: shots come from one stream, and a sample's
    are those of the whole run.
    """
    shown = task.fewshot_context
    gaps = iter([range(before + 1, at) for before, at in zip([-1, *taken], taken, strict=False)])
    # then the item itself is never among its shots
    own = task.fewshot_cfg.split == task.config.test_split

    def fewshot_context(doc: Any, num_fewshot: int, **given: Any) -> Any:
        for index in next(gaps) if num_fewshot else ():
            task.sampler.sample(n=num_fewshot, eval_doc=docs[index] if own else None)
        return shown(doc, num_fewshot=num_fewshot, **given)

    task.fewshot_context = fewshot_context


def group_of(doc: Mapping[str, Any], task: str = "", *, several: bool = False) -> str:
    """Return what an item is broken down by: its subject, its number of steps (plain values, no
    lists), or of a group its task.
    """
    found = next((doc[name] for name in ("subject", "steps") if name in doc), None)
    plain = isinstance(found, (str, int)) and not isinstance(found, bool)
    return str(found) if plain else task if several else ""


def sample(groups: Sequence[str], count: int, *, name: str) -> list[int]:
    """Draw `count` item numbers, the same ones for every model, spread over the groups as evenly as
    they allow.
    """
    draw = random.Random(f"limit/{name}")
    waiting: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        waiting.setdefault(group, []).append(number)
    for members in waiting.values():
        draw.shuffle(members)
    taken: list[int] = []
    while len(taken) < min(count, len(groups)):
        taken += [members.pop() for members in waiting.values() if members][: count - len(taken)]
    return sorted(taken)
