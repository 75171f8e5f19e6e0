"""How near a student's distributions are to its teacher's: on the choices of questions, and token by token.

Forward Kullback-Leibler divergence, teacher || student, in nats; standard errors are clustered by item (the tokens of
one answer are not independent). Only for models that share a vocabulary.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from harness.generate import left_padded
from harness.model import LanguageModel
from harness.record import Fidelity

if TYPE_CHECKING:
    from harness.score import ItemRow

TOKEN_ITEMS = 32  # of the teacher's answers that both models read
_ROWS = 4  # read at once


def choice_fidelity(task: str, teacher: "Sequence[ItemRow]", student: "Sequence[ItemRow]") -> Fidelity | None:
    """Compare the two distributions over each question's choices (softmax of their log-probabilities); None without pairs."""
    theirs = {row.item: row for row in teacher}
    pairs = [(theirs[row.item].log_probabilities, row.log_probabilities) for row in student if row.item in theirs]
    pairs = [(left, right) for left, right in pairs if left and len(left) == len(right)]
    if not pairs:
        return None
    divergences = [_divergence(_softmax(left), _softmax(right)) for left, right in pairs]
    same = [float(_first_largest(left) == _first_largest(right)) for left, right in pairs]
    return _summary(task, "choices", [(value, 1.0) for value in divergences], [(value, 1.0) for value in same])


def _softmax(logs: Sequence[float]) -> list[float]:
    top = max(logs)
    weights = [math.exp(value - top) for value in logs]
    total = sum(weights)
    return [weight / total for weight in weights]


def _divergence(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(p * (math.log(p) - math.log(max(q, 1e-300))) for p, q in zip(left, right, strict=True) if p > 0)


def _first_largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda index: (values[index], -index))


def token_fidelity(
    task: str,
    teacher: LanguageModel,
    student: LanguageModel,
    rows: "Sequence[ItemRow]",
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> Fidelity | None:
    """Let both models read prompts with the teacher's own answers; compare them at every token of the answers.

    A seeded sample of at most 32 answers, those longer than the context left out; None when nothing is left.
    """
    written = [row for row in rows if row.prompt and row.text]
    random.Random(f"fidelity/{task}").shuffle(written)
    texts = [(teacher.encode(row.prompt), teacher.encode(row.text, special=False)) for row in written[: 2 * TOKEN_ITEMS]]
    longest = min(teacher.context, student.context)
    texts = [(before, after) for before, after in texts if after and len(before) + len(after) <= longest][:TOKEN_ITEMS]
    if not texts:
        return None
    divergences: list[tuple[float, float]] = []
    same: list[tuple[float, float]] = []
    for start in range(0, len(texts), _ROWS):
        batch = texts[start : start + _ROWS]
        keep = max(len(after) for _, after in batch) + 1
        for (_, after), left, right in zip(batch, _logits(teacher, batch, keep), _logits(student, batch, keep), strict=True):
            kl, agree = _compared(left[-len(after) - 1 : -1], right[-len(after) - 1 : -1])
            divergences.append((kl, float(len(after))))
            same.append((agree, float(len(after))))
        progress(len(batch))
    return _summary(task, "tokens", divergences, same)


def _logits(opened: LanguageModel, batch: Sequence[tuple[list[int], list[int]]], keep: int) -> Any:
    import torch

    ids, mask, positions = left_padded([before + after for before, after in batch], opened.pad_id, opened.device)
    with torch.inference_mode():
        return opened.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=keep).logits


def _compared(left: Any, right: Any) -> tuple[float, float]:
    """Return (summed divergence, tokens with the same likeliest successor) of logits (T, V) each."""
    import torch

    width = min(left.shape[-1], right.shape[-1])  # padded vocabularies: no token lives beyond the shorter one
    theirs, ours = (torch.log_softmax(part[:, :width].float(), dim=-1) for part in (left, right))
    kl = (theirs.exp() * (theirs - ours)).sum(dim=-1)
    return float(kl.sum()), float((theirs.argmax(dim=-1) == ours.argmax(dim=-1)).sum())


def _summary(task: str, form: str, divergences: Sequence[tuple[float, float]], same: Sequence[tuple[float, float]]) -> Fidelity:
    kl, kl_error = clustered_mean(divergences)
    agreement, agreement_error = clustered_mean(same)
    return Fidelity(
        task=task, form=form, items=len(divergences), kl=kl, kl_stderr=kl_error, agreement=min(1.0, agreement),  # type: ignore[arg-type]
        agreement_stderr=agreement_error,
    )  # fmt: skip


def clustered_mean(sums: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the mean of clusters given as (sum, size), and its standard error with the clusters as the units.

    The ratio estimator of survey sampling (Cochran 1977, chapter 6): the residual of a cluster is its sum less the
    mean times its size.
    """
    total = sum(size for _, size in sums)
    mean = sum(value for value, _ in sums) / total
    if len(sums) < 2:
        return mean, math.nan
    squares = sum((value - mean * size) ** 2 for value, size in sums)
    return mean, math.sqrt(squares * len(sums) / (len(sums) - 1)) / total
