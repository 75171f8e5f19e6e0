"""Scores a model on tasks through lm-eval's own machinery, and keeps one row per item.

lm-eval builds the prompts, runs its filters and its metric; we answer its requests (`harness/lm.py`), add the
numeric extractor and the diagnostics, and derive every figure from the rows. Neither of lm-eval's caches is used:
ours is a journal keyed by what the model is and what it was asked.
"""

import logging
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.checkpoint import digest_of, file_digest
from harness.contract import Progress, Prompting, Task
from harness.data import DataSource
from harness.errors import CellFailed
from harness.generate import BatchSize
from harness.journal import Journal
from harness.lines import json_lines, write_json_lines
from harness.model import LanguageModel
from harness.record import TaskScore

if TYPE_CHECKING:
    from harness.lm import Backend

PLAIN_TEXT = Prompting()


@dataclass(frozen=True, kw_only=True)
class ItemRow:
    """What one model made of one item: the truth from which every figure is derived."""

    task: str
    item: int
    group: str  # subject, or number of steps: what a breakdown is made by
    doc_hash: str
    prompt_hash: str
    target_hash: str
    gold: str
    text: str  # what was written, or the chosen letter
    extracted: dict[str, str | None]
    correct: dict[str, bool]
    tokens: int  # written, the ending one included; 0 for a choice
    stop: str  # eos, stop, length, or "" for a choice
    log_probabilities: tuple[float, ...] = ()  # of the choices, in their order; of a document, one
    prompt: str = ""  # what was shown, for teacher-forced comparisons; of a choice its last part, without the shots
    words: float = 0.0  # of a document
    position: int | None = None  # of the chosen choice


def score_task(
    opened: LanguageModel,
    task: Task,
    source: DataSource,
    *,
    progress: Callable[[Progress], None],
    batch_size: BatchSize = "auto",
    limit: int | None = None,
    prompting: Prompting = PLAIN_TEXT,
    cache: Path | None = None,
    backend: "Backend | None" = None,
) -> tuple[TaskScore, list[ItemRow]]:
    """Score one task, or a seeded sample of `limit` of its items; return its figures and its rows, in item order.

    With a `cache` folder every answer is kept as it comes, and none is computed twice, whatever killed the last try.
    """
    from lm_eval.evaluator import evaluate

    from harness.lm import HarnessLM, Transformers

    backend = backend or Transformers(opened, batch_size)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    built = task.lm_eval_tasks(source)
    numbers = _sampled(built, limit, name=task.name)
    items = sum(map(len, numbers.values()))
    if not items:
        raise CellFailed(f"{task.name}: there is no item to score")
    total = items
    done = 0

    def report(count: int) -> None:
        nonlocal done, total
        done += count
        total = max(total, done)
        progress(Progress(stage="score", done=done, total=total, unit="requests", detail=task.name))

    journal = Journal(journal_path(opened, task, prompting, cache, path=backend.path) if cache else None)
    model = HarnessLM(
        opened, backend=backend, journal=journal, progress=report,
        say=lambda line: progress(Progress(stage="score", done=done, total=total, unit="requests", detail=line)),
    )  # fmt: skip
    total = items * _choices(built) if task.kind == "choose" else items
    result = evaluate(
        model, built, bootstrap_iters=0, log_samples=True, apply_chat_template=prompting.chat, fewshot_as_multiturn=prompting.chat,
        system_instruction=prompting.system,
    )  # fmt: skip
    assert result is not None and model.requests, "lm-eval returned without asking the model"
    rows = [
        row for name in built for row in _rows(task, name, result["samples"][name], numbers[name], model)
    ]  # fmt: skip
    rows.sort(key=lambda row: row.item)
    if len(rows) != items:
        raise CellFailed(f"{task.name}: {items} items were asked and {len(rows)} came back")
    return summarise(task, rows, model=model), rows


def journal_path(opened: LanguageModel, task: Task, prompting: Prompting, cache: Path, *, path: str) -> Path:
    """Name the journal of one model on one task: weights, tokenizer, dtype, device, path, its code and the task's version."""
    here = Path(__file__).parent
    code = [file_digest(here / name) for name in ("lm.py", "likelihood.py", "generate.py", "sharing.py", "journal.py", "vllm.py")]
    key = digest_of(
        opened.checkpoint.digest, str(opened.model.dtype), opened.device.partition(":")[0], path, code, task.name, task.version,
        asdict(prompting),
    )  # fmt: skip
    return cache / "answers" / key[:2] / f"{key[:32]}.jsonl"


def _choices(built: Mapping[str, Any]) -> int:
    first = next(iter(built.values()))
    return len(first.doc_to_choice(first.eval_docs[0])) if first.config.doc_to_choice is not None else 1


def _sampled(built: Mapping[str, Any], limit: int | None, *, name: str) -> dict[str, list[int]]:
    """Return each lm-eval task's item numbers, counted through all of them, and cut its documents to a sample."""
    owners = [(key, index, _group(doc)) for key, one in built.items() for index, doc in enumerate(one.eval_docs)]
    if limit is None or limit >= len(owners):
        taken = list(range(len(owners)))
    else:
        taken = sample([group for _, _, group in owners], limit, name=name)
    numbers: dict[str, list[int]] = {key: [] for key in built}
    local: dict[str, list[int]] = {key: [] for key in built}
    for number in taken:
        key, index, _ = owners[number]
        numbers[key].append(number)
        local[key].append(index)
    for key, one in list(built.items()):
        if not local[key]:
            if isinstance(built, dict):
                del built[key]
            continue
        if len(local[key]) < len(one.eval_docs):
            split = one.config.test_split or one.config.validation_split
            one.dataset[split] = one.dataset[split].select(local[key])
    return {key: numbers[key] for key in built}


def _group(doc: Mapping[str, Any]) -> str:
    """Return what an item is broken down by: its subject, or its number of steps."""
    return str(doc.get("subject", doc.get("steps", "")))


def sample(groups: Sequence[str], count: int, *, name: str) -> list[int]:
    """Draw `count` item numbers, the same ones for every model, spread over the groups as evenly as they allow."""
    draw = random.Random(f"limit/{name}")
    waiting: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        waiting.setdefault(group, []).append(number)
    for members in waiting.values():
        draw.shuffle(members)
    taken: list[int] = []
    while len(taken) < min(count, len(groups)):
        taken += [members.pop() for members in waiting.values() if members][: count - len(taken)]
    return sorted(taken)


def _rows(task: Task, name: str, samples: Iterable[dict[str, Any]], numbers: Sequence[int], model: Any) -> list[ItemRow]:
    """Join lm-eval's samples (one per item and filter) into one row per item."""
    by_item: dict[int, list[dict[str, Any]]] = {}
    for one in samples:
        by_item.setdefault(int(one["doc_id"]), []).append(one)
    make = {"choose": _chosen, "generate": _written, "perplexity": _read}[task.kind]
    return [make(task, name, item, numbers[item], by_item[item], model) for item in sorted(by_item)]


def _base(task: Task, number: int, first: dict[str, Any]) -> dict[str, Any]:
    return {
        "task": task.name, "item": number, "group": _group(first["doc"]), "doc_hash": first["doc_hash"],
        "prompt_hash": first["prompt_hash"], "target_hash": first["target_hash"],
    }  # fmt: skip


def _chosen(task: Task, name: str, item: int, number: int, samples: list[dict[str, Any]], model: Any) -> ItemRow:
    first = samples[0]
    log_probabilities = tuple(float(pair[0]) for pair in first["filtered_resps"])
    chosen = max(range(len(log_probabilities)), key=lambda i: (log_probabilities[i], -i))  # a true tie: the lower index
    choices = [str(request[1]).strip() for request in first["arguments"]]
    target = first["target"]
    correct: dict[str, bool] = {metric: bool(first[metric]) for metric in ("acc", "acc_norm") if metric in first}
    return ItemRow(
        **_base(task, number, first),
        gold=choices[int(target)] if str(target).isdigit() and int(target) < len(choices) else str(target),
        text=choices[chosen],
        extracted=dict.fromkeys(correct, choices[chosen]),
        correct=correct,
        tokens=0,
        stop="",
        log_probabilities=log_probabilities,
        position=chosen,
        prompt=str(first["arguments"][0][0]).rpartition("\n\n")[2],
    )


def _written(task: Task, name: str, item: int, number: int, samples: list[dict[str, Any]], model: Any) -> ItemRow:
    first = samples[0]
    written = model.generations[name, item]
    target = str(first["target"])
    gold = target.rpartition("#### ")[2].strip()
    grades = {grade.extractor: grade for grade in task.grade(gold, written.text)}
    metric = getattr(task, "metric", "exact_match")
    upstream = {one["filter"]: bool(one[metric]) for one in samples if metric in one}  # lm-eval's verdict, where it has one
    return ItemRow(
        **_base(task, number, first),
        gold=gold,
        text=written.text,
        extracted={extractor: grade.extracted for extractor, grade in grades.items()},
        correct={extractor: upstream.get(extractor, grade.correct) for extractor, grade in grades.items()},
        tokens=written.tokens,
        stop=written.stop,
        prompt=str(first["arguments"][0][0]),
    )


def _read(task: Task, name: str, item: int, number: int, samples: list[dict[str, Any]], model: Any) -> ItemRow:
    first = samples[0]
    total, words = first[task.primary]
    return ItemRow(
        **_base(task, number, first), gold="", text="", extracted={}, correct={}, tokens=0, stop="", log_probabilities=(float(total),),
        words=float(words),
    )  # fmt: skip


def summarise(task: Task, rows: Sequence[ItemRow], *, model: Any) -> TaskScore:
    """Derive a task's figures from its rows; `model` is the one that answered, for its counts and for what its prompts say.

    Items are the same where the conversations are, whatever template each model is shown them in.
    """
    count = len(rows)
    asked = [model.conversations.get(row.prompt_hash, row.prompt_hash) for row in rows]
    shared = {
        "task": task.name, "version": task.version, "kind": task.kind, "primary": task.primary, "chance": task.chance, "n": count,
        "items_digest": digest_of([(row.item, row.doc_hash, text, row.target_hash) for row, text in zip(rows, asked, strict=True)]),
        "answers_digest": digest_of([row.text or row.log_probabilities for row in rows]),
        "cut_prompts": model.cut_prompts, "seconds": model.seconds, "from_journal": model.journal.read, "notes": tuple(model.notes),
    }  # fmt: skip
    if task.kind == "perplexity":
        totals = tuple((row.log_probabilities[0], row.words) for row in rows)
        perplexity = math.exp(-sum(total for total, _ in totals) / sum(words for _, words in totals))
        return TaskScore(**shared, value=perplexity, stderr=None, outcomes={}, totals=totals, invalid_share=0.0)
    extractors = list(rows[0].correct)
    outcomes = {name: "".join("1" if row.correct[name] else "0" for row in rows) for name in extractors}
    value = outcomes[task.primary].count("1") / count
    groups = sorted({row.group for row in rows})
    by_group = {group: _share([row.correct[task.primary] for row in rows if row.group == group]) for group in groups if len(groups) > 1}
    most = max((len(row.log_probabilities) for row in rows), default=0)
    chosen = {chr(ord("A") + at): _share([row.position == at for row in rows]) for at in range(most)} if task.kind == "choose" else {}
    return TaskScore(
        **shared,
        value=value,
        stderr=math.sqrt(value * (1 - value) / count),
        outcomes=outcomes,
        groups=by_group,
        macro=sum(by_group.values()) / len(by_group) if by_group else None,
        chosen=chosen,
        invalid_share=_share([row.extracted[task.primary] is None for row in rows]),
        truncated_share=_share([row.stop == "length" for row in rows]) if task.kind == "generate" else None,
        tokens_per_answer=sum(row.tokens for row in rows) / count if task.kind == "generate" else None,
    )


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)


def write_rows(path: Path, rows: Iterable[ItemRow]) -> None:
    """Write item rows as JSON lines."""
    write_json_lines(path, map(asdict, rows))


def read_rows(path: Path) -> list[ItemRow]:
    """Read what `write_rows` wrote."""
    return [ItemRow(**{**one, "log_probabilities": tuple(one["log_probabilities"])}) for one in json_lines(path)]
