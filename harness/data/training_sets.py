"""Training data of one's own: files of JSON lines, or data sets of the Hub. No torch.

A line has `prompt` and `completion` (and, where there is a short form of it, `answer`), or
`messages`, or `text`. A set takes the place of the tasks' own train splits: methods read it as they
read a task's. It is never scored.
"""

import hashlib
import json
import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from harness.contract import DataSource, Example, Grade, Kind, Split, Task
from harness.data.contamination import evaluation_items
from harness.data.examples import identity_of
from harness.data.source import NoSplit, numbered_rows
from harness.errors import HarnessError, in_one_line

FORMS = "prompt and completion, messages, or text"
HELD_OUT_SHARE, MOST_HELD_OUT = 20, 500  # one row of so many is for validation, and at most so many
ROLES = ("system", "user", "assistant", "tool")
_HUB = re.compile(r"\w[\w.-]*/(?!.*\.(jsonl?|gz|txt|parquet|csv)$)[\w.-]+(:[\w.-]+)?")
PREFIX = "own:"  # of a set's name, as records have it

Row = Mapping[str, Any]


class NumberedRow(NamedTuple):
    """A row of a data set and where it stands, for errors."""

    where: str
    row: Row


@dataclass(frozen=True)
class TrainingSet:
    """One data set of `--train-data`, with its share among several."""

    place: str  # a file, or a data set of the Hub (ORG/NAME or ORG/NAME:SPLIT)
    weight: float = 1.0
    # the tasks that are scored: an example that holds an item of theirs is not trained on
    evaluated: Mapping[str, Task] = field(default_factory=dict, compare=False)
    overlap: Literal["drop", "refuse"] = "drop"
    # texts that another set holds out for validation
    held_out_elsewhere: Container[str] = field(default=frozenset(), compare=False)

    # What a task declares (harness.contract.Task); nothing of a set is scored.
    version = "1"
    kind: Kind = "generate"
    chance = 0.0
    primary = "none"
    domain = "own"
    has_grader = False

    @property
    def name(self) -> str:
        """The name that records and tables have: `own:` and the file's or data set's."""
        return PREFIX + (Path(self.place).name if self.is_file else self.place)

    @property
    def is_file(self) -> bool:
        """Tell whether it is a file and not a data set of the Hub."""
        return Path(self.place).exists() or not _HUB.fullmatch(self.place)

    @cached_property
    def _found(self) -> dict[str, Mapping[int, str]]:
        return {}  # what was looked for once

    @property
    def digest(self) -> str:
        """What keys and records hold of a set: the digest of its contents."""
        return self.content_digest

    @cached_property
    def content_digest(self) -> str:
        """The sha256 of every example in order."""
        total = hashlib.sha256()
        for example in self._examples:
            fields = (example.prompt, example.completion, example.answer, example.conversation)
            total.update(json.dumps(fields).encode() + b"\n")
        return total.hexdigest()

    @cached_property
    def _examples(self) -> tuple[Example, ...]:
        rows = _file_rows(Path(self.place)) if self.is_file else _hub_rows(self.place)
        return tuple(
            example for where, row in rows for example in examples_of_row(row, self.name, where)
        )

    @cached_property
    def _held_out(self) -> frozenset[int]:
        """The indices of the validation examples, in whatever order the file has them.

        These are the examples of a twentieth of the prompts, those with the smallest digests.
        """
        texts = [identity_of(example) for example in self._examples]
        by_digest = sorted(
            set(texts),
            key=lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(),
        )
        if len(by_digest) < 2:
            raise HarnessError(
                f"{self.place} holds {len(by_digest)} examples of different prompts; two are "
                "needed at least, one of them for validation"
            )
        count = min(MOST_HELD_OUT, math.ceil(len(by_digest) / HELD_OUT_SHARE))
        held_out = set(by_digest[:count])
        return frozenset(index for index, text in enumerate(texts) if text in held_out)

    @property
    def held_out_texts(self) -> frozenset[str]:
        """The prompts (or texts that have none) of the validation examples."""
        return frozenset(identity_of(self._examples[index]) for index in self._held_out)

    @property
    def location(self) -> str:
        """The same set from any working directory: a file's whole path."""
        return str(Path(self.place).absolute()) if self.is_file else self.place

    def __len__(self) -> int:
        """Return the number of its examples, whatever becomes of them."""
        return len(self._examples)

    def _dropped(self, source: DataSource) -> Mapping[int, str]:
        """Return which examples hold an item that is scored: index -> task.

        Raises `HarnessError` for the first one where such examples are refused.
        """
        if "dropped" not in self._found:
            items = evaluation_items(self._examples, self.evaluated, source)
            if items and self.overlap == "refuse":
                index, task = next(iter(items.items()))
                example = self._examples[index]
                text = " ".join((example.prompt or example.completion).split())
                raise HarnessError(
                    f"{len(items):,} of {len(self._examples):,} examples of {self.place} hold "
                    f"evaluation items, the first one of {task}: {text[:80]!r}; remove them, or "
                    "type --overlap drop"
                )
            self._found["dropped"] = items
        return self._found["dropped"]

    def counts(self, source: DataSource) -> dict[str, int]:
        """Return what became of the examples: trained on, held out, dropped."""
        dropped = self._dropped(source)
        held_out = len(self._held_out - set(dropped))
        return {
            "train": len(self._examples) - held_out - len(dropped),
            "validation": held_out,
            "dropped_for_evaluation_text": len(dropped),
        }

    def examples(self, split: Split, source: DataSource) -> Iterator[Example]:
        """Yield the training or the validation examples in the file's order.

        Those that hold an item of the `evaluated` tasks are left out. Raises `NoSplit` for `test`
        and `dev`, and `HarnessError` for a row of another form.
        """
        if split not in ("train", "validation"):
            raise NoSplit(f"{self.name} has no {split} split: it is trained on, never scored")
        dropped = self._dropped(source)
        for index, example in enumerate(self._examples):
            if index in dropped or (index in self._held_out) != (split == "validation"):
                continue
            if split == "validation" or identity_of(example) not in self.held_out_elsewhere:
                yield example

    def all_examples(self, source: DataSource) -> Iterator[Example]:
        """Yield the training and the validation examples: what a calibration reads."""
        dropped = self._dropped(source)
        for index, example in enumerate(self._examples):
            if index not in dropped:
                yield example

    def lm_eval_tasks(self, source: DataSource) -> dict[str, Any]:
        """Return nothing: a set is never scored."""
        return {}

    def grade(self, gold: str, text: str) -> tuple[Grade, ...]:
        """Refuse: nobody has said when an answer to a prompt of this set is right."""
        raise HarnessError(
            f"{self.name} says of no answer whether it is right; use a method that needs no grader "
            "(sft, response, cot-unfiltered)"
        )


def _file_rows(path: Path) -> Iterator[NumberedRow]:
    for number, row in numbered_rows(path):
        yield NumberedRow(f"{path}, line {number}", row)


def _hub_rows(place: str) -> Iterator[NumberedRow]:
    """Yield the rows of a data set of the Hub; its `train` split where none is named."""
    from datasets import load_dataset

    name, _, split = place.partition(":")
    try:
        rows = load_dataset(name, split=split or "train")
    except Exception as problem:  # whatever stops a download, or a builder of the data set
        raise HarnessError(
            f"{place}: the data set cannot be read from the Hugging Face Hub "
            f"({in_one_line(problem)}); give a file of JSON lines in its place"
        ) from problem
    for number, row in enumerate(rows):
        yield NumberedRow(f"{place}, row {number}", row)


def examples_of_row(row: Row, name: str, where: str) -> list[Example]:
    """Return the examples of a row: one, or one for each answer of the assistant in a conversation.

    Raises `HarnessError` with `where` and the field for a row of another form.
    """
    row = {name: value for name, value in row.items() if value is not None}
    if "messages" in row:
        return _of_messages(row["messages"], name, where)
    if "prompt" in row and "completion" in row:
        prompt, completion = _text(row, "prompt", where), _text(row, "completion", where)
        answer = _text(row, "answer", where) if "answer" in row else ""
        return [_example(name, prompt, completion, answer=answer)]
    if "text" in row:
        return [_example(name, "", _text(row, "text", where))]
    missing = "completion" if "prompt" in row else "prompt" if "completion" in row else ""
    problem = f"the field {missing} is missing" if missing else f"its fields are {_fields(row)}"
    raise HarnessError(f"{where}: {problem}; every line has {FORMS}")


def _fields(row: Row) -> str:
    return ", ".join(str(name) for name in list(row)[:6]) or "none"


def _example(
    name: str,
    prompt: str,
    completion: str,
    *,
    answer: str = "",
    conversation: tuple[tuple[str, str], ...] = (),
) -> Example:
    return Example(
        task=name,
        prompt=prompt,
        completion=completion,
        answer=answer,
        gold=answer,
        conversation=conversation,
    )


def _text(row: Row, field: str, where: str) -> str:
    """Return a field that must hold text."""
    value = row[field]
    if not isinstance(value, str):
        raise HarnessError(
            f"{where}: the field {field} holds {type(value).__name__}, and must hold text"
        )
    if not value.strip() and field != "prompt":
        raise HarnessError(f"{where}: the field {field} is empty; remove the line")
    return value


def _of_messages(messages: Any, name: str, where: str) -> list[Example]:
    """Return an example for each turn of the assistant, whose prompt is all that stands before."""
    turns = _turns(messages, where)
    examples = []
    for index, (role, content) in enumerate(turns):
        if role == "assistant":
            before = turns[:index]
            prompt = "\n".join(f"{role}: {content}" for role, content in before)
            examples.append(_example(name, prompt, content, conversation=before))
    if not examples:
        raise HarnessError(f"{where}: no message is the assistant's, so nothing would be trained")
    return examples


def _turns(messages: Any, where: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise HarnessError(
            f'{where}: the field messages must be a list such as [{{"role": "user", "content": '
            '"..."}, {"role": "assistant", "content": "..."}]'
        )
    turns = []
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        content = message.get("content") if isinstance(message, Mapping) else None
        if role not in ROLES or not isinstance(content, str):
            raise HarnessError(
                f"{where}: messages[{index}] must have a role ({', '.join(ROLES)}) and a content "
                "that is text"
            )
        turns.append((role, content))
    if turns[0][0] == "assistant":
        raise HarnessError(f"{where}: the first message is the assistant's; nobody has asked yet")
    return tuple(turns)
