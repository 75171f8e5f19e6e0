"""The contract of all backends: the same laws for each, and for what scores through it."""

import copy
import inspect
import math
from dataclasses import replace

import pytest
import torch
from llama_cpp_stand_in import install as install_llama_cpp
from vllm_stand_in import install

from harness.models.resolve import EMBEDDED
from harness.models.served_model import ServedModel
from harness.scoring import backend as protocols
from harness.scoring import generation
from harness.scoring.backend import Likelihood, LikelihoodRequest, Sampling, TopK
from harness.scoring.fidelity import PromptedAnswer, TeacherReading, token_fidelity
from harness.scoring.llama_cpp_backend import LlamaCppBackend
from harness.scoring.plain_reading import LeftPaddedReader
from harness.scoring.reading import Reader, batches_by_memory
from harness.scoring.transformers_backend import TransformersBackend
from harness.scoring.vllm_backend import VllmBackend

KINDS = ("shared", "plain", "plain, three rows", "shared, a pack of 24", "vllm", "llama-cpp")
SHARED = list(range(40, 90))  # a beginning that is worth a pass of its own
ROWS = [
    LikelihoodRequest([*SHARED, 7, 8], 1),
    LikelihoodRequest([*SHARED, 7, 9], 1),
    LikelihoodRequest([*SHARED, 7, 9, 11, 12], 3),
    LikelihoodRequest([5, 6], 1),
    LikelihoodRequest([5, 6, 7, 8, 9], 4),
    LikelihoodRequest([5, 6], 1),  # once more, as are the next
    LikelihoodRequest([*SHARED, 7, 8], 1),
    LikelihoodRequest([99, 98, 97, 96, 95, 94], 2),
]
PROMPTS = [[*SHARED, 7], [5, 6, 7], [*SHARED, 9, 10, 11], [5], [5, 6, 7]]


@pytest.fixture(params=KINDS)
def backend(request, embedded, monkeypatch):
    """Return a backend of each kind over the same weights."""
    kind = request.param
    if kind == "vllm":
        install(monkeypatch, embedded)
        return VllmBackend(embedded.checkpoint, dtype="float32", device="cpu")
    if kind == "llama-cpp":
        install_llama_cpp(monkeypatch, embedded)
        folder = EMBEDDED / "tiny"
        model = ServedModel(folder / "model.safetensors", folder, threads=1)
        return LlamaCppBackend(replace(embedded, model=model))
    if kind.startswith("plain"):
        opened = replace(embedded, model=copy.deepcopy(embedded.model))
        monkeypatch.setitem(generation._REFUSALS, opened.model, "asked to")
        return TransformersBackend(opened, 3 if "three" in kind else "auto")
    return TransformersBackend(embedded, pack=24 if "pack" in kind else None)


def log_p_of(opened, row):
    """Return the log-probabilities (count, V) at a row's last positions, by one forward pass."""
    with torch.inference_mode():
        logits = opened.model(torch.tensor([list(row.ids)])).logits[0].float()
    return torch.log_softmax(logits, -1)[len(row.ids) - row.count - 1 : -1]


def by_hand(opened, row):
    log_p, tokens = log_p_of(opened, row), torch.tensor(row.ids[len(row.ids) - row.count :])
    value = float(log_p.gather(1, tokens[:, None]).sum())
    return value, bool((log_p.argmax(-1) == tokens).all())


# --- score


def test_scores_are_those_of_a_bare_forward_pass_in_the_given_order(backend, embedded):
    for rows in (ROWS, ROWS[::-1], ROWS[3:4]):
        answers = backend.score(rows, known={})
        assert all(isinstance(answer, Likelihood) for answer in answers)
        for row, answer in zip(rows, answers, strict=True):
            value, greedy = by_hand(embedded, row)
            assert (
                answer.log_probability == pytest.approx(value, abs=1e-3)
                and answer.is_greedy == greedy
            )


def test_each_row_is_reported_once_with_the_answer_that_is_returned(backend):
    heard = []
    answers = backend.score(
        ROWS, known={}, finished=lambda row, answer: heard.append((row, answer))
    )
    assert sorted(row for row, _ in heard) == list(range(len(ROWS)))
    assert all(answers[row] == answer for row, answer in heard)


@pytest.mark.parametrize("known", [(0,), (1, 4, 7), tuple(range(8))])
def test_what_is_known_is_returned_untouched_unreported_and_changes_no_other_digit(backend, known):
    fresh, heard = backend.score(ROWS, known={}), []
    known_answers = {row: Likelihood(-1234.5 - row, False) for row in known}
    answers = backend.score(
        ROWS, known=known_answers, finished=lambda row, answer: heard.append(row)
    )
    assert [answers[row] for row in known] == list(known_answers.values())
    computed_rows = [row for row in range(len(ROWS)) if row not in known]
    assert sorted(heard) == computed_rows and [answers[row] for row in computed_rows] == [
        fresh[row] for row in computed_rows
    ]


# --- generate


def test_what_is_written_is_the_likeliest_token_after_token(backend, embedded):
    answers = backend.generate(PROMPTS, max_new_tokens=6)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert 1 <= answer.tokens == len(answer.ids) <= 6
        assert backend.score([LikelihoodRequest([*prompt, *answer.ids], answer.tokens)], known={})[
            0
        ].is_greedy
        assert (answer.stop == "eos") == (answer.ids[-1] in embedded.eos_ids)
    assert backend.generate(PROMPTS[::-1], max_new_tokens=6) == answers[::-1]


def test_an_answer_ends_before_its_stop_string(backend):
    [answer] = backend.generate(PROMPTS[:1], max_new_tokens=12)
    stop = answer.text[len(answer.text) // 2 :][:2]
    [cut] = backend.generate(PROMPTS[:1], max_new_tokens=12, stop=(stop,))
    assert (
        stop
        and cut.text == answer.text.partition(stop)[0]
        and cut.stop == "stop"
        and cut.tokens <= answer.tokens
    )


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0, seed=5)])
def test_each_answer_is_reported_once_as_it_is_returned(backend, sampling):
    heard, counts = [], []
    answers = backend.generate(
        PROMPTS,
        max_new_tokens=5,
        sampling=sampling,
        progress=counts.append,
        finished=lambda row, answer: heard.append((row, answer)),
    )
    assert sum(counts) == len(PROMPTS)
    assert sorted(row for row, _ in heard) == list(range(len(PROMPTS)))
    assert all(answers[row] == answer and answers[row].ids == answer.ids for row, answer in heard)


def test_seed_and_row_decide_a_draw_and_its_company_does_not(backend):
    settings = {"max_new_tokens": 12}
    samples = [
        answer.ids
        for answer in backend.generate(
            PROMPTS, sampling=Sampling(temperature=2.0, seed=3), **settings
        )
    ]
    again = [
        answer.ids
        for answer in backend.generate(
            PROMPTS, sampling=Sampling(temperature=2.0, seed=3), **settings
        )
    ]
    other = [
        answer.ids
        for answer in backend.generate(
            PROMPTS, sampling=Sampling(temperature=2.0, seed=4), **settings
        )
    ]
    assert samples == again and samples != other
    assert samples[1] != samples[4]  # the same prompt in another row
    some = [4, 0]  # a run that goes on with what is missing, in whatever order
    rest = backend.generate(
        [PROMPTS[row] for row in some],
        sampling=Sampling(temperature=2.0, seed=3, numbers=some),
        **settings,
    )
    assert [answer.ids for answer in rest] == [samples[row] for row in some]


# --- top_k


@pytest.mark.parametrize("k", [1, 5, 64])
def test_the_likeliest_tokens_are_those_of_a_bare_forward_pass(backend, embedded, k):
    tops = list(backend.top_k(ROWS, k=k))
    for row, top in zip(ROWS, tops, strict=True):
        log_p = log_p_of(embedded, row)
        assert top.ids_NK.shape == top.log_p_NK.shape == (row.count, k)
        assert torch.allclose(top.log_p_NK, log_p.topk(k).values, atol=1e-3)
        # each beside its own token
        assert torch.allclose(log_p.gather(1, top.ids_NK), top.log_p_NK, atol=1e-3)
        assert all(len(set(ids)) == k for ids in top.ids_NK.tolist())


def test_the_first_of_the_likeliest_tokens_agrees_with_what_is_called_greedy(backend):
    greedy = [answer.is_greedy for answer in backend.score(ROWS, known={})]
    tops = backend.top_k(ROWS, k=1)
    assert greedy == [
        top.ids_NK[:, 0].tolist() == list(row.ids[-row.count :])
        for row, top in zip(ROWS, tops, strict=True)
    ]


@pytest.mark.parametrize("reader", [Reader, LeftPaddedReader])
@pytest.mark.parametrize("size", ["auto", 1, 3])
@pytest.mark.parametrize("width", [None, 1_000, 17, 5_000])
def test_a_whole_distribution_stands_by_id_among_the_tokens_that_are_wanted(
    embedded, reader, size, width
):
    tops = list(reader(embedded, size).top_k(ROWS, k=None, width=width))
    for row, top in zip(ROWS, tops, strict=True):
        log_p = torch.log_softmax(log_p_of(embedded, row)[:, :width], -1)
        assert torch.allclose(top.log_p_NK, log_p, atol=1e-3)
        assert (
            top.ids_NK.shape == log_p.shape and (top.ids_NK == torch.arange(log_p.shape[1])).all()
        )


@pytest.mark.parametrize("reader", [Reader, LeftPaddedReader])
def test_reading_leaves_the_model_as_it_was(embedded, reader):
    hooks = [len(module._forward_pre_hooks) for module in embedded.model.modules()]
    list(reader(embedded).top_k(ROWS, k=2))
    assert [
        len(module._forward_pre_hooks) for module in embedded.model.modules()
    ] == hooks and not embedded.model.training


def test_distributions_are_computed_while_they_are_taken(embedded, monkeypatch):
    calls, forward = [], embedded.model.forward
    monkeypatch.setattr(
        embedded.model, "forward", lambda *a, **k: (calls.append(1), forward(*a, **k))[1]
    )
    tops = Reader(embedded, 2).top_k(ROWS, k=1)
    assert not calls
    next(tops)
    assert len(calls) == 1 and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    next(tops), next(tops)
    assert len(calls) == 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("lengths", [[900, 700, 40, 3], [3, 40, 700, 900], [40] * 300, [5_000], []])
def test_batches_by_memory_hold_every_row_once_and_no_more_than_fits(lengths, device):
    rows = [LikelihoodRequest(range(length), 1) for length in lengths]
    batches = list(batches_by_memory(rows, 50_000, device))
    assert [row for batch in batches for row in batch] == rows
    for batch in batches:
        longest = max(len(row.ids) for row in batch)
        assert len(batch) == 1 or (len(batch) <= 64 and len(batch) * longest * 50_000 * 4 <= 2**28)
        assert device == "cuda" or len(batch) == 1 or len(batch) * longest <= 2_048


# --- all three, and who asks


def test_nothing_asked_is_nothing_answered(backend):
    assert (
        backend.score([], known={}) == []
        and backend.generate([], max_new_tokens=3) == []
        and list(backend.top_k([], k=2)) == []
    )


def test_a_backend_says_what_it_computes_with(backend, embedded):
    assert (
        backend.path.partition("/")[0] in ("transformers", "vllm", "llama-cpp")
        and 0 < backend.max_length <= embedded.context
    )
    assert backend.opened.checkpoint == embedded.checkpoint and backend.opened.encode(
        "a b"
    ) == embedded.encode("a b")


@pytest.mark.parametrize("name", ["generate", "score", "top_k"])
@pytest.mark.parametrize("kind", [TransformersBackend, VllmBackend])
def test_every_backend_takes_what_the_protocol_names(kind, name):
    declared = inspect.signature(getattr(protocols.Backend, name)).parameters
    parameters = inspect.signature(getattr(kind, name)).parameters
    assert [
        (parameter.name, parameter.kind, parameter.default) for parameter in parameters.values()
    ] == [(parameter.name, parameter.kind, parameter.default) for parameter in declared.values()]


class Table:
    """A backend that is none of ours: it reads its distributions off a table of three tokens."""

    max_length = 9

    def __init__(self, *shares):
        self.log_p = torch.tensor([[math.log(share) for share in shares]])

    def top_k(self, rows, *, k, width=None):
        assert k is None and width == 3
        return (
            TopK(torch.arange(3).expand(row.count, 3), self.log_p.expand(row.count, 3))
            for row in rows
        )


def test_fidelity_asks_any_backend_that_can_read():
    shares = torch.tensor([[0.5, 0.25, 0.25]])
    teacher = [
        TeacherReading(PromptedAnswer([1] * before, [0] * after), shares.log().expand(after, 3))
        for before, after in ((1, 2), (2, 8), (3, 1))
    ]
    same, other = (
        token_fidelity("t", teacher, Table(0.5, 0.25, 0.25)),
        token_fidelity("t", teacher, Table(0.25, 0.5, 0.25)),
    )
    assert (same.items, other.items) == (2, 2)  # the second text is longer than what it can read
    assert same.kl == pytest.approx(0, abs=1e-7) and same.agreement == 1
    assert other.kl == pytest.approx(0.25 * math.log(2)) and other.agreement == 0
