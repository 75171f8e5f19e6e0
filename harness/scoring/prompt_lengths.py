"""How far a student is from its teacher by how many tokens stand before: in bands of positions.

A quantized cache is read more the longer the prompt is. The same texts stand in every band, so the
bands differ in position alone; intervals are over texts.

Shapes: N tokens of a band of a text.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from harness.models.language_model import LanguageModel
from harness.scoring.backend import CanRead
from harness.scoring.fidelity import PromptedAnswer, TeacherReading
from harness.scoring.text_divergence import token_distances
from harness.statistics.intervals import Interval
from harness.statistics.token_distances import mean_interval

BANDS = ((0, 128), (128, 512), (512, 1_024), (1_024, 1_536))  # tokens before the one predicted
MAX_TEXTS = 8  # of all texts, the longest


class BandWindow(NamedTuple):
    """The tokens of one text that a band predicts, after all that stand before them."""

    band: int  # of BANDS
    text: int
    window: PromptedAnswer


class BandDistances(NamedTuple):
    """The figures of one band, each with its interval over the texts."""

    label: str  # as 128-512
    texts: int
    tokens: int
    divergence: Interval  # mean, teacher || student, in nats
    perplexity_ratio: Interval  # student's over teacher's, of the same tokens


def band_windows(opened: LanguageModel, texts: Sequence[str]) -> list[BandWindow]:
    """Return the windows of the longest texts, band by band as far as each text and the context go.

    A text begins with BOS, or EOS, where the tokenizer has one; it is a token before the others.
    """
    starts = opened.tokenizer.bos_token_id, opened.tokenizer.eos_token_id
    prefix = [token for token in starts if token is not None][:1]
    longest = sorted(texts, key=len, reverse=True)[:MAX_TEXTS]
    encoded = [[*prefix, *opened.encode(text, special=False)] for text in longest]
    windows = []
    for band, (start, end) in enumerate(BANDS):
        first = max(1, start)
        for number, ids in enumerate(encoded):
            answer = ids[first : min(end, opened.context)]
            if answer:
                windows.append(BandWindow(band, number, PromptedAnswer(ids[:first], answer)))
    return windows


def compare_bands(
    readings: Iterable[TeacherReading], student: CanRead, windows: Sequence[BandWindow]
) -> list[BandDistances]:
    """Compare a student with what its teacher reads in the windows, in their order.

    Raises the errors of `token_distances`.
    """
    divergences: dict[int, list[NDArray[np.float64]]] = {}
    losses: dict[int, list[NDArray[np.float64]]] = {}
    for (band, _, window), reading in zip(windows, readings, strict=True):
        [top] = student.top_k([window.request], k=None, width=reading.log_p.shape[-1])
        distances = token_distances(reading.log_p, top.log_p_NK, window.answer)
        divergences.setdefault(band, []).append(distances.divergence)
        places, tokens = np.arange(len(window.answer)), np.array(window.answer)
        teacher, own = (
            log_p.cpu().numpy()[places, tokens].astype(np.float64)
            for log_p in (reading.log_p, top.log_p_NK)
        )
        losses.setdefault(band, []).append(teacher - own)
    return [_figures(band, divergences[band], losses[band]) for band in sorted(divergences)]


def _figures(
    band: int, divergences: Sequence[NDArray[np.float64]], losses: Sequence[NDArray[np.float64]]
) -> BandDistances:
    """Return the figures of a band; `losses` are nats that the student pays more for a token."""
    start, end = BANDS[band]
    log_ratio = mean_interval(losses)
    value, low, high = map(_ratio_of, (log_ratio.value, log_ratio.low, log_ratio.high))
    return BandDistances(
        label=f"{start}-{end}",
        texts=len(divergences),
        tokens=sum(map(len, divergences)),
        divergence=mean_interval(divergences),
        perplexity_ratio=Interval(value, low, high),
    )


def _ratio_of(nats: float | None) -> float | None:
    return None if nats is None else math.exp(nats)
