"""KL a token on texts: against a plain loop in numpy, a teacher against itself, odd lengths."""

import math

import numpy as np
import pytest
import torch

from harness.errors import HarnessError
from harness.models.language_model import open_model
from harness.scoring.fidelity import distribution_reader, read_answers
from harness.scoring.text_divergence import (
    WINDOW,
    WINDOWS_PER_TEXT,
    NotANumber,
    compare_texts,
    token_distances,
    windows_to_compare,
)

TEXTS = [
    "Tom has 3 apples and Ann has 4 pears. How many fruits do they have? " * 30,
    "A short text about coins.",
    "Question: What is 2+2?\nAnswer: 4\n\n" * 8,
]


@pytest.fixture(scope="module")
def student(random_model):
    return open_model(random_model)


def compared(teacher, student, texts=TEXTS):
    windows = windows_to_compare(teacher, texts)
    readings = read_answers(
        distribution_reader(teacher, 1), [window for text in windows for window in text]
    )
    return compare_texts(readings, distribution_reader(student, 1), windows)


def by_hand(teacher, student, ids):
    """All figures of one window, from both models' whole logits."""
    log_p, log_q = (
        torch.log_softmax(opened.model(torch.tensor([ids])).logits[0, :-1].double(), dim=-1)
        .detach()
        .numpy()
        for opened in (teacher, student)
    )
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    right = np.arange(len(ids) - 1), np.array(ids[1:])
    change = np.exp(log_q[right]) - np.exp(log_p[right])
    return divergence, change, log_p.argmax(axis=-1) == log_q.argmax(axis=-1)


def test_figures_are_those_of_a_plain_loop(embedded, student):
    windows = windows_to_compare(embedded, TEXTS)
    parts = [
        by_hand(embedded, student, [*window.prompt, *window.answer])
        for text in windows
        for window in text
    ]
    divergence, change, same_top = (np.concatenate(column) for column in zip(*parts, strict=True))
    figures = compared(embedded, student)
    assert (figures.texts, figures.tokens) == (3, len(divergence))
    assert figures.mean.value == pytest.approx(divergence.mean(), rel=1e-4)
    assert figures.maximum == pytest.approx(divergence.max(), rel=1e-4)
    assert figures.probability_change.value == pytest.approx(
        math.sqrt((change**2).mean()), rel=1e-4
    )
    assert figures.same_top.value == pytest.approx(same_top.mean())
    for name, share in (("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999)):
        assert figures.quantiles[name].value == pytest.approx(
            np.quantile(divergence, share), rel=1e-3
        )
    assert figures.mean.low < figures.mean.value < figures.mean.high


def test_a_teacher_is_at_no_distance_from_itself(embedded):
    figures = compared(embedded, embedded)
    assert figures.mean.value == pytest.approx(0, abs=1e-9) and figures.maximum < 1e-6
    assert figures.same_top.value == 1.0
    assert figures.probability_change.value == pytest.approx(0, abs=1e-6)


def test_windows_predict_every_token_of_the_beginning_once(embedded):
    [long, short, _] = windows_to_compare(embedded, TEXTS)
    prefix = next(
        token
        for token in (embedded.tokenizer.bos_token_id, embedded.tokenizer.eos_token_id)
        if token is not None
    )
    size = min(WINDOW, embedded.context)
    ids = embedded.encode(TEXTS[0], special=False)
    assert [token for window in long for token in window.answer] == ids[
        : WINDOWS_PER_TEXT * (size - 1)
    ]
    assert long[0].prompt == [prefix] and all(window.length <= size for window in long)
    assert [window.answer for window in short] == [embedded.encode(TEXTS[1], special=False)]


def test_empty_texts_and_a_student_with_a_shorter_context(embedded, student, monkeypatch):
    assert windows_to_compare(embedded, ["", ""]) == []
    reader = distribution_reader(student, 1)
    monkeypatch.setattr(type(reader), "max_length", property(lambda _: 20))
    windows = windows_to_compare(embedded, TEXTS[:1])
    readings = read_answers(distribution_reader(embedded, 1), windows[0])
    assert compare_texts(readings, reader, windows) is None


@pytest.mark.parametrize("context", [40, 100, 511])
def test_models_that_read_other_windows_are_not_compared(context, embedded, student, monkeypatch):
    """Each model cuts texts by its own context: what stands at a place is then another token."""
    whole = windows_to_compare(embedded, TEXTS[:1])
    with monkeypatch.context() as patch:
        patch.setattr(type(embedded), "context", property(lambda _: context))
        short = windows_to_compare(embedded, TEXTS[:1])
    reader = distribution_reader(student, 1)
    for of_teacher, of_student in ((short, whole), (whole, short), (whole[:0], whole)):
        read = [window for text in of_teacher for window in text]
        readings = read_answers(distribution_reader(embedded, 1), read)
        assert compare_texts(readings, reader, of_student) is None


def test_a_token_that_nobody_writes_adds_nothing_and_nan_is_refused():
    teacher = torch.log_softmax(torch.tensor([[1.0, 2.0, -math.inf]]), dim=-1)
    student = torch.log_softmax(torch.tensor([[2.0, 1.0, -math.inf]]), dim=-1)
    distances = token_distances(teacher, student, [1])
    p, q = 1 / (1 + math.e), math.e / (1 + math.e)
    assert distances.divergence[0] == pytest.approx(p * math.log(p / q) + q * math.log(q / p))
    assert distances.probability_change[0] == pytest.approx(p - q)
    assert not distances.same_top[0]
    with pytest.raises(NotANumber, match="NaN"):
        token_distances(teacher, torch.full((1, 3), math.nan), [1])
    never = torch.log_softmax(torch.tensor([[2.0, -math.inf, 1.0]]), dim=-1)
    with pytest.raises(HarnessError, match="infinite"):
        token_distances(teacher, never, [1])
