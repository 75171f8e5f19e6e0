"""What `harness.testing.check_task` looks at, check by check: what a task declares, its items, its
grader, what lm-eval makes of it.

A check raises `AssertionError` with what was seen and what was declared, or `Skipped` where the
task's data is not on this machine.
"""

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, get_args

from harness.contract import Example, Kind, Split
from harness.data.source import LocalOrHubData, NoSplit
from harness.errors import HarnessError, Skipped

_DECLARED: Mapping[str, type[Any]] = {
    "name": str,
    "version": str,
    "kind": str,
    "chance": float,
    "primary": str,
    "domain": str,
}


@dataclass(kw_only=True)
class TaskTrial:
    """A task on trial, and how many items of each split are looked at."""

    task: Any
    items: int

    @cached_property
    def source(self) -> LocalOrHubData:
        """The data folder that the environment names."""
        return LocalOrHubData.from_environment(None)

    def examples(self, split: str) -> list[Example]:
        """Return the first items of a split; none where the task has no such split. Raises
        `Skipped` without its data.
        """
        if getattr(self.task, "files", ()) and self.source.folder is None:
            raise Skipped(
                f"its files {', '.join(self.task.files[:2])} are not here; set HARNESS_DATA_DIR"
            )
        try:
            return list(islice(self.task.examples(split, self.source), self.items))
        except NoSplit:
            return []

    @cached_property
    def splits(self) -> Mapping[str, list[Example]]:
        """The first items of every split that the task has."""
        found = {split: self.examples(split) for split in get_args(Split)}
        return {split: examples for split, examples in found.items() if examples}


def declares_itself(trial: TaskTrial) -> None:
    """Name, version, kind, chance, primary extractor and domain are stated, each of its type."""
    for name, kind in _DECLARED.items():
        value = getattr(trial.task, name, None)
        right = (
            isinstance(value, int | float) and not isinstance(value, bool)
            if kind is float
            else isinstance(value, kind) and bool(value)
        )
        assert right, f"declared {name} = {value!r}; it must be a {kind.__name__}"
    assert trial.task.kind in get_args(Kind), (
        f"declared kind = {trial.task.kind!r}; kinds are {', '.join(get_args(Kind))}"
    )
    assert "@" not in trial.task.name + trial.task.version, (
        f"{trial.task.name}@{trial.task.version}: neither may hold an @"
    )


def chance_is_a_share(trial: TaskTrial) -> None:
    """Guessing is right in a share of 0 to less than 1 of the items."""
    assert 0 <= trial.task.chance < 1, (
        f"declared chance = {trial.task.chance!r}; it is a share from 0 to below 1"
    )


def has_items(trial: TaskTrial) -> None:
    """A task that is graded has items in some split; all of them name it, and say what is asked and
    what is right.
    """
    if trial.task.kind == "perplexity":
        return
    assert trial.splits, "no split has an item"
    for split, examples in trial.splits.items():
        for number, one in enumerate(examples):
            where = f"{split} item {number}"
            assert one.task == trial.task.name, (
                f"{where} names the task {one.task!r}; declared name = {trial.task.name!r}"
            )
            assert one.prompt and one.gold and one.completion and one.answer, (
                f"{where} has an empty prompt, gold, completion or answer"
            )


def items_repeat(trial: TaskTrial) -> None:
    """A split yields the same items in the same order, again and from an instance of its own."""
    others = (
        [trial, TaskTrial(task=type(trial.task)(), items=trial.items)]
        if _needs_no_arguments(trial.task)
        else [trial]
    )
    for split, examples in trial.splits.items():
        for other in others:
            assert other.examples(split) == examples, (
                f"read twice, the items of {split} differ; draw them from a seed of their own"
            )


def _needs_no_arguments(task: Any) -> bool:
    try:
        type(task)()
    except TypeError:
        return False
    return True


def splits_share_no_item(trial: TaskTrial) -> None:
    """No prompt stands in two splits, or twice in one: what is trained is never scored."""
    seen: dict[str, str] = {}
    for split, examples in trial.splits.items():
        for one in examples:
            before = seen.setdefault(one.asked, split)
            assert before == split, (
                f"an item stands in {before} and in {split}: {one.asked[-80:]!r}"
            )
        assert len({one.asked for one in examples}) == len(examples), (
            f"an item stands twice in {split}"
        )


def grades_gold_right(trial: TaskTrial) -> None:
    """The worked answer and the bare one of every item are right by every extractor; the primary
    one comes first.
    """
    for split, examples in trial.splits.items():
        for number, one in enumerate(examples):
            for text in (one.completion, one.answer):
                grades = trial.task.grade(one.gold, text)
                assert grades, f"{split} item {number}: grade() returned nothing"
                assert grades[0].extractor == trial.task.primary, (
                    f"declared primary = {trial.task.primary!r}; grade() gives "
                    f"{grades[0].extractor!r} first"
                )
                wrong = next((grade for grade in grades if not grade.correct), None)
                assert wrong is None, (
                    f"{split} item {number}: {wrong.extractor} takes the gold answer for wrong: "
                    f"{text[-60:]!r}"
                )


def grades_wrong_wrong(trial: TaskTrial) -> None:
    """An empty answer, one of nonsense, and another item's gold answer are wrong by the primary
    extractor.
    """
    for split, examples in trial.splits.items():
        for number, one in enumerate(examples):
            other = next(
                (each for each in examples if not _same_answer(trial.task, each.gold, one.gold)),
                None,
            )
            for text in ("", " qwertz", *([other.answer] if other else [])):
                grade = trial.task.grade(one.gold, text)[0]
                assert not grade.correct, (
                    f"{split} item {number}: {grade.extractor} takes {text!r} for right; gold is "
                    f"{one.gold!r}"
                )


def _same_answer(task: Any, left: str, right: str) -> bool:
    """Tell whether two golds are one answer, however they are written."""
    return left.strip().casefold() == right.strip().casefold()


def lm_eval_builds_it(trial: TaskTrial) -> None:
    """lm-eval's own task objects are made, have items, and score by what the task calls its primary
    metric or extractor.
    """
    if getattr(trial.task, "files", ()) and trial.source.folder is None:
        raise Skipped("its files are not here; set HARNESS_DATA_DIR")
    built = trial.task.lm_eval_tasks(trial.source)
    assert built and isinstance(built, Mapping), (
        f"lm_eval_tasks() returned {built!r}; it must be a mapping from names to tasks"
    )
    for name, one in built.items():
        assert list(islice(iter(one.eval_docs), 1)), f"lm-eval's task {name} has no item"


def is_offline(trial: TaskTrial) -> None:
    """Reading items and building lm-eval's task asks no network where the data is here."""
    with _blocked_network() as attempts:
        try:
            fresh = TaskTrial(task=trial.task, items=trial.items)
            _ = fresh.splits
            if trial.task.kind != "perplexity" or trial.source.folder is not None:
                trial.task.lm_eval_tasks(trial.source)
        except (OSError, HarnessError) as problem:
            assert not attempts, f"it asked the network for {attempts[0]} ({problem})"
            raise AssertionError(f"without a network it fails: {problem}") from problem
    assert not attempts, f"it asked the network for {attempts[0]}"


@contextmanager
def _blocked_network() -> Iterator[list[str]]:
    """Refuse connections and look-ups of names; yield what was asked for."""
    attempts: list[str] = []

    def refuse(*asked: Any, **_: Any) -> Any:
        attempts.append(
            " ".join(str(one) for one in asked if isinstance(one, str | tuple)) or "a connection"
        )
        raise OSError("the network is blocked in this check")

    kept = (socket.socket.connect, socket.getaddrinfo, socket.create_connection)
    socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse  # type: ignore[method-assign]
    try:
        yield attempts
    finally:
        socket.socket.connect, socket.getaddrinfo, socket.create_connection = kept  # type: ignore[method-assign]


TASK_CHECKS: Mapping[str, Callable[[TaskTrial], None]] = {
    check.__name__: check
    for check in (
        declares_itself,
        chance_is_a_share,
        has_items,
        items_repeat,
        splits_share_no_item,
        grades_gold_right,
        grades_wrong_wrong,
        lm_eval_builds_it,
        is_offline,
    )
}
