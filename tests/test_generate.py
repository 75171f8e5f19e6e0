"""Decoding: the batch does not change an answer, and rows do not wait for each other."""

import pytest
import torch

from harness.generate import Sampling, generate
from harness.model import open_model


@pytest.fixture(scope="module")
def opened(random_model):
    return open_model(random_model)


def prompts_of(count):
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(3, 500, (int(torch.randint(3, 40, (1,), generator=draw)),), generator=draw).tolist() for _ in range(count)]


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0, seed=5)])
def test_batch_size_does_not_change_an_answer(opened, sampling):
    prompts = prompts_of(16)
    one = generate(opened, prompts, max_new_tokens=24, batch_size=1, sampling=sampling)
    eight = generate(opened, prompts, max_new_tokens=24, batch_size=8, sampling=sampling)
    assert one == eight
    assert len({answer.text for answer in one}) > 8  # a model that always says the same would prove nothing


def test_greedy_answers_are_those_of_transformers(opened):
    for prompt in prompts_of(4):
        ours = generate(opened, [prompt], max_new_tokens=12)[0]
        theirs = opened.model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=12, do_sample=False
        )
        assert ours.text == opened.tokenizer.decode(theirs[0, len(prompt) :], skip_special_tokens=True)


def test_a_stop_string_cuts_its_row_alone(opened):
    prompts = prompts_of(6)
    free = generate(opened, prompts, max_new_tokens=24)
    word = free[0].text[4:6]
    stopped = generate(opened, prompts, max_new_tokens=24, stop=(word,))
    for before, after in zip(free, stopped, strict=True):
        if word in before.text:
            assert after.text == before.text[: before.text.index(word)]
            assert after.stop == "stop"
        else:
            assert after == before
    assert stopped[0].tokens < free[0].tokens


def test_a_stop_string_that_is_a_special_token_stops(random_model):
    opened = open_model(random_model)  # its tokenizer is changed below
    prompt = prompts_of(1)
    token = opened.tokenizer.convert_ids_to_tokens(opened.tokenizer(generate(opened, prompt, max_new_tokens=8)[0].text)["input_ids"][0])
    opened.tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    stopped = generate(opened, prompt, max_new_tokens=8, stop=(token,))[0]
    assert (stopped.text, stopped.stop, stopped.tokens) == ("", "eos", 1)


def test_finished_rows_leave_the_batch(opened, monkeypatch):
    prompts = prompts_of(8)
    free = generate(opened, prompts, max_new_tokens=20)
    word = free[0].text[6:8]
    sizes = []
    forward = opened.model.forward

    def watched(*args, **kwargs):
        if kwargs["input_ids"].shape[1] == 1:  # steps; the prompts' own forward gives each row its first token
            sizes.append(kwargs["input_ids"].shape[0])
        return forward(*args, **kwargs)

    monkeypatch.setattr(opened.model, "forward", watched)
    stopped = generate(opened, prompts, max_new_tokens=20, stop=(word,), batch_size=8)
    assert sum(sizes) == sum(answer.tokens - 1 for answer in stopped)  # not one forward for a row that is over


def test_length_is_the_reason_of_an_answer_that_did_not_end(opened):
    assert all(answer.stop in {"length", "eos"} for answer in generate(opened, prompts_of(4), max_new_tokens=2))
    assert all(answer.tokens <= 2 for answer in generate(opened, prompts_of(4), max_new_tokens=2))
