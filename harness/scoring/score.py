"""Scores a model on tasks through lm-eval's own machinery, and keeps one row per item.

lm-eval builds the prompts, runs its filters and its metric; we answer its requests
(`harness/scoring/lm_eval_model.py`), add the numeric extractor and the diagnostics, and derive
every figure from the rows. Neither of lm-eval's caches is used: ours is a journal keyed by what the
model is and what it was asked.
"""

import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.contract import Progress, Prompting, Task
from harness.data.seeding import prepare_tasks, seeded_as_lm_eval
from harness.data.source import LocalOrHubData
from harness.errors import CellFailed
from harness.files.closure import code_digest
from harness.files.digests import digest_of
from harness.machine.gpu import device_label
from harness.models.language_model import LanguageModel
from harness.records.record import TaskScore
from harness.scoring.answer_cache import Journal
from harness.scoring.backend import BatchSize
from harness.scoring.items import ItemRow, Scored, read_rows, write_rows
from harness.scoring.outcomes import leaf_of, metric_of, summarise
from harness.scoring.sampling import Picked, pick, sample

if TYPE_CHECKING:
    from harness.scoring.backend import Backend

__all__ = ["ItemRow", "journal_path", "read_rows", "sample", "score_task", "write_rows"]

PLAIN_TEXT = Prompting()


# Nine parameters: each is one condition of a score, and programs beside the harness call it by
# these names.
def score_task(
    opened: LanguageModel,
    task: Task,
    source: LocalOrHubData,
    *,
    progress: Callable[[Progress], None],
    batch_size: BatchSize = "auto",
    limit: int | None = None,
    prompting: Prompting = PLAIN_TEXT,
    cache: Path | None = None,
    backend: "Backend | None" = None,
) -> tuple[TaskScore, list[ItemRow]]:
    """Score one task, or a seeded sample of `limit` of its items; return its figures and its rows,
    in item order.

    With a `cache` folder every answer is kept as it comes, and none is computed twice, whatever
    killed the last try.
    """
    from lm_eval.evaluator import evaluate

    from harness.scoring.lm_eval_model import HarnessLM
    from harness.scoring.transformers_backend import Transformers

    backend = backend or Transformers(opened, batch_size)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with seeded_as_lm_eval():
        built = task.lm_eval_tasks(source)
        prepare_tasks(built.values())
        picked = pick(built, limit, name=task.name)
    items = picked.count
    if not items:
        raise CellFailed(f"{task.name}: there is no item to score")
    total = items
    done = 0

    def report(count: int) -> None:
        nonlocal done, total
        done += count
        total = max(total, done)
        progress(Progress(stage="score", done=done, total=total, unit="requests", detail=task.name))

    journal = Journal(
        journal_path(opened, task, prompting, cache, path=backend.path) if cache else None
    )

    def say(line: str) -> None:
        progress(Progress(stage="score", done=done, total=total, unit="requests", detail=line))

    model = HarnessLM(opened, backend=backend, journal=journal, progress=report, say=say)
    # no note of the score: what was dropped is asked again, and nothing in the record differs
    if damage := journal.damage():
        print(damage, file=sys.stderr)
        say(damage)
    total = items * _choices(picked.tasks) if task.kind == "choose" else items
    with seeded_as_lm_eval(), _told(task.name):
        result = evaluate(
            model,
            dict(picked.tasks),
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=prompting.chat,
            fewshot_as_multiturn=prompting.chat,
            system_instruction=prompting.system,
        )
    assert result is not None and model.requests, "lm-eval returned without asking the model"
    return _figures(task, picked, result, model)


def journal_path(
    opened: LanguageModel, task: Task, prompting: Prompting, cache: Path, *, path: str
) -> Path:
    """Name the journal of one model on one task: weights, tokenizer, dtype, device, path, its code
    and the task's version.
    """
    code = code_digest(
        "harness.scoring.lm_eval_model",
        *(("harness.scoring.vllm_backend",) if path.startswith("vllm") else ()),
    )
    key = digest_of(
        opened.checkpoint.digest,
        str(opened.model.dtype),
        device_label(opened.device),
        path,
        code,
        task.name,
        task.version,
        asdict(prompting),
    )
    return cache / "answers" / key[:2] / f"{key[:32]}.jsonl"


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Turn what a task's own code or metric raises into a line; what our code raises below it stays
    as it is.
    """
    try:
        yield
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        NameError,
        TypeError,
        ValueError,
    ) as problem:
        # behind this function and the call
        frames = traceback.extract_tb(problem.__traceback__)[2:]
        if any(Path(__file__).parents[1] in Path(frame.filename).parents for frame in frames):
            raise
        told = " ".join(str(problem).split())[:160] or "no message"
        raise CellFailed(
            f"{name}: lm-eval cannot compute its figures ({type(problem).__name__}: {told}); "
            "correct the task"
        ) from problem


def _figures(
    task: Task, picked: Picked, result: Mapping[str, Any], model: Any
) -> tuple[TaskScore, list[ItemRow]]:
    """Make rows of lm-eval's samples and the task's figures of the rows."""
    leaves = []
    for name, built in picked.tasks.items():
        samples = result["samples"][name]
        scored = Scored(
            task,
            name,
            built,
            samples,
            picked.numbers[name],
            metric_of(task, name, samples),
            several=len(picked.tasks) > 1,
        )
        leaves.append(leaf_of(scored, scored.rows(model), result["results"]))
    rows = sorted((row for leaf in leaves for row in leaf.rows), key=lambda row: row.item)
    if len(rows) != picked.count:
        raise CellFailed(f"{task.name}: {picked.count} items were asked and {len(rows)} came back")
    return summarise(task, leaves, model=model), rows


def _choices(built: Mapping[str, Any]) -> int:
    first = next(iter(built.values()))
    return (
        len(first.doc_to_choice(first.eval_docs[0]))
        if first.config.doc_to_choice is not None
        else 1
    )
