"""The checks of `harness.testing.check_task`: declarations, items, grader and lm-eval's task.

A check raises `AssertionError` with what was seen and what was declared, or `Skipped` if the task's
data is not on this machine.
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
    """A task that is checked, and how many items of each split are read."""

    task: Any
    items: int

    @cached_property
    def source(self) -> LocalOrHubData:
        """The data folder that the environment variable names."""
        return LocalOrHubData.from_environment(None)

    def examples(self, split: str) -> list[Example]:
        """Return the first items of a split, none if the task lacks it.

        Raises `Skipped` without the task's data.
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
        by_split = {split: self.examples(split) for split in get_args(Split)}
        return {split: examples for split, examples in by_split.items() if examples}


def declares_itself(trial: TaskTrial) -> None:
    """Check that name, version, kind, chance, primary and domain are there, of the right type."""
    for name, kind in _DECLARED.items():
        value = getattr(trial.task, name, None)
        is_valid = (
            isinstance(value, int | float) and not isinstance(value, bool)
            if kind is float
            else isinstance(value, kind) and bool(value)
        )
        assert is_valid, f"declared {name} = {value!r}; it must be a {kind.__name__}"
    assert trial.task.kind in get_args(Kind), (
        f"declared kind = {trial.task.kind!r}; kinds are {', '.join(get_args(Kind))}"
    )
    assert "@" not in trial.task.name + trial.task.version, (
        f"{trial.task.name}@{trial.task.version}: neither may hold an @"
    )


def chance_is_a_share(trial: TaskTrial) -> None:
    """Check that the accuracy of guessing is a share from 0 to below 1."""
    assert 0 <= trial.task.chance < 1, (
        f"declared chance = {trial.task.chance!r}; it is a share from 0 to below 1"
    )


def has_items(trial: TaskTrial) -> None:
    """Check that a graded task has items, each complete and with the task's name."""
    if trial.task.kind == "perplexity":
        return
    assert trial.splits, "no split has an item"
    for split, examples in trial.splits.items():
        for number, example in enumerate(examples):
            where = f"{split} item {number}"
            assert example.task == trial.task.name, (
                f"{where} names the task {example.task!r}; declared name = {trial.task.name!r}"
            )
            assert example.prompt and example.gold and example.completion and example.answer, (
                f"{where} has an empty prompt, gold, completion or answer"
            )


def items_repeat(trial: TaskTrial) -> None:
    """Check that a split yields the same items in the same order, also from a new instance."""
    trials = (
        [trial, TaskTrial(task=type(trial.task)(), items=trial.items)]
        if _needs_no_arguments(trial.task)
        else [trial]
    )
    for split, examples in trial.splits.items():
        for repeated in trials:
            assert repeated.examples(split) == examples, (
                f"read twice, the items of {split} differ; draw them from a seed of their own"
            )


def _needs_no_arguments(task: Any) -> bool:
    try:
        type(task)()
    except TypeError:
        return False
    return True


def splits_share_no_item(trial: TaskTrial) -> None:
    """Check that no prompt is in two splits or twice in one: no trained item is ever scored."""
    split_of: dict[str, str] = {}  # prompt -> the first split that has it
    for split, examples in trial.splits.items():
        for example in examples:
            first_split = split_of.setdefault(example.asked, split)
            assert first_split == split, (
                f"an item stands in {first_split} and in {split}: {example.asked[-80:]!r}"
            )
        assert len({example.asked for example in examples}) == len(examples), (
            f"an item stands twice in {split}"
        )


def grades_gold_right(trial: TaskTrial) -> None:
    """Check that every extractor takes every item's gold answer for right, with and without steps.

    The primary extractor comes first.
    """
    for split, examples in trial.splits.items():
        for number, example in enumerate(examples):
            for text in (example.completion, example.answer):
                grades = trial.task.grade(example.gold, text)
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
    """Check that the primary extractor takes wrong answers for wrong.

    These are an empty one, nonsense, and another item's gold answer.
    """
    for split, examples in trial.splits.items():
        for number, example in enumerate(examples):
            other = next(
                (other for other in examples if not _same_answer(other.gold, example.gold)), None
            )
            for text in ("", " qwertz", *([other.answer] if other else [])):
                grade = trial.task.grade(example.gold, text)[0]
                assert not grade.correct, (
                    f"{split} item {number}: {grade.extractor} takes {text!r} for right; gold is "
                    f"{example.gold!r}"
                )


def _same_answer(gold: str, other_gold: str) -> bool:
    """Tell whether two golds are the same but for case and blanks."""
    return gold.strip().casefold() == other_gold.strip().casefold()


def lm_eval_builds_it(trial: TaskTrial) -> None:
    """Check that the task builds lm-eval's task objects, and that these have items."""
    if getattr(trial.task, "files", ()) and trial.source.folder is None:
        raise Skipped("its files are not here; set HARNESS_DATA_DIR")
    tasks = trial.task.lm_eval_tasks(trial.source)
    assert tasks and isinstance(tasks, Mapping), (
        f"lm_eval_tasks() returned {tasks!r}; it must be a mapping from names to tasks"
    )
    for name, lm_eval_task in tasks.items():
        assert list(islice(iter(lm_eval_task.eval_docs), 1)), f"lm-eval's task {name} has no item"


def is_offline(trial: TaskTrial) -> None:
    """Check that reading items and building lm-eval's tasks uses no network if the data is here."""
    with _blocked_network() as attempts:
        try:
            unread = TaskTrial(task=trial.task, items=trial.items)
            _ = unread.splits
            if trial.task.kind != "perplexity" or trial.source.folder is not None:
                trial.task.lm_eval_tasks(trial.source)
        except (OSError, HarnessError) as problem:
            assert not attempts, f"it asked the network for {attempts[0]} ({problem})"
            raise AssertionError(f"without a network it fails: {problem}") from problem
    assert not attempts, f"it asked the network for {attempts[0]}"


@contextmanager
def _blocked_network() -> Iterator[list[str]]:
    """Refuse connections and look-ups of names; yield the list of these attempts."""
    attempts: list[str] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        addresses = [str(value) for value in arguments if isinstance(value, str | tuple)]
        attempts.append(" ".join(addresses) or "a connection")
        raise OSError("the network is blocked in this check")

    originals = (socket.socket.connect, socket.getaddrinfo, socket.create_connection)
    socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse  # type: ignore[method-assign]
    try:
        yield attempts
    finally:
        socket.socket.connect, socket.getaddrinfo, socket.create_connection = originals  # type: ignore[method-assign]


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
