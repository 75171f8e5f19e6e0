"""How far a student's distributions are from its teacher's at the tokens of whole texts.

What llama.cpp's perplexity tool prints for a quantized model, with intervals over the texts:
forward Kullback-Leibler divergence (teacher || student) at each token, its mean, quantiles and
maximum; how much the probability of the right token changed; how often both put the same token
first. Only for models with one vocabulary.

Shapes: N tokens of a text, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from harness.errors import CellFailed, HarnessError
from harness.models.language_model import LanguageModel
from harness.scoring.backend import CanRead
from harness.scoring.fidelity import PromptedAnswer, TeacherReading, renormalised
from harness.statistics.intervals import Interval
from harness.statistics.token_distances import (
    mean_interval,
    quantile_interval,
    root_mean_square,
    share_interval,
)

if TYPE_CHECKING:
    import torch

WINDOW = 512  # tokens of a window, as of llama.cpp's tool
WINDOWS_PER_TEXT = 2  # the first tokens of many texts say more than many tokens of few
MAX_TEXTS = 32
QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}


class NotANumber(CellFailed):
    """A student's logits are NaN."""


class TokenDistances(NamedTuple):
    """The distances at the tokens of one text, (N,) each."""

    divergence: NDArray[np.float64]  # teacher || student, in nats
    probability_change: NDArray[np.float64]  # of the right token: student's less teacher's
    same_top: NDArray[np.bool_]


class TextDivergence(NamedTuple):
    """The figures of a student on several texts, each with its interval over the texts."""

    texts: int
    tokens: int
    mean: Interval
    quantiles: dict[str, Interval]
    maximum: float
    probability_change: Interval  # root mean square
    same_top: Interval


def windows_to_compare(opened: LanguageModel, texts: Sequence[str]) -> list[list[PromptedAnswer]]:
    """Return the first windows of each of the first texts, as token ids.

    A window begins with the token before it, which has no distribution of its own; the first
    one's is BOS or EOS, where the tokenizer has one. Texts without two tokens are left out.
    """
    size = min(WINDOW, opened.context)
    starts = opened.tokenizer.bos_token_id, opened.tokenizer.eos_token_id
    prefix = [next((token for token in starts if token is not None), None)]
    windows_of_texts = []
    for text in texts[:MAX_TEXTS]:
        ids = opened.encode(text, special=False)
        ids = [token for token in prefix if token is not None] + ids
        ends = range(1, min(len(ids), WINDOWS_PER_TEXT * (size - 1) + 1), size - 1)
        windows = [PromptedAnswer(ids[end - 1 : end], ids[end : end + size - 1]) for end in ends]
        if windows:
            windows_of_texts.append(windows)
    return windows_of_texts


def compare_texts(
    readings: Iterable[TeacherReading],
    student: CanRead,
    windows_of_texts: Sequence[Sequence[PromptedAnswer]],
) -> TextDivergence | None:
    """Compare a student with what its teacher read in texts, window by window.

    `windows_of_texts` are the student's windows, in the order of the readings. None where a window
    is longer than the student's context, or is not what the teacher read: a teacher of a shorter
    context reads shorter windows. Raises the errors of `token_distances`.
    """
    read = iter(readings)
    texts = []
    for windows in windows_of_texts:
        distances = []
        for window in windows:
            reading = next(read, None)
            if reading is None or list(reading.text.answer) != list(window.answer):
                return None
            if window.length > student.max_length:
                return None
            [top] = student.top_k([window.request], k=None, width=reading.log_p.shape[-1])
            distances.append(token_distances(reading.log_p, top.log_p_NK, window.answer))
        texts.append(_joined(distances))
    return divergence_of(texts) if texts else None


def _joined(windows: Sequence[TokenDistances]) -> TokenDistances:
    columns = zip(*windows, strict=True)
    return TokenDistances(*(np.concatenate(column) for column in columns))


def token_distances(
    teacher_log_p: "torch.Tensor", student_log_p: "torch.Tensor", tokens: Sequence[int]
) -> TokenDistances:
    """Compare log-probabilities, (N, V) each, at the right `tokens` of a text.

    A vocabulary that one model has padded is cut to the other's. Raises `NotANumber`
    for NaN, and `HarnessError` where KL is infinite: the student gives no probability to a token
    that the teacher writes.
    """
    import torch

    width = min(teacher_log_p.shape[-1], student_log_p.shape[-1])
    teacher, student = (renormalised(log_p, width) for log_p in (teacher_log_p, student_log_p))
    p = teacher.exp()
    # a token that the teacher never writes adds nothing, whatever the student makes of it
    divergence = torch.where(p > 0, p * (teacher - student), 0.0).sum(dim=-1)
    next_ids = torch.tensor(list(tokens), device=teacher.device)[:, None]
    change = student.gather(1, next_ids).exp() - teacher.gather(1, next_ids).exp()
    same_top = teacher.argmax(dim=-1) == student.argmax(dim=-1)
    distances = TokenDistances(
        divergence.double().cpu().numpy(),
        change[:, 0].double().cpu().numpy(),
        same_top.cpu().numpy(),
    )
    if np.isnan(distances.divergence).any():
        raise NotANumber(
            "logits at a token of a text are no numbers (NaN); see the row, and score it in float32"
        )
    if np.isinf(distances.divergence).any():
        raise HarnessError(
            "it gives a token that its teacher writes no probability at all, so KL is infinite; "
            "score it in float32"
        )
    return distances


def divergence_of(texts: Sequence[TokenDistances]) -> TextDivergence:
    """Return the figures of texts."""
    divergences = [text.divergence for text in texts]
    return TextDivergence(
        texts=len(texts),
        tokens=sum(map(len, divergences)),
        mean=mean_interval(divergences),
        quantiles={
            name: quantile_interval(divergences, share) for name, share in QUANTILES.items()
        },
        maximum=max(float(values.max()) for values in divergences),
        probability_change=root_mean_square([text.probability_change for text in texts]),
        same_top=share_interval([text.same_top for text in texts]),
    )
