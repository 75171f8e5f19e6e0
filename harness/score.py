"""Scores a model on tasks through lm-eval's own machinery, and keeps one row per item.

lm-eval builds the prompts, runs its filters and its metric; we answer its requests (`harness/lm.py`), add the
numeric extractor and the diagnostics, and derive every figure from the rows. Neither of lm-eval's caches is used.
"""

import json
import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from harness.checkpoint import digest_of
from harness.contract import Progress, Task
from harness.data import DataSource
from harness.errors import CellFailed
from harness.model import LanguageModel
from harness.record import TaskScore


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
    log_probabilities: tuple[float, ...] = ()  # of the choices, in their order


def score_task(
    opened: LanguageModel,
    task: Task,
    source: DataSource,
    *,
    batch_size: int,
    progress: Callable[[Progress], None],
    limit: int | None = None,
) -> tuple[TaskScore, list[ItemRow]]:
    """Score one task, or a seeded sample of `limit` of its items; return its figures and its rows, in item order."""
    from lm_eval.evaluator import evaluate

    from harness.lm import PlainLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    built = task.lm_eval_task(source)
    numbers = list(range(len(built.eval_docs)))
    if limit is not None and limit < len(numbers):
        numbers = sample([_group(doc) for doc in built.eval_docs], limit, name=task.name)
        split = built.config.test_split
        built.dataset[split] = built.dataset[split].select(numbers)
    items = len(numbers)
    total = items * (1 if task.kind == "generate" else 4)
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        progress(Progress(stage="score", done=done, total=total, unit="requests", detail=task.name))

    model = PlainLM(opened, batch_size=batch_size, progress=report)
    began = time.perf_counter()
    result = evaluate(model, {task.name: built}, bootstrap_iters=0, log_samples=True)
    seconds = time.perf_counter() - began
    assert result is not None and model.requests, "lm-eval returned without asking the model"
    rows = [replace(row, item=numbers[row.item]) for row in _rows(task, result["samples"][task.name], model)]
    if len(rows) != items:
        raise CellFailed(f"{task.name}: {items} items were asked and {len(rows)} came back")
    return summarise(task, rows, seconds=seconds), rows


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


def _rows(task: Task, samples: Iterable[dict[str, Any]], model: Any) -> list[ItemRow]:
    """Join lm-eval's samples (one per item and filter) into one row per item."""
    by_item: dict[int, list[dict[str, Any]]] = {}
    for sample in samples:
        by_item.setdefault(int(sample["doc_id"]), []).append(sample)
    return [_row(task, item, by_item[item], model) for item in sorted(by_item)]


def _row(task: Task, item: int, samples: list[dict[str, Any]], model: Any) -> ItemRow:
    first = samples[0]
    doc = first["doc"]
    base = {
        "task": task.name,
        "item": item,
        "group": _group(doc),
        "doc_hash": first["doc_hash"],
        "prompt_hash": first["prompt_hash"],
        "target_hash": first["target_hash"],
    }
    if task.kind == "choose":
        log_probabilities = tuple(float(pair[0]) for pair in first["filtered_resps"])
        chosen = max(range(len(log_probabilities)), key=lambda i: (log_probabilities[i], -i))  # a true tie: the lower index
        choices = [str(request[1]).strip() for request in first["arguments"]]
        return ItemRow(
            **base,
            gold=choices[int(first["target"])],
            text=choices[chosen],
            extracted={task.primary: choices[chosen]},
            correct={task.primary: bool(first["acc"])},
            tokens=0,
            stop="",
            log_probabilities=log_probabilities,
        )
    written = model.generations[task.name, item]
    gold = str(first["target"]).rpartition("#### ")[2].strip()
    grades = {grade.extractor: grade for grade in task.grade(gold, written.text)}
    upstream = {sample["filter"]: bool(sample["exact_match"]) for sample in samples}  # lm-eval's verdict, where it has one
    return ItemRow(
        **base,
        gold=gold,
        text=written.text,
        extracted={name: grade.extracted for name, grade in grades.items()},
        correct={name: upstream.get(name, grade.correct) for name, grade in grades.items()},
        tokens=written.tokens,
        stop=written.stop,
    )


def summarise(task: Task, rows: Sequence[ItemRow], *, seconds: float) -> TaskScore:
    """Derive a task's figures from its rows."""
    count = len(rows)
    extractors = list(rows[0].correct)
    outcomes = {name: "".join("1" if row.correct[name] else "0" for row in rows) for name in extractors}
    groups = sorted({row.group for row in rows})
    primary = outcomes[task.primary]
    value = primary.count("1") / count
    return TaskScore(
        task=task.name,
        version=task.version,
        kind=task.kind,
        primary=task.primary,
        chance=task.chance,
        n=count,
        value=value,
        stderr=math.sqrt(value * (1 - value) / count),
        outcomes=outcomes,
        items_digest=digest_of([(row.item, row.doc_hash, row.prompt_hash, row.target_hash) for row in rows]),
        answers_digest=digest_of([row.text for row in rows]),
        groups={group: _share([row.correct[task.primary] for row in rows if row.group == group]) for group in groups if len(groups) > 1},
        invalid_share=_share([row.extracted[task.primary] is None for row in rows]),
        truncated_share=_share([row.stop == "length" for row in rows]) if task.kind == "generate" else None,
        tokens_per_answer=sum(row.tokens for row in rows) / count if task.kind == "generate" else None,
        seconds=seconds,
    )


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)


def write_rows(path: Path, rows: Iterable[ItemRow]) -> None:
    """Write item rows as JSON lines."""
    path.write_text("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
