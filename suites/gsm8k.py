"""`gsm8k` and `gsm8k-cot`: grade-school word problems (Cobbe et al. 2021).

Definitions are lm-eval's own. Items come from `gsm8k/test.jsonl` and `gsm8k/train.jsonl` of the
data folder (plain or .gz), else from the Hub.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.contract import DataSource, Example, Grade, Split
from harness.data.source import LocalOrHubData, NoSplit, Row
from suites.loading.gold import final_number, without_marks
from suites.loading.lm_eval import (
    build_task,
    build_task_over_rows,
    data_dir_hint,
    explaining_hub_errors,
    hub_rows,
    read_builtin,
)
from suites.loading.splits import hold_out

if TYPE_CHECKING:
    from suites.loading.fetching import HubFile

FILES = ("gsm8k/train.jsonl.gz", "gsm8k/test.jsonl")
PUBLISHED = {"train": 7_473, "test": 1_319}
NEW_TOKENS = 512  # lm-eval's 256 cut 2 % of the gold answers themselves


class WrittenItem(NamedTuple):
    """An item in the form of a task."""

    prompt: str
    completion: str  # the solution with its answer
    answer: str  # the bare answer


def _row_error(row: Row) -> str | None:
    """Return what is wrong with a row; None where nothing is."""
    if not isinstance(row["question"], str) or not isinstance(row["answer"], str):
        return "question and answer must be texts"
    return (
        None
        if "#### " in row["answer"]
        else "the answer does not end in '#### N'; write its number so"
    )


def published_rows(split: str, source: DataSource, *, task: str) -> list[Row]:
    """Return `{question, answer}` of GSM8K's `train` or `test`; answers have calculator marks."""
    if source.folder is None:
        with explaining_hub_errors(task, data_dir_hint(FILES)):
            return [
                {"question": row["question"], "answer": row["answer"]}
                for row in hub_rows("openai/gsm8k", "main", split)
            ]
    rows = source.rows(
        f"gsm8k/{split}.jsonl",
        fields=("question", "answer"),
        expected=PUBLISHED[split],
        check=_row_error,
        wanted=FILES,
    )
    return [{"question": row["question"], "answer": row["answer"]} for row in rows]


def _hub_files() -> "Iterator[HubFile]":
    """Yield both splits of GSM8K, in the form in which the data folder has them."""
    # imported here, so that students do not depend on it (harness/planning/keys.py)
    from suites.loading.fetching import HubFile, json_lines

    def lines(split: str) -> Iterator[str]:
        return json_lines(published_rows(split, LocalOrHubData(), task="gsm8k"))

    for split in PUBLISHED:
        source = f"openai/gsm8k main {split}"
        yield HubFile(f"gsm8k/{split}.jsonl.gz", source, partial(lines, split))


def gsm8k_rows(split: Split, source: DataSource, *, task: str) -> list[Row]:
    """Return the rows of a split; `validation` is the end of GSM8K's train, never trained on.

    Raises `NoSplit` for `dev`.
    """
    if split == "dev":
        raise NoSplit(
            f"{task} has no dev split: its shots are fixed in its prompt; use train, validation or "
            "test"
        )
    if split == "test":
        return published_rows("test", source, task=task)
    rows = published_rows("train", source, task=task)
    return list(hold_out(rows, validation=split == "validation"))


def _lm_eval_task(
    name: str, yaml: str, source: DataSource, *, task: str, splits: Iterable[str], **changes: Any
) -> dict[str, Any]:
    """Build lm-eval's task of a YAML file under `name`, over the rows of these splits."""
    base = read_builtin(yaml)
    changes |= {"generation_kwargs": base["generation_kwargs"] | {"max_gen_toks": NEW_TOKENS}}
    if source.folder is None:
        with explaining_hub_errors(task, data_dir_hint(FILES)):
            return {name: build_task(base, **changes)}
    return {
        name: build_task_over_rows(
            base,
            rows=lambda split: published_rows(split, source, task=task),
            splits=splits,
            **changes,
        )
    }


def _examples(
    task: str, split: Split, source: DataSource, write: Callable[[str, str], WrittenItem]
) -> Iterator[Example]:
    """Yield examples; `write(question, solution)` returns prompt, completion and bare answer."""
    for row in gsm8k_rows(split, source, task=task):
        gold = final_number(row["answer"])
        prompt, completion, answer = write(row["question"], without_marks(row["answer"]))
        yield Example(
            task=task,
            prompt=prompt,
            completion=completion,
            answer=answer,
            gold=gold,
            ending=answer.strip(),
        )


class Gsm8k:
    """GSM8K, 5-shot: 1,319 grade-school word problems, answers ending in `#### N`; greedy."""

    name = "gsm8k"
    # lm-eval's version; its five shots fixed; new tokens at most
    version = f"3+first_n+{NEW_TOKENS}"
    kind = "generate"
    chance = 0.0
    primary = "strict-match"
    domain = "math"
    files = FILES
    hub_datasets = ("openai/gsm8k",)

    def hub_files(self) -> "Iterator[HubFile]":
        """Yield the files that `harness data fetch` writes."""
        return _hub_files()

    def lm_eval_tasks(self, source: DataSource) -> dict[str, Any]:
        """Return lm-eval's gsm8k; every item gets the first five training rows as its shots.

        lm-eval itself draws other shots for each item.
        """
        return _lm_eval_task(
            "gsm8k",
            "gsm8k/gsm8k.yaml",
            source,
            task=self.name,
            splits=("train", "test"),
            fewshot_config={"sampler": "first_n"},
        )

    def examples(self, split: Split, source: DataSource) -> Iterator[Example]:
        """Yield items without shots; solutions have no calculator marks and end in `#### N`.

        Raises `NoSplit` for `dev`.
        """
        return _examples(self.name, split, source, self._write)

    @staticmethod
    def _write(question: str, solution: str) -> WrittenItem:
        answer = f" #### {final_number(solution)}"
        return WrittenItem(f"Question: {question}\nAnswer:", f" {solution}", answer)

    def grade(self, gold: str, text: str) -> tuple[Grade, ...]:
        """Grade by `#### N` (strict), the last number (flexible) and numeric equality."""
        # imported here, so that students do not depend on it (harness/planning/keys.py)
        from suites.loading.numbers import grade_number

        return grade_number(gold, text)


class Gsm8kCot:
    """GSM8K, 8-shot chain of thought (Wei et al.), answers ending in `The answer is N.`; greedy."""

    name = "gsm8k-cot"
    version = f"3+{NEW_TOKENS}"  # lm-eval's version; new tokens at most
    kind = "generate"
    chance = 0.0
    primary = "strict-match"
    domain = "math"
    files = FILES
    hub_datasets = ("openai/gsm8k",)

    def hub_files(self) -> "Iterator[HubFile]":
        """Yield the files that `harness data fetch` writes."""
        return _hub_files()

    def lm_eval_tasks(self, source: DataSource) -> dict[str, Any]:
        """Return lm-eval's gsm8k_cot with its eight written shots."""
        return _lm_eval_task(
            "gsm8k_cot", "gsm8k/gsm8k-cot.yaml", source, task=self.name, splits=("test",)
        )

    def examples(self, split: Split, source: DataSource) -> Iterator[Example]:
        """Yield items without shots; solutions are one line that ends in `The answer is N.` .

        Raises `NoSplit` for `dev`.
        """
        return _examples(self.name, split, source, self._write)

    @staticmethod
    def _write(question: str, solution: str) -> WrittenItem:
        answer = f" The answer is {final_number(solution)}."
        steps = solution.rpartition("#### ")[0].splitlines()
        lines = [line.strip() for line in steps if line.strip()]
        completion = f" {' '.join(lines)}{answer}" if lines else answer
        return WrittenItem(f"Q: {question}\nA:", completion, answer)

    def grade(self, gold: str, text: str) -> tuple[Grade, ...]:
        """Grade by `The answer is N.` (strict), the last number (flexible) and numeric equality."""
        from suites.loading.numbers import SENTENCE, grade_number

        return grade_number(gold, text, strict_pattern=SENTENCE)
