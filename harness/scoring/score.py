"""Scores a model on tasks through lm-eval's own machinery, and returns one row per item.

lm-eval builds the prompts, runs its filters and its metric. We answer its requests
(`harness/scoring/lm_eval_model.py`), add the numeric extractor and the diagnostics, and derive
every figure from the rows. Neither of lm-eval's caches is used: ours has the model and the exact
request in its keys.
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
from harness.data.subsets import items_name as items_name
from harness.errors import CellFailed
from harness.files.closure import code_digest
from harness.files.digests import digest_of
from harness.machine.gpu import device_label
from harness.models.language_model import LanguageModel
from harness.records.record import TaskScore
from harness.scoring.answer_cache import AnswerCache
from harness.scoring.backend import BatchSize
from harness.scoring.items import ItemRow, ScoredTask, read_rows, write_rows
from harness.scoring.outcomes import metric_of, subtask_result, summarise
from harness.scoring.sampling import ItemChoice, SelectedItems, select_items

if TYPE_CHECKING:
    from harness.scoring.backend import Backend

__all__ = ["ItemRow", "answer_cache_path", "read_rows", "score_task", "write_rows"]

PLAIN_TEXT = Prompting()


class _ScoringProgress:
    """Counts answers to a task's requests, and reports them with lines worth reading."""

    def __init__(self, task: str, total: int, report: Callable[[Progress], None]) -> None:
        self._task, self._total, self._report, self._done = task, total, report, 0

    def count(self, answers: int) -> None:
        """Report that so many more requests are answered."""
        self._done += answers
        self._total = max(self._total, self._done)
        self.say(self._task)

    def say(self, line: str) -> None:
        """Report a line beside the present count."""
        self._report(
            Progress(
                stage="score", done=self._done, total=self._total, unit="requests", detail=line
            )
        )


def score_task(
    model: "LanguageModel | Backend",
    task: Task,
    source: LocalOrHubData,
    *,
    progress: Callable[[Progress], None],
    batch_size: BatchSize = "auto",
    limit: int | ItemChoice | None = None,
    prompting: Prompting = PLAIN_TEXT,
    cache: Path | None = None,
) -> tuple[TaskScore, list[ItemRow]]:
    """Score one task, or as many of its items as `limit` says: a seeded sample, or a subset.

    Returns the task's figures and its rows, in item order. An open `model` answers `batch_size`
    rows at once; a backend batches as it was made to. With a `cache` folder every answer is stored
    at once, so that a scoring that was killed resumes without computing an answer twice.
    """
    from harness.scoring.lm_eval_model import HarnessLM

    backend = _backend_of(model, batch_size)
    opened = backend.opened
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with seeded_as_lm_eval():
        built = task.lm_eval_tasks(source)
        prepare_tasks(built.values())
        # two metrics of one task have the same items and share its answers
        selected = select_items(built, limit, name=items_name(task))
    if not selected.count:
        raise CellFailed(f"{task.name}: there is no item to score")
    answer_cache = AnswerCache(
        answer_cache_path(opened, task, prompting, cache, path=backend.path) if cache else None
    )
    reporter = _ScoringProgress(task.name, _request_count(task, selected), progress)
    answering = HarnessLM(
        opened,
        backend=backend,
        answer_cache=answer_cache,
        progress=reporter.count,
        say=reporter.say,
    )
    # not a note of the score: dropped answers are computed again, and the record is the same
    if damage := answer_cache.damage():
        print(damage, file=sys.stderr)
        reporter.say(damage)
    result = _evaluate(answering, task, selected, prompting)
    return _figures_and_rows(task, selected, result, answering)


def _backend_of(model: "LanguageModel | Backend", batch_size: BatchSize) -> "Backend":
    """Return the backend that answers for a model; a backend answers for itself."""
    from harness.scoring.transformers_backend import TransformersBackend

    return TransformersBackend(model, batch_size) if isinstance(model, LanguageModel) else model


def _request_count(task: Task, selected: SelectedItems) -> int:
    """Return how many requests lm-eval will make, judged by the first item's choices."""
    per_item = _choices_per_item(selected.tasks) if task.kind == "choose" else 1
    return selected.count * per_item


def _evaluate(
    model: Any, task: Task, selected: SelectedItems, prompting: Prompting
) -> Mapping[str, Any]:
    """Run lm-eval's evaluator on the selected items; return its samples and results."""
    from lm_eval.evaluator import evaluate

    with seeded_as_lm_eval(), _task_errors_as_failures(task.name):
        result = evaluate(
            model,
            dict(selected.tasks),
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=prompting.chat,
            fewshot_as_multiturn=prompting.chat,
            system_instruction=prompting.system,
        )
    assert result is not None and model.requests, "lm-eval returned without asking the model"
    return result  # type: ignore[no-any-return]


def answer_cache_path(
    opened: LanguageModel, task: Task, prompting: Prompting, cache: Path, *, path: str
) -> Path:
    """Return the file with a model's answers to a task.

    Its name is a digest of all that an answer depends on: weights and tokenizer, dtype, device, the
    backend's `path` and code, the task's version, and the prompting.
    """
    code = code_digest(
        "harness.scoring.lm_eval_model",
        *(("harness.scoring.vllm_backend",) if path.startswith("vllm") else ()),
        *(("harness.scoring.llama_cpp_backend",) if path.startswith("llama-cpp") else ()),
    )
    key = digest_of(
        opened.checkpoint.digest,
        str(opened.model.dtype),
        device_label(opened.device),
        path,
        code,
        items_name(task),
        task.version,
        asdict(prompting),
    )
    return cache / "answers" / key[:2] / f"{key[:32]}.jsonl"


@contextmanager
def _task_errors_as_failures(name: str) -> Iterator[None]:
    """Turn an error of a task's own code or metric into `CellFailed`; errors of our code pass."""
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
        # the frames after this function and `_evaluate`
        frames = traceback.extract_tb(problem.__traceback__)[2:]
        if any(Path(__file__).parents[1] in Path(frame.filename).parents for frame in frames):
            raise
        message = " ".join(str(problem).split())[:160] or "no message"
        raise CellFailed(
            f"{name}: lm-eval cannot compute its figures ({type(problem).__name__}: {message}); "
            "correct the task"
        ) from problem


def _figures_and_rows(
    task: Task, selected: SelectedItems, result: Mapping[str, Any], model: Any
) -> tuple[TaskScore, list[ItemRow]]:
    """Make rows from lm-eval's samples, and the task's figures from the rows."""
    subtasks = []
    for name, built in selected.tasks.items():
        samples = result["samples"][name]
        scored = ScoredTask(
            task,
            name,
            built,
            samples,
            selected.numbers[name],
            metric_of(task, name, samples),
            several=len(selected.tasks) > 1,
        )
        subtasks.append(subtask_result(scored, scored.rows(model), result["results"]))
    rows = sorted((row for subtask in subtasks for row in subtask.rows), key=lambda row: row.item)
    if len(rows) != selected.count:
        raise CellFailed(
            f"{task.name}: {selected.count} items were selected, but lm-eval returned {len(rows)}"
        )
    return summarise(task, subtasks, model=model), rows


def _choices_per_item(built: Mapping[str, Any]) -> int:
    first = next(iter(built.values()))
    return (
        len(first.doc_to_choice(first.eval_docs[0]))
        if first.config.doc_to_choice is not None
        else 1
    )
