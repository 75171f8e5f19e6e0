"""Distances by prompt length: which tokens a band has, and its figures by hand."""

from math import exp, log

import pytest
import torch

from harness.models.cache_format import CacheFormat
from harness.models.language_model import open_model
from harness.models.shaping import copy_student
from harness.scoring.backend import TopK
from harness.scoring.fidelity import (
    PromptedAnswer,
    TeacherReading,
    distribution_reader,
    read_answers,
)
from harness.scoring.prompt_lengths import BANDS, BandWindow, band_windows, compare_bands


class Said:
    """A student whose distributions are given."""

    max_length = 10_000

    def __init__(self, *answers):
        self.answers = iter(answers)

    def top_k(self, requests, *, k, width=None):
        for _ in requests:
            log_p = torch.tensor(next(self.answers)).log()
            yield TopK(torch.arange(2).expand_as(log_p), log_p)


def test_bands_have_the_tokens_behind_so_many_and_every_token_once(embedded):
    texts = ["a short one", " ".join(f"{n} and {n * 7}" for n in range(900))]
    windows = band_windows(embedded, texts)
    start = [embedded.tokenizer.bos_token_id, embedded.tokenizer.eos_token_id]
    ids = [t for t in start if t is not None][:1] + embedded.encode(texts[1], special=False)
    long = [window for window in windows if window.text == 0]
    for band, _, window in long:
        first, end = BANDS[band]
        assert len(window.prompt) == max(1, first) and window.length <= min(end, embedded.context)
        assert [*window.prompt, *window.answer] == ids[: window.length]
    covered = [token for _, _, window in long for token in window.answer]
    assert covered == ids[1 : 1 + len(covered)] and len(covered) > 400
    assert [window.band for window in windows if window.text == 1] == [0]


def test_figures_of_a_band_are_those_by_hand():
    text = PromptedAnswer([0], [1, 0])
    teacher = torch.tensor([[0.5, 0.5], [0.75, 0.25]]).log()
    windows = [BandWindow(0, 0, text), BandWindow(0, 1, text), BandWindow(1, 0, text)]
    student = Said(
        [[0.75, 0.25], [0.75, 0.25]], [[0.5, 0.5], [0.75, 0.25]], [[0.5, 0.5], [0.5, 0.5]]
    )
    near, far = compare_bands([TeacherReading(text, teacher)] * 3, student, windows)
    assert (near.label, near.texts, near.tokens) == ("0-128", 2, 4)
    assert (far.label, far.texts, far.tokens) == ("128-512", 1, 2)
    # one token of four is predicted with 1/4 in place of 1/2
    assert near.divergence.value == pytest.approx((0.5 * log(2 / 3) + 0.5 * log(2)) / 4)
    assert near.perplexity_ratio.value == pytest.approx(exp(log(2) / 4))
    assert near.perplexity_ratio.low < near.perplexity_ratio.value < near.perplexity_ratio.high
    assert far.perplexity_ratio.value == pytest.approx(exp(log(1.5) / 2))
    assert far.perplexity_ratio.low is None  # one text has no interval


def test_a_teacher_is_nowhere_far_from_itself_and_a_quantized_cache_is(random_model, tmp_path):
    teacher = open_model(random_model)
    windows = band_windows(teacher, [" ".join(map(str, range(100, 220)))])[:2]
    texts = [window.window for window in windows]
    codes = CacheFormat(bits=4, group=32)
    student = open_model(copy_student(random_model, tmp_path / "kv", name="kv", cache_format=codes))
    gaps = {}
    for name, opened in (("itself", teacher), ("codes", student)):
        readings = read_answers(distribution_reader(teacher, 1), texts)
        bands = compare_bands(readings, distribution_reader(opened, 1), windows)
        gaps[name] = [band.divergence.value for band in bands]
    assert max(map(abs, gaps["itself"])) < 1e-6 < min(gaps["codes"])
