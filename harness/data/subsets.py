"""Frozen subsets of tasks' items: named, seeded, in proportion to subjects, or listed in a file.

`quick:300` draws 300 items of each task, `quick:300:7` by seed 7. A file lists items by digests of
their documents, so that it can be meant for no other data. No torch.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from harness.contract import Task
from harness.errors import HarnessError
from harness.files.digests import digest_of
from harness.files.untrusted import Unreadable, read_as
from harness.files.writing import write_atomically

_SPEC = re.compile(r"(?P<name>[A-Za-z][\w-]*):(?P<count>\d+)(:(?P<seed>\d+))?")
_NAME = re.compile(r"[A-Za-z][\w-]*")


class Subset(BaseModel):
    """Which items of each task are scored: so many, drawn by a seed, or those that a file lists."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["subset"] = "subset"
    name: str
    count: int | None = Field(default=None, ge=1)  # of each task; None: those of `items`
    seed: int = Field(default=1, ge=0)
    # task -> digests of the documents, as samples.jsonl calls them: doc_hash
    items: dict[str, tuple[str, ...]] = {}

    @property
    def label(self) -> str:
        """How records, tables and baselines call it."""
        if self.count is None:
            return f"{self.name} ({digest_of(self.items)[:8]})"
        return f"{self.name}:{self.count}:{self.seed}"

    def size_of(self, task: str, task_size: int) -> int:
        """Return how many items of a task it has; the task has `task_size` items."""
        return len(self.items.get(task, ())) if self.count is None else min(self.count, task_size)

    def numbers(self, task: str, groups: Sequence[str], digests: Iterable[str]) -> list[int]:
        """Return the numbers of a task's items that belong to it, in order.

        `groups` holds the group of each item, and `digests` the digest of its document. Raises
        `HarnessError` where the file lists an item that the task does not have.
        """
        if self.count is not None:
            return proportional_sample(groups, self.count, seed=f"subset/{self.seed}/{task}")
        listed = Counter(self.items.get(task, ()))
        numbers = []
        for number, digest in enumerate(digests):
            if listed[digest] > 0:
                listed[digest] -= 1
                numbers.append(number)
        missing = [digest for digest, count in listed.items() if count > 0]
        if missing or not numbers:
            raise HarnessError(
                f"--subset: {self.name} lists {sum(listed.values()) or 'no'} items of {task} that "
                f"its data does not hold{f' ({missing[0][:12]}... first)' if missing else ''}; it "
                f"was made for other data: make it again with harness data subset"
            )
        return numbers


def proportional_sample(groups: Sequence[str], count: int, *, seed: str) -> list[int]:
    """Draw `count` item numbers, from each group in proportion to its size.

    The shares are rounded by largest remainder, so that the mean over the sample is that over all
    items but for chance. `groups` holds the group of each item.
    """
    members_of: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        members_of.setdefault(group, []).append(number)
    count = min(count, len(groups))
    shares = {group: len(members) * count for group, members in members_of.items()}
    counts = {group: share // len(groups) for group, share in shares.items()}
    generator = random.Random(seed)
    order = list(members_of)
    generator.shuffle(order)  # of equal remainders any may come first
    order.sort(key=lambda group: -(shares[group] % len(groups)))
    for group in order[: count - sum(counts.values())]:
        counts[group] += 1
    return sorted(
        number
        for group, members in members_of.items()
        for number in generator.sample(members, counts[group])
    )


def parse_subset(text: str) -> Subset:
    """Read `NAME:ITEMS`, `NAME:ITEMS:SEED` or the path of a subset file.

    Raises `HarnessError` for anything else.
    """
    if match := _SPEC.fullmatch(text):
        if int(match["count"]) < 1:
            raise HarnessError(f"--subset {text}: it has no item; type for example quick:300")
        return Subset(name=match["name"], count=int(match["count"]), seed=int(match["seed"] or 1))
    path = Path(text)
    if not path.is_file():
        raise HarnessError(
            f"--subset {text}: neither NAME:ITEMS nor a file that is there; type for example "
            "quick:300 or quick:300:7 (by seed 7)"
        )
    return read_subset(path)


def read_subset(path: Path) -> Subset:
    """Read a subset file. Raises `HarnessError` for one that lists no items."""
    try:
        subset = read_as(path, Subset)
    except Unreadable as problem:
        raise HarnessError(
            f"{problem}; a subset file is made by: harness data subset quick:300 --suite S --to "
            "FILE"
        ) from problem
    if not _NAME.fullmatch(subset.name):
        raise HarnessError(f"{path}: {subset.name!r} is no name of letters, digits, '_' and '-'")
    if subset.count is None and not any(subset.items.values()):
        raise HarnessError(f"{path}: it lists no item; make it again with harness data subset")
    return subset


def write_subset(path: Path, subset: Subset) -> None:
    """Write a subset file."""
    write_atomically(path, subset.model_dump_json(indent=1, exclude={"count", "seed"}) + "\n")


def require_items(subset: Subset, tasks: Iterable[Task]) -> None:
    """Raise `HarnessError` for a task of which a subset file lists no item."""
    names = [items_name(task) for task in tasks]
    missing = [name for name in names if subset.count is None and not subset.items.get(name)]
    if missing:
        raise HarnessError(
            f"--subset: {subset.name} lists no item of {missing[0]}, only of "
            f"{', '.join(sorted(subset.items))}; drop that task from --suite, or make the file "
            "again with harness data subset"
        )


def document_digests(documents: Iterable[Any]) -> Iterator[str]:
    """Yield the digest of each document of lm-eval's tasks, as lm-eval takes it."""
    from lm_eval.utils import handle_non_serializable, hash_string

    for document in documents:
        yield hash_string(
            json.dumps(document, indent=2, default=handle_non_serializable, ensure_ascii=False)
        )


def items_name(task: Task) -> str:
    """Return the name of a task's items: the same where two tasks differ in their metric alone."""
    return str(getattr(task, "items_name", task.name))
