"""A quantized cache in scoring: packs, batches and slots give what decoding by tokens gives."""

from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM

from harness.models.cache_format import CacheFormat
from harness.models.language_model import open_model
from harness.models.quantized_cache import QuantizedCache
from harness.models.shaping import copy_student
from harness.scoring.backend import LikelihoodRequest
from harness.scoring.generation import generate, reason_for_plain_path
from harness.scoring.likelihood import log_likelihoods
from harness.scoring.reading import Reader

FORMATS = (CacheFormat(bits=8, group=64), CacheFormat(bits=4, group=32))
SHARED = list(range(5, 75))
REQUESTS = [
    LikelihoodRequest([*SHARED, *tail], count)
    for tail, count in (([7, 8, 9], 2), ([7, 8, 10], 1), ([11], 1), ([11, 12, 13, 14], 3))
] + [LikelihoodRequest(list(range(200, 200 + length)), 4) for length in (9, 30)]


@pytest.fixture(scope="module", params=FORMATS, ids=lambda cache_format: cache_format.label)
def folder(request, random_model, tmp_path_factory):
    place = tmp_path_factory.mktemp("kv") / "student"
    return copy_student(random_model, place, name="kv", cache_format=request.param)


@pytest.fixture(scope="module")
def token_by_token(folder):
    """Return what plain transformers and the cache of codes give, one token at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder.path).eval()

    @cache
    def logits(ids):
        codes = QuantizedCache.of(model.config)
        with torch.no_grad():
            steps = [model(torch.tensor([[t]]), cache=codes, use_cache=True) for t in ids]
        return torch.stack([step.logits[0, -1] for step in steps])

    return logits


def expected(token_by_token, request):
    log_p = torch.log_softmax(token_by_token(tuple(request.ids[:-1])), dim=-1)
    places = range(len(request.ids) - request.count, len(request.ids))
    return sum(float(log_p[place - 1, request.ids[place]]) for place in places)


@pytest.mark.parametrize("path", ["shared", "plain"])
def test_packs_of_any_size_are_scored_as_decoding_token_by_token(
    folder, token_by_token, path, monkeypatch, random_model
):
    opened = open_model(folder)
    assert reason_for_plain_path(opened) == ""
    if path == "plain":
        for place in ("likelihood", "generation"):
            monkeypatch.setattr(f"harness.scoring.{place}.reason_for_plain_path", lambda _: "test")
    by_hand = [expected(token_by_token, request) for request in REQUESTS]
    for size in (3, 16, 1_000):
        scored = log_likelihoods(opened, REQUESTS, pack=size, batch_size=size)
        assert [value for value, _ in scored] == pytest.approx(by_hand, abs=1e-4)
    floats = log_likelihoods(open_model(random_model), REQUESTS)
    assert max(abs(a.log_probability - b) for a, b in zip(floats, by_hand, strict=True)) > 1e-4


@pytest.mark.parametrize("size", [1, 3, 16])
def test_answers_are_those_of_the_cache_of_codes_whatever_the_batch(folder, token_by_token, size):
    opened = open_model(folder)
    prompts = [[*SHARED, *tail] for tail in ([9], [8, 7], [6, 5, 4], [20] * 9)]
    prompts += [[30, 31, 32], list(range(100, 140))]
    answers = generate(opened, prompts, max_new_tokens=6, batch_size=size)
    for prompt, answer in zip(prompts, answers, strict=True):
        text = [*prompt, *answer.ids]
        greedy = token_by_token(tuple(text[:-1]))[len(prompt) - 1 :].argmax(dim=-1).tolist()
        assert greedy == list(answer.ids)


def test_distributions_are_read_as_decoding_gives_them(folder, token_by_token):
    tops = list(Reader(open_model(folder)).top_k(REQUESTS, k=None))
    for request, top in zip(REQUESTS, tops, strict=True):
        decoded = torch.log_softmax(token_by_token(tuple(request.ids[:-1])), -1)[-request.count :]
        assert (top.log_p_NK - decoded).abs().max() < 1e-4


def test_training_sees_the_cache_and_its_gradients_pass(folder, random_model):
    ids = torch.tensor([SHARED])
    losses = {}
    for name, checkpoint in (("codes", folder), ("floats", random_model)):
        model = open_model(checkpoint).model.train()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses[name] = float(loss.detach())
        gradients = [weight.grad for key, weight in model.named_parameters() if "k_proj" in key]
        assert all(float(gradient.abs().max()) > 0 for gradient in gradients)
    assert losses["codes"] != losses["floats"]
