"""Where tasks find their items, and the guard that keeps evaluation items out of training data."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from harness.checkpoint import digest_of
from harness.contract import Example, Split, Task
from harness.errors import HarnessError


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Where real benchmarks are read from: a local folder, else the Hub. Generated tasks need neither."""

    folder: Path | None = None

    @classmethod
    def from_environment(cls, folder: str | None = None) -> "DataSource":
        """Use `--data-dir`, else `$HARNESS_DATA_DIR`, else no folder."""
        given = folder or os.environ.get("HARNESS_DATA_DIR")
        if given and not Path(given).is_dir():
            raise HarnessError(f"no data folder at {given}; give --data-dir a folder that holds gsm8k/ and mmlu/")
        return cls(folder=Path(given) if given else None)


def examples_of(tasks: Mapping[str, Task], split: Split, source: DataSource, *, rows: int) -> list[Example]:
    """Take `rows` items of a split, in equal parts from every task, interleaved and in fixed order."""
    share, rest = divmod(rows, len(tasks))
    parts = [
        list(islice(task.examples(split, source), share + (index < rest))) for index, task in enumerate(tasks.values())
    ]  # fmt: skip
    taken = [example for group in _zip_all(parts) for example in group]
    if not taken:
        raise HarnessError(f"the {split} split of {', '.join(tasks)} holds no item")
    return taken


def _zip_all(parts: list[list[Example]]) -> Iterator[list[Example]]:
    for index in range(max(map(len, parts))):
        yield [part[index] for part in parts if index < len(part)]


def training_examples(tasks: Mapping[str, Task], source: DataSource, *, rows: int) -> list[Example]:
    """Return the training items, refused if one of them is an evaluation item of the same tasks."""
    taken = examples_of(tasks, "train", source, rows=rows)
    for name, task in tasks.items():
        held_out = {example.prompt for split in ("validation", "test") for example in task.examples(split, source)}
        shared = [example.prompt for example in taken if example.prompt in held_out]
        if shared:
            raise HarnessError(f"{len(shared)} evaluation items of {name} stand in the training data, for example {shared[0][:80]!r}")
    return taken


def examples_digest(examples: Iterable[Example]) -> str:
    """Return the content digest of training items, in order."""
    return digest_of([(example.task, example.prompt, example.completion, example.gold) for example in examples])
