"""Grades answers to items of lm-eval's tasks by the tasks' own filters and metrics."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from harness.contract import Grade
from harness.errors import HarnessError
from harness.statistics.figures import as_number


class ItemGold(str):
    """A gold answer that knows its item.

    An answer is graded by that item, and not by the first item with the same gold answer.
    """

    __slots__ = ("doc", "task")
    task: Any
    doc: Mapping[str, Any]

    @classmethod
    def of_item(cls, text: str, task: Any, doc: Mapping[str, Any]) -> "ItemGold":
        """Return a gold answer that carries its task and item."""
        gold = cls(text)
        gold.task, gold.doc = task, doc
        return gold


class RightAnswer(NamedTuple):
    """The right answer of an item."""

    gold: str  # what a grader compares with
    text: str  # as a student writes it


class _Item(NamedTuple):
    """An item, with the task of lm-eval that it belongs to."""

    task: Any
    doc: Mapping[str, Any]


class AnswerGrader:
    """Grades answers to the items of a task or group.

    `tasks` returns the tasks of lm-eval by name; they are built only when an answer has to be
    compared with their items.
    """

    def __init__(
        self,
        name: str,
        *,
        kind: str,
        metric: str,
        primary: str,
        tasks: Callable[[], Mapping[str, Any]],
    ) -> None:
        self.name, self.kind, self.metric, self.primary = name, kind, metric, primary
        self._tasks = tasks
        self._items: dict[str, _Item] = {}  # by their gold answers

    def right_answer(self, task: Any, doc: Mapping[str, Any]) -> RightAnswer:
        """Return the right answer of an item."""
        target = task.doc_to_target(doc)
        first = target[0] if isinstance(target, list) and target else target
        if task.config.doc_to_choice is not None and isinstance(first, int):
            text = str(task.doc_to_choice(doc)[first])
        else:
            text = str(first)
        return RightAnswer(str(target) if self.kind == "generate" else text, text)

    def grades(self, gold: str, text: str) -> Iterator[Grade]:
        """Yield the grades of an answer: one of each filter, the primary one first.

        A choice and the end of a text have one grade, by their text; perplexity has none.
        """
        if self.kind == "perplexity":
            return
        if self.kind in ("choose", "continue"):
            choice = text.strip() or None
            yield Grade(extractor=self.primary, extracted=choice, correct=choice == gold.strip())
            return
        item = _Item(gold.task, gold.doc) if isinstance(gold, ItemGold) else self._item_with(gold)
        filters = sorted(item.task._filters, key=lambda steps: steps.name != self.primary)
        for steps in filters:
            yield self._grade_filtered(steps, item, text)

    def _item_with(self, gold: str) -> _Item:
        """Return the first item with a gold answer. Raises `HarnessError` where there is none."""
        if gold.strip() not in self._items:
            for task in self._tasks().values():
                for doc in task.eval_docs:
                    key = self.right_answer(task, doc).gold.strip()
                    self._items.setdefault(key, _Item(task, doc))
        if gold.strip() not in self._items:
            raise HarnessError(
                f"{self.name} has no item with the gold answer {gold[:40]!r}; grade answers to its "
                "own items"
            )
        return self._items[gold.strip()]

    def _grade_filtered(self, lm_eval_filter: Any, item: _Item, text: str) -> Grade:
        """Grade an answer as lm-eval does: filter it, then ask the task's metric.

        `lm_eval_filter` is one of the task's filters. The metric is the task's first where the
        result lacks the one that the score is made from.
        """
        from lm_eval.api.instance import Instance

        instance = Instance(
            request_type="generate_until",
            doc=item.doc,
            arguments=("", {}),
            idx=0,
            metadata=(item.task.task_name, 0, 1),
            resps=[text],
        )
        lm_eval_filter.apply([instance])
        filtered = instance.filtered_resps[lm_eval_filter.name]
        results = item.task.process_results(item.doc, [filtered])
        metric = self.metric if self.metric in results else next(iter(results), "")
        value = as_number(results.get(metric))
        lower_is_better = item.task.higher_is_better().get(metric) is False
        answers = [filtered] if isinstance(filtered, str) else filtered or []
        extracted = next((str(answer) for answer in answers), "")
        return Grade(
            extractor=lm_eval_filter.name,
            # "[invalid]": lm-eval's word for no match
            extracted=None if extracted.strip() in {"", "[invalid]"} else extracted,
            correct=value is not None and _is_best(value, lower_is_better=lower_is_better),
        )


def _is_best(value: float, *, lower_is_better: bool) -> bool:
    """Tell whether a metric's value is the best there is: 1, or 0 of an error that is counted."""
    return value <= 0 if lower_is_better else value >= 1
