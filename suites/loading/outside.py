"""`lm-eval:NAME`: any task or group that lm-eval knows, its own or a YAML file of the user's.

`lm-eval:NAME:METRIC` is the same task with another metric as its figure.

Kind, version and primary metric are read from the YAML alone, so that planning a run downloads
nothing.
"""

import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.contract import DataSource, Example, Grade, Split
from harness.data.examples import interleaved
from harness.data.seeding import seeded_as_lm_eval
from harness.data.source import NoSplit
from harness.errors import HarnessError
from suites.loading.building import (
    build_definition,
    chance_level,
    count_test_items,
    explaining_definition_errors,
    items_of_split,
)
from suites.loading.definition import full_name, split_metric
from suites.loading.grading import AnswerGrader, ItemGold
from suites.loading.inputs import TaskInputs, definition_digest, definition_files
from suites.loading.summary import summarize_task

if TYPE_CHECKING:
    from suites.loading.fetching import HubFile


class LmEvalTask:
    """A task or group of lm-eval by its name there; a group counts as one task of many parts."""

    domain = "other"
    # its filters and metric are lm-eval's: no grader of ours stands beside them
    judged_upstream = True

    def __init__(
        self,
        name: str,
        include_path: str | Path | None = None,
        data_folder: str | Path | None = None,
        num_fewshot: int | None = None,
    ) -> None:
        folder = Path(include_path).resolve() if include_path is not None else None
        if folder is not None and not folder.is_dir():
            raise HarnessError(
                f"no folder at {include_path}; give --include-path a folder with lm-eval task "
                "files (.yaml)"
            )
        self.name = name
        self.items_name = full_name(split_metric(name).task)
        self._chance: float | None = None
        with explaining_definition_errors(name):
            summary = summarize_task(
                name,
                folder,
                Path(data_folder) if data_folder is not None else None,
                num_fewshot,
            )
        self._definitions, self._settings = summary.definitions, summary.settings
        self.kind, self.version, self.notes = summary.kind, summary.version, summary.notes
        self.metric, self.primary = summary.metric, summary.primary
        self.by_size, self.aggregated = summary.by_size, summary.aggregated
        self.unknown_inputs, self.needs_hub = summary.unknown_inputs, summary.needs_hub
        self.hub_datasets, self.files = summary.hub_datasets, summary.files
        self._grader = AnswerGrader(
            name,
            kind=self.kind,
            metric=self.metric,
            primary=self.primary,
            tasks=lambda: self._built,
        )

    @cached_property
    def definition(self) -> str:
        """A digest of the files that define it, lm-eval's own too, and of the groups' changes."""
        parts = [
            definition_digest(task, TaskInputs(tuple(sorted(definition_files(task.path))), ""))
            for task in self._definitions
        ]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    @property
    def chance(self) -> float:
        """The accuracy of guessing: the mean over items of right choices over choices.

        Reading it builds the task, unless it is built already.
        """
        if self.kind != "choose":
            return 0.0
        if self._chance is None:
            with explaining_definition_errors(self.name):
                self._chance = chance_level(self._built, by_size=self.by_size)
        return self._chance

    @cached_property
    def _built(self) -> dict[str, Any]:
        """The tasks that items are read from; the scorer changes the tasks it gets."""
        return self._build()

    def _build(self) -> dict[str, Any]:
        """Build the tasks of lm-eval, by name."""
        with seeded_as_lm_eval():
            return {task.name: build_definition(task) for task in self._definitions}

    def hub_files(self) -> "Iterator[HubFile]":
        """Yield the files that `harness data fetch` writes: the splits that its tasks name."""
        from suites.loading.hub_splits import hub_files

        for task, settings in zip(self._definitions, self._settings, strict=True):
            yield from hub_files(task.full_name, settings)

    def no_training(self, source: DataSource) -> str:
        """Return why there is nothing to train on, as the definition says; "" where there is."""
        if self.kind == "perplexity":
            return "it measures perplexity only"
        without = [
            task.name
            for task, settings in zip(self._definitions, self._settings, strict=True)
            if not settings.get("training_split")
        ]
        return f"{without[0]} has no training split" if without else ""

    def count(self) -> int | None:
        """Return how many items are scored; None where the lines of data files do not tell."""
        counts = [count_test_items(settings) for settings in self._settings]
        known_counts = [count for count in counts if count is not None]
        return sum(known_counts) if len(known_counts) == len(counts) else None

    def lm_eval_tasks(self, source: DataSource) -> dict[str, Any]:
        """Return lm-eval's tasks by name, each over its own data set; `source` is not used."""
        return self._build()

    def examples(self, split: Split, source: DataSource) -> Iterator[Example]:
        """Yield items without shots, those of a group's tasks in turn.

        `test` is what is scored. `validation` is a split of that name that is not scored, else the
        last tenth of the training rows, at most 500. Raises `NoSplit` where there are no training
        rows, and for `dev`.
        """
        if self.kind == "perplexity" or split == "dev":
            raise NoSplit(
                f"{self.name} has no {split} items to train on; train on another suite, for "
                "example --suite math"
            )
        parts = [
            [self._example(task, doc) for doc in items_of_split(self.name, task, split)]
            for task in self._built.values()
        ]
        return iter(list(interleaved(parts)))

    def _example(self, task: Any, doc: Mapping[str, Any]) -> Example:
        """Return an item as an example to train on."""
        answer = self._grader.right_answer(task, doc)
        prompt = task.doc_to_text(doc)
        if not isinstance(prompt, str):
            raise NoSplit(
                f"{self.name} has a prompt for each choice, and none to train on; train on another "
                "suite, for example --suite math"
            )
        # the given end of a text has the space before it
        delimiter = "" if self.kind == "continue" else task.config.target_delimiter
        completion = f"{delimiter}{answer.text}"
        return Example(
            task=self.name,
            prompt=prompt,
            completion=completion,
            answer=completion,
            gold=ItemGold.of_item(answer.gold, task, doc),
        )

    def grade(self, gold: str, text: str) -> tuple[Grade, ...]:
        """Grade one answer by each filter of the task and its metric, as lm-eval does.

        A choice is graded by its text. The gold answer of an example knows its item; for a bare
        text it is the first item with that gold answer.
        """
        return tuple(self._grader.grades(gold, text))
