"""`mmlu` and `mmlu-cloze`: 57 subjects of four-choice questions (Hendrycks et al. 2021).

Templates are lm-eval's own. Items come from `mmlu/dev.jsonl`, `mmlu/val.jsonl` and
`mmlu/test.jsonl` of the data folder (plain or .gz), else from the Hub. The files name the answer by
its letter; `mmlu_rows` turns it into its position, 0 to 3, because two of lm-eval's templates give
a perfect model the score 0.0 on letters, without an error.
"""

import re
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from harness.contract import DataSource, Example, Grade, Split
from harness.data.examples import interleaved
from harness.data.source import LocalOrHubData, NoSplit, Row
from harness.errors import HarnessError, unknown
from suites.loading.lm_eval import (
    build_task,
    build_task_over_rows,
    builtin_path,
    data_dir_hint,
    explaining_hub_errors,
    hub_rows,
    read_builtin,
)

if TYPE_CHECKING:
    from suites.loading.fetching import HubFile

FILES = ("mmlu/dev.jsonl.gz", "mmlu/test.jsonl.gz")
FIELDS = ("subject", "question", "choices", "answer")
PUBLISHED = {"dev": 285, "validation": 1_531, "test": 14_042}
SHOTS = 5
LETTERS = "ABCD"
# The answer is (B). **Answer:** B
_STATED = re.compile(r"(?i:\banswer)[ *]*(?:is|:)[ *:(]*([A-D])(?:[*).:;]|[ ]*$)", re.MULTILINE)
_STEMS = {"dev": "dev", "validation": "val", "test": "test"}


def _row_error(row: Row) -> str | None:
    """Return what is wrong with a row; None where nothing is."""
    if not isinstance(row["question"], str) or not isinstance(row["subject"], str):
        return "subject and question must be texts"
    choices, answer = row["choices"], row["answer"]
    if (
        not isinstance(choices, list)
        or len(choices) != 4
        or not all(isinstance(choice, str) for choice in choices)
    ):
        count = f"{len(choices)} given" if isinstance(choices, list) else f"given {choices!r:.40}"
        return f"choices must be a list of four texts, {count}"
    if _answer_position(answer) is None:
        return (
            "answer must be its position, 0 to 3, or one of the letters A, B, C, D, given "
            f"{answer!r:.40}"
        )
    return None


def _answer_position(answer: object) -> int | None:
    """Return the position of an answer, 0 to 3, from a letter or a position; None for the rest.

    The files of the Hub have positions.
    """
    if isinstance(answer, str) and len(answer) == 1 and answer in LETTERS:
        return LETTERS.index(answer)
    position = (
        int(answer)
        if isinstance(answer, str) and len(answer) == 1 and answer.isdecimal()
        else answer
    )
    return (
        position
        if isinstance(position, int)
        and not isinstance(position, bool)
        and position in range(len(LETTERS))
        else None
    )


def mmlu_rows(split: Split, source: DataSource, *, task: str) -> list[Row]:
    """Return `{question, subject, choices, answer}` of `dev`, `validation` or `test`.

    Rows are in file order. The answer is its position, 0 to 3.
    """
    if source.folder is None:
        with explaining_hub_errors(task, data_dir_hint(FILES)):
            return [
                {name: row[name] for name in FIELDS} for row in hub_rows("cais/mmlu", "all", split)
            ]
    rows = source.rows(
        f"mmlu/{_STEMS[split]}.jsonl",
        fields=FIELDS,
        expected=PUBLISHED[split],
        check=_row_error,
        wanted=FILES,
    )
    return [
        {
            "question": row["question"],
            "subject": row["subject"],
            "choices": row["choices"],
            "answer": _answer_position(row["answer"]),
        }
        for row in rows
    ]


def _training_rows(source: DataSource, *, task: str) -> Iterator[Row]:
    """Yield the rows of MMLU's `auxiliary_train`, which only the Hub has."""
    if source.folder is not None:
        raise NoSplit(
            f"{task}: {_no_training_rows(source)}; type --suite math to train on gsm8k, or leave "
            "--data-dir out to use the Hub's auxiliary_train"
        )
    with explaining_hub_errors(
        task, "type --suite math to train on gsm8k: only the Hub has auxiliary_train"
    ):
        rows = hub_rows("cais/mmlu", "auxiliary_train", "train")
    return (row.get("train", row) for row in rows)  # rows of auxiliary_train are nested once more


def _no_training_rows(source: DataSource) -> str:
    """Return why the data folder has no rows to train on."""
    return f"mmlu in {source.folder} holds dev, val and test only, which are never trained on"


def _rows_by_subject(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Group rows by their subject, in the order in which subjects first appear."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["subject"], []).append(row)
    return groups


def stated_letter(text: str) -> str | None:
    """Return the one letter that a text states; None where it states none, or several.

    Forms are `The answer is (B).`, `Answer: B`, and a last line that is only the letter.
    """
    last_line = re.fullmatch(r"\W*([A-D])\W*", text.rstrip().rpartition("\n")[2])
    letters = {*_STATED.findall(text), *(last_line.groups() if last_line else ())}
    return letters.pop() if len(letters) == 1 else None


class Mmlu:
    """MMLU, 5-shot: 14,042 four-choice questions in 57 subjects; by log-probability."""

    name = "mmlu"
    version = f"1+{SHOTS}shot"  # lm-eval's version
    kind = "choose"
    chance = 0.25
    primary = "acc"
    domain = "knowledge"
    files = FILES
    hub_datasets = ("cais/mmlu",)
    _folder = "default"

    def hub_files(self) -> "Iterator[HubFile]":
        """Yield the files that `harness data fetch` writes; answers are positions in them."""
        # imported here, so that students do not depend on it (harness/planning/keys.py)
        from suites.loading.fetching import HubFile, json_lines

        def lines(split: Split) -> Iterator[str]:
            return json_lines(mmlu_rows(split, LocalOrHubData(), task=self.name))

        splits: tuple[Split, ...] = ("dev", "validation", "test")
        for split in splits:
            source = f"cais/mmlu all {split}"
            yield HubFile(f"mmlu/{_STEMS[split]}.jsonl.gz", source, partial(lines, split))

    def lm_eval_tasks(
        self, source: DataSource, subjects: Iterable[str] | None = None
    ) -> dict[str, Any]:
        """Return lm-eval's task of every subject, or of `subjects`, by its name there.

        A data folder has the subjects of its test file. Raises `HarnessError` for an unknown
        subject, and for one with fewer than five dev rows.
        """
        known_subjects = self.known_subjects()
        chosen_subjects = None if subjects is None else list(subjects)
        for subject in chosen_subjects or []:
            if subject not in known_subjects:
                raise unknown("subject of mmlu", subject, known_subjects)
        if source.folder is None:
            return self._from_hub(
                [
                    subject
                    for subject in known_subjects
                    if chosen_subjects is None or subject in chosen_subjects
                ]
            )
        test, dev = (
            _rows_by_subject(mmlu_rows(split, source, task=self.name)) for split in ("test", "dev")
        )
        tasks: dict[str, Any] = {}
        for subject in test:
            if chosen_subjects is not None and subject not in chosen_subjects:
                continue
            if subject not in known_subjects:
                raise unknown(
                    f"subject in {source.folder}/mmlu/test.jsonl:", subject, known_subjects
                )
            if len(dev.get(subject, [])) < SHOTS:
                raise HarnessError(
                    f"{source.folder}/mmlu/dev.jsonl holds {len(dev.get(subject, []))} rows of "
                    f"{subject}, and {SHOTS} are shown before each question; add the missing ones"
                )
            parts = {"test": test[subject], "dev": dev[subject]}
            base = self._base(subject)
            tasks[base["task"]] = build_task_over_rows(
                base, rows=parts.__getitem__, splits=parts, num_fewshot=SHOTS
            )
        return tasks

    def _from_hub(self, subjects: list[str]) -> dict[str, Any]:
        """Return lm-eval's tasks over the Hub's rows."""
        with explaining_hub_errors(self.name, data_dir_hint(FILES)):
            bases = [self._base(subject) for subject in subjects]
            return {base["task"]: build_task(base, num_fewshot=SHOTS) for base in bases}

    def _base(self, subject: str) -> dict[str, Any]:
        """Return lm-eval's definition of a subject."""
        return read_builtin(f"mmlu/{self._folder}/mmlu_{subject}.yaml")

    def known_subjects(self) -> list[str]:
        """Return the subjects that lm-eval has a template for, in alphabetical order."""
        return sorted(
            path.stem.removeprefix("mmlu_")
            for path in builtin_path(f"mmlu/{self._folder}").glob("mmlu_*.yaml")
        )

    def examples(self, split: Split, source: DataSource) -> Iterator[Example]:
        """Yield items without description and shots, the subjects in turn.

        Completion and bare answer are the same text. `train` is the Hub's auxiliary_train; with a
        data folder it raises `NoSplit`.
        """
        if split == "train":
            return map(self._example, _training_rows(source, task=self.name))
        groups = _rows_by_subject(mmlu_rows(split, source, task=self.name))
        return map(self._example, interleaved(list(groups.values())))

    def no_training(self, source: DataSource) -> str:
        """Return why there is nothing to train on; "" where there is."""
        return _no_training_rows(source) if source.folder is not None else ""

    def _example(self, row: Row) -> Example:
        gold = self._gold(row)
        return Example(
            task=self.name,
            prompt=self._prompt(row),
            completion=f" {gold}",
            answer=f" {gold}",
            gold=gold,
            ending=gold,
        )

    def _prompt(self, row: Row) -> str:
        lines = [
            f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True)
        ]
        return "\n".join([row["question"].strip(), *lines, "Answer:"])

    def _gold(self, row: Row) -> str:
        return LETTERS[row["answer"]]

    def grade(self, gold: str, text: str) -> tuple[Grade, ...]:
        """Grade a written answer by the bare letter, and by the letter that its text states.

        Scores come from log-probabilities instead.
        """
        bare_letter = text.strip() if text.strip() in tuple(LETTERS) else None
        letter_in_text = stated_letter(text)
        return (
            Grade(
                extractor=self.primary, extracted=bare_letter, correct=bare_letter == gold.strip()
            ),
            Grade(
                extractor="stated", extracted=letter_in_text, correct=letter_in_text == gold.strip()
            ),
        )


class MmluCloze(Mmlu):
    """MMLU, 5-shot, choices not shown: by the log-probability of each choice's text."""

    name = "mmlu-cloze"
    _folder = "continuation"

    def _prompt(self, row: Row) -> str:
        return f"Question: {row['question'].strip()}\nAnswer:"

    def _gold(self, row: Row) -> str:
        return str(row["choices"][row["answer"]])

    def grade(self, gold: str, text: str) -> tuple[Grade, ...]:
        """Grade a written answer by the choice's text; scores come from log-probabilities."""
        choice = text.strip() or None
        return (Grade(extractor=self.primary, extracted=choice, correct=choice == gold.strip()),)
