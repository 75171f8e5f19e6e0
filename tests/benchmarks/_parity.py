"""A cell of the parity design: model, tokenizer, task form and batch size.

It is scored by the harness and by lm-eval's own command.
"""

import logging
import math
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import _architectures
import _tokenizers
from _forms import FORMS, GROUPS

from harness.data.source import LocalOrHubData
from harness.errors import CellFailed, HarnessError
from harness.models.checkpoint import describe
from harness.models.language_model import LanguageModel

BATCHES = (1, 3, 16)
GAP = 2e-3  # nats of a continuation, in float32
FACTORS: tuple[tuple[Any, ...], ...] = (
    tuple(_architectures.ARCHITECTURES),
    tuple(_tokenizers.TOKENIZERS),
    (*FORMS, *GROUPS),
    BATCHES,
)


@dataclass(frozen=True, order=True)
class Cell:
    """One combination of the design."""

    architecture: str
    tokenizer: str
    form: str
    batch: int

    @property
    def name(self) -> str:
        return f"{self.architecture}/{self.tokenizer}/{self.form}/{self.batch}"


@dataclass(frozen=True)
class Outcome:
    """A cell's items, how many both sides answered alike, the widest gap, and a refusal's line.

    The gap is one of log-probabilities.

    Where the task's figure is not lm-eval's, no item counts as alike.
    """

    items: int
    alike: int
    gap: float
    refused: str = ""
    differs: tuple[str, ...] = ()


def design(seed: int = 0) -> list[Cell]:
    """Return cells in which each pair of values of two factors occurs at least once.

    The search is greedy and gives the same cells each time.
    """
    draw = random.Random(seed)
    pairs = {
        (a, x, b, y)
        for a, b in combinations(range(len(FACTORS)), 2)
        for x, y in product(FACTORS[a], FACTORS[b])
    }
    cells: list[Cell] = []
    while pairs:
        a, x, b, y = min(draw.sample(sorted(pairs, key=repr), min(3, len(pairs))), key=repr)
        best, most = None, -1
        for _ in range(40):
            values = [draw.choice(factor) for factor in FACTORS]
            values[a], values[b] = x, y
            new = sum(
                (i, values[i], j, values[j]) in pairs
                for i, j in combinations(range(len(FACTORS)), 2)
            )
            if new > most:
                best, most = values, new
        assert best is not None
        pairs -= {(i, best[i], j, best[j]) for i, j in combinations(range(len(FACTORS)), 2)}
        cells.append(Cell(*best))
    return cells


def build_model(cell: Cell, folder: Path) -> LanguageModel:
    """Build a cell's model with its tokenizer, saved so that it has a digest."""
    tokenizer = _tokenizers.build_tokenizer(cell.tokenizer)
    model = _architectures.random_model(cell.architecture, vocabulary=len(tokenizer))
    place = folder / "model"
    model.config.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return LanguageModel(
        model, tokenizer, "cpu", describe(place, name=f"{cell.architecture} with {cell.tokenizer}")
    )


def compare_cell(cell: Cell, tasks: Path) -> Outcome:
    """Score a cell's task with both programs and compare item by item."""
    with tempfile.TemporaryDirectory() as place:
        model = build_model(cell, Path(place))
        theirs, figures = score_with_lm_eval(model, cell, tasks)
        try:
            mine, metric, value = score_with_harness(model, cell, tasks)
        except (CellFailed, HarnessError) as problem:
            return Outcome(len(theirs), 0, 0.0, refused=str(problem))
    if len(mine) != len(theirs):
        return Outcome(len(theirs), 0, 0.0, differs=(f"{len(mine)} items came back",))
    checked = [
        _compare_answers(our_answer, their_answer)
        for our_answer, their_answer in zip(mine, theirs, strict=True)
    ]
    differs = tuple(
        f"{our_answer} for {their_answer}"
        for our_answer, their_answer, (same, _) in zip(mine, theirs, checked, strict=True)
        if not same
    )[:2]
    figure = next(
        (
            value_of_metric
            for name, value_of_metric in figures.items()
            if name.partition(",")[0] == metric
        ),
        math.nan,
    )
    if not math.isclose(value, figure, rel_tol=1e-3, abs_tol=1e-9):
        return Outcome(
            len(theirs), 0, 0.0, differs=(f"the figure is {value} for {figure}", *differs)
        )
    return Outcome(
        len(theirs),
        sum(same for same, _ in checked),
        max(gap for _, gap in checked),
        differs=differs,
    )


Answer = tuple[str, tuple[float, ...] | str]  # hash of the prompt; log-probabilities, or the text


def _compare_answers(mine: Answer, theirs: Answer) -> tuple[bool, float]:
    """Return whether prompt and prediction are the same, and the largest gap in nats."""
    if mine[0] != theirs[0]:
        return False, 0.0
    our_values, their_values = mine[1], theirs[1]
    if isinstance(our_values, str) or isinstance(their_values, str):
        return our_values == their_values, 0.0
    if len(our_values) != len(their_values):
        return False, 0.0
    gap = max(abs(a - b) for a, b in zip(our_values, their_values, strict=True))
    same = our_values.index(max(our_values)) == their_values.index(max(their_values))
    return same and gap <= GAP * max(1.0, abs(max(their_values, key=abs)) / 100), gap


def score_with_harness(
    model: LanguageModel, cell: Cell, tasks: Path
) -> tuple[list[Answer], str, float]:
    """Return the harness's answers in item order, its primary metric, and the figure."""
    from harness.scoring.score import score_task
    from suites.loading.outside import LmEvalTask

    task = LmEvalTask(f"lm-eval:form-{cell.form}", tasks)
    score, rows = score_task(
        model, task, LocalOrHubData(), progress=lambda line: None, batch_size=cell.batch
    )
    return (
        [
            (row.prompt_hash, row.text if task.kind == "generate" else tuple(row.log_probabilities))
            for row in rows
        ],
        score.metric,
        score.value,
    )


def score_with_lm_eval(
    model: LanguageModel, cell: Cell, tasks: Path
) -> tuple[list[Answer], dict[str, Any]]:
    """Return lm-eval's answers (float32, one row at a time) and its figures by metric."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    backend = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=1)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    name = f"form-{cell.form}"
    evaluation = simple_evaluate(
        backend, tasks=[name], task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    members = (
        [f"form-{member}" for member in GROUPS[cell.form][1]] if cell.form in GROUPS else [name]
    )
    samples = [
        sample
        for member in members
        for sample in sorted(evaluation["samples"][member], key=lambda sample: sample["doc_id"])
    ]
    return list(_answers(samples)), {
        key: value
        for key, value in evaluation["results"][name].items()
        if "," in key and "stderr" not in key
    }


def _answers(samples: list[dict[str, Any]]) -> Iterator[Answer]:
    for sample in samples:
        first = sample["resps"][0][0]
        if isinstance(first, str):
            yield sample["prompt_hash"], first
        elif isinstance(first, float):
            yield sample["prompt_hash"], (first,)
        else:
            yield sample["prompt_hash"], tuple(float(pair[0][0]) for pair in sample["resps"])
