"""Where tasks find their items, and the guard that keeps evaluation items out of training data."""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from harness.contract import Example, Split, Task
from harness.errors import HarnessError
from harness.files.lines import lines_of
from harness.files.untrusted import LINE, Unreadable, parsed, text_of
from harness.models.checkpoint import digest_of

Row = dict[str, Any]
_LISTED = re.compile(r"\|\s*([\w./-]+)\s*\|\s*([\d,]{1,15})\b")  # a line of a manifest's `| file | rows |` table


C4 = "c4_demo/c4_demo.jsonl.gz"  # free text of a data folder, for calibration where tasks have no train split


class NoSplit(HarnessError):
    """A task has no such split, or none that may be trained on."""


def _plain(tokenizer: Any, prompt: str) -> str:
    return prompt


def _as_it_is(example: Example) -> Example:
    return example


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Where real benchmarks are read from: a local folder, else the Hub. Generated tasks need neither.

    Files are named relative to the folder; `x.jsonl` and `x.jsonl.gz` are the same file in either form.
    """

    folder: Path | None = None
    render: Callable[[Example], Example] = field(default=_as_it_is, compare=False)  # what the student is shown, e.g. by its chat template
    show: Callable[[Any, str], str] = field(default=_plain, compare=False)  # (tokenizer, plain prompt) -> what a model with it is shown

    @classmethod
    def from_environment(cls, folder: str | None = None) -> "DataSource":
        """Use `--data-dir`, else `$HARNESS_DATA_DIR`, else no folder."""
        given = folder or os.environ.get("HARNESS_DATA_DIR")
        if given and not Path(given).is_dir():
            raise HarnessError(f"no data folder at {given}; give --data-dir a folder that holds gsm8k/ and mmlu/")
        return cls(folder=Path(given) if given else None)

    def file(self, relative: str, *, wanted: Sequence[str] = ()) -> Path:
        """Return the path of a file in plain or packed form; `wanted` are the files that an error asks for."""
        asked = " and ".join(wanted or (relative,))
        if self.folder is None:
            raise HarnessError(f"no data folder to read {relative} from; give --data-dir a folder with {asked}")
        plain = relative.removesuffix(".gz")
        for name in (plain, f"{plain}.gz"):
            if (self.folder / name).is_file():
                return self.folder / name
        raise HarnessError(f"the data folder {self.folder} holds neither {plain} nor {plain}.gz; give --data-dir a folder with {asked}")

    def rows(
        self,
        relative: str,
        *,
        fields: Sequence[str],
        expected: int | None = None,
        check: Callable[[Row], str | None] | None = None,
        wanted: Sequence[str] = (),
    ) -> list[Row]:
        """Read the rows of a JSON-lines file, parsed once per process.

        `expected` is the published number of rows, told in errors; a smaller set of one's own is accepted unless the
        folder's MANIFEST.md lists more rows. `check` returns what is wrong with a row, or None. Raises `HarnessError`
        for a missing, cut, empty or malformed file, with the line.
        """
        path = self.file(relative, wanted=wanted)
        parsed, whole = _parsed(path, *_stamp(path))
        self._check_count(path, relative, len(parsed), whole=whole, expected=expected, unit="rows")
        for number, row in parsed:
            missing = [name for name in fields if name not in row]
            if missing:
                raise HarnessError(f"{path}, line {number}: no field {missing[0]!r}; every line is an object with {', '.join(fields)}")
            problem = check(row) if check else None
            if problem:
                raise HarnessError(f"{path}, line {number}: {problem}")
        return [row for _, row in parsed]

    def text(self, relative: str, *, expected: int | None = None, wanted: Sequence[str] = ()) -> str:
        """Read a whole text file, `expected` lines long as published, with plain newlines; the same errors as `rows`."""
        path = self.file(relative, wanted=wanted)
        data, whole = _unpacked(path)
        found = _decoded(path, data).replace("\r\n", "\n")
        self._check_count(path, relative, found.count("\n"), whole=whole, expected=expected, unit="lines")
        return found

    def fingerprint(self, files: Iterable[str]) -> str:
        """Return the sha256 over names and unpacked bytes of files, the same for plain and packed ones; "" without a folder."""
        if self.folder is None:
            return ""
        parts = [(name.removesuffix(".gz"), _bytes_digest(path, *_stamp(path))) for name in sorted(files) for path in [self.file(name)]]
        return digest_of(parts)

    def _check_count(self, path: Path, relative: str, found: int, *, whole: bool, expected: int | None, unit: str) -> None:
        listed = _manifest(path.parents[relative.count("/")]).get(relative.removesuffix(".gz"))
        told = listed if listed is not None else expected
        wished = f"{told:,} expected" if told is not None else "at least one expected"
        if not whole:
            raise HarnessError(f"{path} is cut short or damaged: {found:,} {unit} found and {wished}; copy the file again")
        if found == 0 or (listed is not None and found < listed):
            by = "by MANIFEST.md beside it" if listed is not None else "in it"
            raise HarnessError(f"{path}: {found:,} {unit} found and {wished} {by}; copy the file again, or correct the manifest")


def _stamp(path: Path) -> tuple[int, int]:
    """Return what changes when a file does: it keys the caches of this module."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _unpacked(path: Path) -> tuple[bytes, bool]:
    """Return a file's bytes, unpacked where its name ends in .gz, and whether they are all there."""
    rest = path.read_bytes()
    if path.suffix != ".gz":
        return rest, True
    parts: list[bytes] = []
    while rest:
        member = zlib.decompressobj(wbits=31)  # by hand, and not by `gzip`: it tells how far a cut file reaches
        try:
            parts.append(member.decompress(rest))
        except zlib.error:
            return b"".join(parts), False
        if not member.eof:
            return b"".join(parts), False
        rest = member.unused_data
    return b"".join(parts), bool(parts)


def _decoded(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as problem:
        line = data.count(b"\n", 0, problem.start) + 1
        raise HarnessError(f"{path}, line {line}: not UTF-8 ({problem.reason}); save the file as UTF-8") from problem


@lru_cache(maxsize=16)
def _parsed(path: Path, size: int, changed: int) -> tuple[list[tuple[int, Row]], bool]:
    """Return `(line number, row)` of every line that is not blank, and whether the file was whole."""
    data, whole = _unpacked(path)
    if not whole:
        data = data[: data.rfind(b"\n") + 1]
    return [(number, _row(path, number, line)) for number, line in enumerate(_decoded(path, data).split("\n"), 1) if line.strip()], whole


def _row(path: Path, number: int, line: str) -> Row:
    try:
        row = parsed(line, f"{path}, line {number}", LINE, what="line")
    except Unreadable as problem:
        cause = problem.__cause__
        if not isinstance(cause, json.JSONDecodeError):
            raise
        raise HarnessError(f"{path}, line {number}: no JSON ({cause.msg} at column {cause.colno}); correct or remove it") from problem
    if not isinstance(row, dict):
        raise HarnessError(f"{path}, line {number}: {line.strip()[:40]!r} is no JSON object; every line is one, in braces")
    return row


@lru_cache(maxsize=64)
def _bytes_digest(path: Path, size: int, changed: int) -> str:
    data, whole = _unpacked(path)
    if not whole:
        raise HarnessError(f"{path} is cut short or damaged; copy the file again")
    return hashlib.sha256(data).hexdigest()


def _manifest(folder: Path) -> dict[str, int]:
    """Return rows by file, named without .gz, as the folder's MANIFEST.md lists them; empty without one."""
    path = folder / "MANIFEST.md"
    if not path.is_file():
        return {}
    found = (_LISTED.match(line) for line in lines_of(text_of(path)))
    return {line[1].removesuffix(".gz"): int(line[2].replace(",", "")) for line in found if line and line[2].strip(",")}


def examples_of(tasks: Mapping[str, Task], split: Split, source: DataSource, *, rows: int) -> list[Example]:
    """Take `rows` items of a split, in equal parts from every task, interleaved, in fixed order, rendered for the model.

    Tasks that measure perplexity have no training form and take no part.
    """
    return [source.render(example) for example in _taken(tasks, split, source, rows=rows)]


def _taken(tasks: Mapping[str, Task], split: Split, source: DataSource, *, rows: int) -> list[Example]:
    asked = [task for task in tasks.values() if task.kind != "perplexity"]
    if not asked:
        raise NoSplit(f"nothing to train on: {', '.join(tasks)} measures perplexity only; add a suite such as math")
    asked = _with_rows(asked, split, source)
    share, rest = divmod(rows, len(asked))
    taken = list(
        interleaved([list(islice(task.examples(split, source), share + (index < rest))) for index, task in enumerate(asked)])
    )  # fmt: skip
    if not taken:
        raise HarnessError(f"the {split} split of {', '.join(tasks)} holds no item")
    return taken


def _with_rows(asked: list[Task], split: Split, source: DataSource) -> list[Task]:
    """Return the tasks that take part: those with a train split, of which validation is held out too; raises `NoSplit` where none has one.

    Where no task can be trained on, the validation items of all of them are what there is.
    """
    reasons = {task.name: _without(task, "train", source) for task in asked}
    able = [task for task in asked if not reasons[task.name]]
    if able or split not in ("train", "validation"):
        return able if split in ("train", "validation") else asked
    if split == "train":
        raise NoSplit(next(iter(reasons.values())))
    return asked


def _without(task: Task, split: Split, source: DataSource) -> str:
    """Say why a task has no items of a split, "" where it has."""
    try:
        next(iter(task.examples(split, source)), None)
    except NoSplit as problem:
        return str(problem)
    return ""


def untrained(tasks: Mapping[str, Task], source: DataSource) -> dict[str, str]:
    """Return the tasks that no training row is of, though others give some, and why; those that only measure a perplexity left out."""
    return {name: why for name, task in tasks.items() if task.kind != "perplexity" and (why := _without(task, "train", source))}


def interleaved(parts: Sequence[Sequence[Any]]) -> Iterator[Any]:
    """Yield the first of every part, then the second of every part, and so on; short parts end early."""
    for index in range(max(map(len, parts), default=0)):
        yield from (part[index] for part in parts if index < len(part))


def training_examples(tasks: Mapping[str, Task], source: DataSource, *, rows: int) -> list[Example]:
    """Return the training items, refused if one of them is an evaluation item of the same tasks."""
    taken = _taken(tasks, "train", source, rows=rows)
    prompts = {example.prompt for example in taken}
    for name, task in tasks.items():
        shared = sorted(prompts & _held_out(task, source))
        if shared:
            raise HarnessError(f"{len(shared)} evaluation items of {name} stand in the training data, for example {shared[0][:80]!r}")
    return [source.render(example) for example in taken]


def _held_out(task: Task, source: DataSource) -> set[str]:
    """Return the prompts of a task's validation and test items, of those splits that it has."""
    prompts: set[str] = set()
    splits: tuple[Split, ...] = () if task.kind == "perplexity" else ("validation", "test")
    for split in splits:
        try:
            prompts.update(example.prompt for example in task.examples(split, source))
        except NoSplit:
            continue
    return prompts


def overlapping(examples: Iterable[Example], tasks: Mapping[str, Task], source: DataSource, *, words: int = 13) -> set[str]:
    """Return the prompts of examples that also stand in an evaluation split of their tasks.

    Found by equal text everywhere, by a shared run of `words` words only in data from outside: our generators share templates by design.
    The question alone is compared: shots stand before it in every prompt.
    """
    found: set[str] = set()
    for name, task in tasks.items():
        own = [example for example in examples if example.task == name]
        held_out = {_question(prompt) for prompt in _held_out(task, source)}
        runs = {run for text in held_out for run in _runs(text, words)} if getattr(task, "files", ()) else set()
        for example in own:
            question = _question(example.asked)  # as the task has it, not in a chat template
            if question in held_out or (runs and not runs.isdisjoint(_runs(question, words))):
                found.add(example.prompt)
    return found


def contaminated(texts: Sequence[str], tasks: Mapping[str, Task], source: DataSource, *, words: int = 13) -> tuple[set[int], list[str]]:
    """Return the indices of free texts that share a run of `words` words with evaluation text, and the tasks compared with.

    Questions and whole documents of tasks read from outside: in generated ones n-grams mean nothing.
    """
    outside = {name: task for name, task in tasks.items() if getattr(task, "files", ())}
    runs = {run for task in outside.values() for text in _evaluated(task, source) for run in _runs(text, words)}
    found = {at for at, text in enumerate(texts) if runs and not runs.isdisjoint(_runs(text, words))}
    return found, list(outside)


def _evaluated(task: Task, source: DataSource) -> Iterator[str]:
    """Yield a task's evaluation text: its questions, or the documents whose perplexity is measured."""
    if task.kind != "perplexity":
        yield from (_question(prompt) for prompt in _held_out(task, source))
    elif hasattr(task, "texts"):
        yield from task.texts(source)
    else:
        for one in task.lm_eval_tasks(source).values():
            yield from (str(one.doc_to_target(doc)) for doc in one.eval_docs)


def _question(prompt: str) -> str:
    """Return a prompt's last paragraph, in lower case and single spaces: what is asked, without shots."""
    return " ".join(prompt.strip().rsplit("\n\n", 1)[-1].lower().split())


def _runs(text: str, words: int) -> set[int]:
    """Return the hashes (this process's) of every run of so many words, in lower case and without what stands between them."""
    parts = re.findall(r"\w+", text.lower())
    return {hash(tuple(parts[at : at + words])) for at in range(len(parts) - words + 1)}


def examples_digest(examples: Iterable[Example]) -> str:
    """Return the content digest of training items, in order."""
    return digest_of([(example.task, example.prompt, example.completion, example.gold) for example in examples])
