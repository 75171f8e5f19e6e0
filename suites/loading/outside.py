"""`lm-eval:NAME`: any task or group that lm-eval knows, built in or a YAML file of the user's, as
its definition says.

Kind, version and primary figure are read from the YAML alone, so that planning a run downloads
nothing.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from harness.contract import DataSource, Example, Grade, Split
from harness.data.examples import interleaved
from harness.data.seeding import seeded_as_lm_eval
from harness.data.source import NoSplit
from harness.errors import HarnessError, in_one_line
from harness.statistics.figures import as_number, weighted_mean
from suites.loading.definition import TaskDefinition, reads_local_files
from suites.loading.inputs import TaskInputs, definition_digest, definition_files
from suites.loading.lm_eval import build_task, explaining_hub_errors
from suites.loading.statement import summarize_task

_HELD_OUT = 500
_COUNTED = 50_000_000  # bytes of a data file whose lines are counted while planning


class ItemGold(str):
    """A gold answer that knows its item: graded by it, not by the first item whose answer reads
    alike.
    """

    __slots__ = ("doc", "task")
    task: Any
    doc: Mapping[str, Any]

    @classmethod
    def of(cls, text: str, task: Any, doc: Mapping[str, Any]) -> "ItemGold":
        """Return a gold answer that carries its task and item."""
        gold = cls(text)
        gold.task, gold.doc = task, doc
        return gold


class LmEvalTask:
    """A task or group of lm-eval by its name there; a group counts as one task of many parts."""

    domain = "other"
    # its filters and metric are lm-eval's: there is nothing to grade beside them
    judged_upstream = True

    def __init__(self, name: str, include_path: str | Path | None = None) -> None:
        folder = Path(include_path).resolve() if include_path is not None else None
        if folder is not None and not folder.is_dir():
            raise HarnessError(
                f"no folder at {include_path}; give --include-path a folder with lm-eval task "
                "files (.yaml)"
            )
        self.name = name
        self._chance: float | None = None
        self._docs: dict[str, tuple[Any, Any]] = {}  # gold -> task and doc, for `grade`
        with _explaining_definition_errors(name):
            stated = summarize_task(name, folder)
        self._leaves, self._settings = stated.leaves, stated.settings
        self.kind, self.version, self.notes = stated.kind, stated.version, stated.notes
        self.metric, self.primary = stated.metric, stated.primary
        self.by_size, self.aggregated = stated.by_size, stated.aggregated
        self.unknown_inputs, self.needs_hub = stated.unknown_inputs, stated.needs_hub

    @cached_property
    def definition(self) -> str:
        """A digest of the files that define it, lm-eval's own too, and of what groups above them
        change: shots, filters, prompts.
        """
        parts = [
            definition_digest(leaf, TaskInputs(tuple(sorted(definition_files(leaf.path))), ""))
            for leaf in self._leaves
        ]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    @property
    def chance(self) -> float:
        """Accuracy of guessing: the mean over items of right choices over choices; builds the task
        if nobody has yet.
        """
        if self.kind != "choose":
            return 0.0
        if self._chance is None:
            with _explaining_definition_errors(self.name):
                self._chance = _chance(self._built, by_size=self.by_size)
        return self._chance

    @cached_property
    def _built(self) -> dict[str, Any]:
        """The tasks for our own questions to them; the scorer gets fresh ones, since it changes
        what it gets.
        """
        return self._build()

    def _build(self) -> dict[str, Any]:
        with seeded_as_lm_eval():
            return {leaf.name: _build(leaf) for leaf in self._leaves}

    def no_training(self, source: DataSource) -> str:
        """Say why there is nothing to train on, as far as the definition tells; "" where
        there is.
        """
        if self.kind == "perplexity":
            return "it measures perplexity only"
        without = [
            leaf.name
            for leaf, one in zip(self._leaves, self._settings, strict=True)
            if not one.get("training_split")
        ]
        return f"{without[0]} has no training split" if without else ""

    def count(self) -> int | None:
        """Return how many items are scored, where that is known by counting the lines of data
        files; else None.
        """
        counts = [
            _counted(leaf, one) for leaf, one in zip(self._leaves, self._settings, strict=True)
        ]
        return (
            sum(known)
            if len(known := [one for one in counts if one is not None]) == len(counts)
            else None
        )

    def lm_eval_tasks(self, source: DataSource) -> dict[str, Any]:
        """Return lm-eval's tasks by name, a group's every member, each over its own data set;
        `source` is not used.
        """
        return self._build()

    def examples(self, split: Split, source: DataSource) -> Iterator[Example]:
        """Yield items without shots, a group's members in turn.

        `test` is what is scored. `validation` is a split of that name that is not scored, else the
        last tenth of the training rows, 500 at most. Raises `NoSplit` where there are no training
        rows, and for `dev`.
        """
        if self.kind == "perplexity" or split == "dev":
            raise NoSplit(
                f"{self.name} has no {split} items to train on; train on another suite, for "
                "example --suite math"
            )
        parts = [
            [self._example(task, doc) for doc in _docs(self.name, task, split)]
            for task in self._built.values()
        ]
        return iter(list(interleaved(parts)))

    def _example(self, task: Any, doc: Mapping[str, Any]) -> Example:
        gold, text = self._gold(task, doc)
        prompt = task.doc_to_text(doc)
        if not isinstance(prompt, str):
            raise NoSplit(
                f"{self.name} has a prompt for each choice, and none to train on; train on another "
                "suite, for example --suite math"
            )
        completion = f"{task.config.target_delimiter}{text}"
        return Example(
            task=self.name,
            prompt=prompt,
            completion=completion,
            answer=completion,
            gold=ItemGold.of(gold, task, doc),
        )

    def _gold(self, task: Any, doc: Mapping[str, Any]) -> tuple[str, str]:
        """Return what a grader compares with, and the text of the right answer."""
        target = task.doc_to_target(doc)
        first = target[0] if isinstance(target, list) and target else target
        text = (
            str(task.doc_to_choice(doc)[first])
            if task.config.doc_to_choice is not None and isinstance(first, int)
            else str(first)
        )
        return (text if self.kind == "choose" else str(target)), text

    def grade(self, gold: str, text: str) -> tuple[Grade, ...]:
        """Grade one answer: a generated one by every filter of the task and its metric, as lm-eval
        does; a choice by its text.

        The gold of an example knows its item; of a bare text the metric sees the first item with
        this gold.
        """
        if self.kind == "perplexity":
            return ()
        if self.kind == "choose":
            found = text.strip() or None
            return (Grade(extractor=self.primary, extracted=found, correct=found == gold.strip()),)
        task, doc = (gold.task, gold.doc) if isinstance(gold, ItemGold) else self._doc_of(gold)
        ensembles = sorted(task._filters, key=lambda one: one.name != self.primary)
        return tuple(self._grade(ensemble, task, doc, text) for ensemble in ensembles)

    def _doc_of(self, gold: str) -> tuple[Any, Any]:
        """Return a task and an item of it whose gold this is."""
        if gold.strip() not in self._docs:
            for task in self._built.values():
                for doc in task.eval_docs:
                    self._docs.setdefault(self._gold(task, doc)[0].strip(), (task, doc))
        if gold.strip() not in self._docs:
            raise HarnessError(
                f"{self.name} has no item with the gold answer {gold[:40]!r}; grade answers to its "
                "own items"
            )
        return self._docs[gold.strip()]

    def _grade(self, ensemble: Any, task: Any, doc: Any, text: str) -> Grade:
        from lm_eval.api.instance import Instance

        instance = Instance(
            request_type="generate_until",
            doc=doc,
            arguments=("", {}),
            idx=0,
            metadata=(task.task_name, 0, 1),
            resps=[text],
        )
        ensemble.apply([instance])
        filtered = instance.filtered_resps[ensemble.name]
        given = task.process_results(doc, [filtered])
        metric = self.metric if self.metric in given else next(iter(given), "")
        value = as_number(given.get(metric))
        lower = task.higher_is_better().get(metric) is False
        extracted = next(
            (str(one) for one in ([filtered] if isinstance(filtered, str) else filtered or [])), ""
        )
        return Grade(
            extractor=ensemble.name,
            # "[invalid]": lm-eval's word for no match
            extracted=None if extracted.strip() in {"", "[invalid]"} else extracted,
            correct=value is not None and (value <= 0 if lower else value >= 1),  # full marks
        )


@contextmanager
def _explaining_definition_errors(name: str) -> Iterator[None]:
    """Turn what a definition of another shape than a task's does to its readers into one line."""
    from jinja2 import TemplateError

    try:
        yield
    except HarnessError:
        raise
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        OSError,
        RecursionError,
        SyntaxError,
        TypeError,
        ValueError,
        TemplateError,
    ) as problem:
        raise HarnessError(
            f"{name} is not written as lm-eval's tasks are ({in_one_line(problem)}); correct its "
            "YAML"
        ) from problem


def _build(leaf: TaskDefinition) -> Any:
    """Build one task over its own data set; a `HarnessError` tells an unreachable Hub from a
    mistake in local files.
    """
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError

    try:
        settings = leaf.settings(functions=True)
    except (AttributeError, ImportError, SyntaxError, NameError, TypeError, ValueError) as problem:
        raise HarnessError(
            f"{leaf.full_name} cannot be built: {_first_line(problem)}; correct {leaf.path} or "
            "its code"
        ) from problem
    if not reads_local_files(settings) and settings.get("custom_dataset") is None:
        with explaining_hub_errors(
            leaf.full_name,
            "run it once with a network, or give --include-path a folder whose YAML names local "
            "data_files",
        ):
            return build_task(settings)
    leaf.data_files()  # raises for one that is not there
    try:
        return build_task(settings)
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ImportError,
        NameError,
        AssertionError,
        DatasetsError,
        TemplateError,
    ) as problem:
        raise HarnessError(
            f"{leaf.full_name} cannot be built: {_first_line(problem)}; correct {leaf.path} or "
            "the data files it names"
        ) from problem


def _first_line(problem: Exception) -> str:
    return (next(iter(str(problem).splitlines()), "") or type(problem).__name__)[:200]


def _chance(tasks: Mapping[str, Any], *, by_size: bool) -> float:
    """Return the mean over items of right choices over choices; `by_size`: every item counts alike,
    else every task does.
    """
    shares = [[_guessed(task, doc) for doc in task.eval_docs] for task in tasks.values()]
    parts = [] if by_size else [(len(one), 1 / (len(shares) * len(one))) for one in shares]
    return weighted_mean([share for one in shares for share in one], parts)


def _guessed(task: Any, doc: Mapping[str, Any]) -> float:
    choices, target = len(task.doc_to_choice(doc)), task.doc_to_target(doc)
    return max(1, len(set(target)) if isinstance(target, list) else 1) / choices


def _counted(leaf: TaskDefinition, settings: Mapping[str, Any]) -> int | None:
    """Count the lines of a task's test file; None where documents are processed, or the data is no
    plain file of lines.
    """
    given = (settings.get("dataset_kwargs") or {}).get("data_files")
    split = settings.get("test_split") or settings.get("validation_split")
    file = given.get(split) if isinstance(given, Mapping) else None
    plain = (
        settings.get("dataset_path") in ("json", "text")
        and isinstance(file, str)
        and Path(file).is_file()
    )
    if not plain or settings.get("process_docs") or Path(str(file)).stat().st_size > _COUNTED:
        return None
    lines = [line for line in Path(str(file)).read_bytes().split(b"\n") if line.strip()]
    packed = str(file).endswith((".gz", ".zip", ".json")) and not (
        lines and lines[0].lstrip().startswith(b"{") and lines[0].rstrip().endswith(b"}")
    )
    return None if packed else len(lines)


def _docs(name: str, task: Any, split: Split) -> Iterable[Mapping[str, Any]]:
    """Return the items of a split of one task; see `OutsideTask.examples`."""
    if split == "test":
        return list(task.eval_docs)
    if split == "validation" and task.has_test_docs() and task.has_validation_docs():
        return list(task.validation_docs())
    if not task.has_training_docs():
        raise NoSplit(
            f"{name} has no training split to train on; train on another suite, for example "
            "--suite math"
        )
    every = list(task.training_docs())
    if task.has_test_docs() and task.has_validation_docs():
        return every
    held_out = min(_HELD_OUT, max(1, len(every) // 10))
    return (
        every[-held_out:] if split == "validation" else list(islice(every, len(every) - held_out))
    )
