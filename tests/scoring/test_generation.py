"""Decoding: the batch does not change an answer, and rows do not wait for each other."""

from itertools import pairwise

import pytest
import torch

from harness.models.language_model import open_model
from harness.scoring.generation import Sampling, generate


@pytest.fixture(scope="module")
def opened(random_model):
    return open_model(random_model)


def prompts_of(count):
    draw = torch.Generator().manual_seed(3)
    return [
        torch.randint(
            3, 500, (int(torch.randint(3, 40, (1,), generator=draw)),), generator=draw
        ).tolist()
        for _ in range(count)
    ]


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0, seed=5)])
def test_batch_size_does_not_change_an_answer(opened, sampling):
    prompts = prompts_of(16)
    one_at_once = generate(opened, prompts, max_new_tokens=24, batch_size=1, sampling=sampling)
    eight_at_once = generate(opened, prompts, max_new_tokens=24, batch_size=8, sampling=sampling)
    assert one_at_once == eight_at_once
    # a model that always says the same would prove nothing
    assert len({answer.text for answer in one_at_once}) > 8


def test_greedy_answers_are_those_of_transformers(opened):
    for prompt in prompts_of(4):
        ours = generate(opened, [prompt], max_new_tokens=12)[0]
        theirs = opened.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=12,
            do_sample=False,
        )
        assert ours.text == opened.tokenizer.decode(
            theirs[0, len(prompt) :], skip_special_tokens=True
        )


def test_a_stop_string_cuts_its_row_alone(opened):
    prompts = prompts_of(6)
    free = generate(opened, prompts, max_new_tokens=24)
    word = free[0].text[4:6]
    stopped = generate(opened, prompts, max_new_tokens=24, stop=(word,))
    for free_answer, answer in zip(free, stopped, strict=True):
        if word in free_answer.text:
            assert answer.text == free_answer.text[: free_answer.text.index(word)]
            assert answer.stop == "stop"
        else:
            assert answer == free_answer
    assert stopped[0].tokens < free[0].tokens


def test_a_stop_string_that_is_a_special_token_stops(random_model):
    opened = open_model(random_model)  # its tokenizer is changed below
    prompt = prompts_of(1)
    token = opened.tokenizer.convert_ids_to_tokens(
        opened.tokenizer(generate(opened, prompt, max_new_tokens=8)[0].text)["input_ids"][0]
    )
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
        # steps; the prompts' own forward gives each row its first token
        if kwargs["input_ids"].shape[1] == 1:
            sizes.append(kwargs["input_ids"].shape[0])
        return forward(*args, **kwargs)

    monkeypatch.setattr(opened.model, "forward", watched)
    stopped = generate(opened, prompts, max_new_tokens=20, stop=(word,), batch_size=8)
    # not one forward for a row that is over
    assert sum(sizes) == sum(answer.tokens - 1 for answer in stopped)


def test_length_is_the_reason_of_an_answer_that_did_not_end(opened):
    assert all(
        answer.stop in {"length", "eos"}
        for answer in generate(opened, prompts_of(4), max_new_tokens=2)
    )
    assert all(answer.tokens <= 2 for answer in generate(opened, prompts_of(4), max_new_tokens=2))


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({}, 256),
        ({"max_gen_toks": 3, "max_new_tokens": 9}, 3),
        ({"max_new_tokens": 5}, 5),
        ({"max_tokens": 6}, 6),
        ({"max_completion_tokens": 7}, 7),
        ({"max_new_tokens": 9, "max_tokens": 2}, 9),
    ],
)
def test_lengths_have_lm_evals_names(settings, tokens):
    from harness.scoring.greedy import greedy_settings

    assert greedy_settings(
        {**settings, "until": [""], "temperature": 0.0, "top_p": 0.9}, task="t", eos="</s>"
    ) == (tokens, ("</s>",))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"do_sample": True}, "only greedy"),
        ({"temperature": 0.7}, "only greedy"),
        ({"num_beams": 4}, "only greedy"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size"),
        ({"max_length": 50}, "max_length"),
        ({"max_tokens": 0}, "answers of 0 tokens"),
    ],
)
def test_what_greedy_decoding_cannot_do_is_refused_by_name(settings, why):
    from harness.errors import CellFailed
    from harness.scoring.greedy import greedy_settings

    with pytest.raises(CellFailed, match=why):
        greedy_settings(settings, task="t", eos=None)


def test_stop_strings_are_those_of_lm_eval():
    from harness.scoring.greedy import greedy_settings

    stops = [
        greedy_settings({"until": until}, task="t", eos="</s>")[1]
        for until in ("Q:", ["Q:", ""], None, [], ["</s>", "Q:"])
    ]
    assert stops == [("Q:", "</s>"), ("Q:", "</s>"), ("</s>",), ("</s>",), ("</s>", "Q:")]
    assert greedy_settings(
        {"repetition_penalty": 1.0, "num_beams": 1, "min_length": 0}, task="t", eos=None
    ) == (256, ())


def test_stop_strings_cut_one_after_the_other(opened):
    """As lm-eval cuts: of two that overlap, the one that is listed first decides."""
    from harness.scoring.stopping import StopRule

    ids = opened.tokenizer("red fox", add_special_tokens=False)["input_ids"]
    for stop, text in (
        ((" f", "d "), "red"),
        (("d ", " f"), "re"),
        ((" f",), "red"),
        (("z", ""), "red fox"),
    ):
        answer = StopRule.of(opened, stop).finish(ids)
        assert (answer.text, answer.stop) == (text, "stop" if text != "red fox" else "length")


def test_settings_of_a_generation_config_that_greedy_decoding_leaves_out_are_said(random_model):
    from harness.scoring.lm_eval_model import HarnessLM

    opened = open_model(random_model)
    assert not HarnessLM(opened).notes
    opened.model.generation_config.repetition_penalty = 1.3
    opened.model.generation_config.no_repeat_ngram_size = 2
    # sampling: lm-eval is greedy too
    opened.model.generation_config.temperature, opened.model.generation_config.do_sample = 0.6, True
    [note] = HarnessLM(opened).notes
    assert (
        "repetition_penalty=1.3" in note
        and "no_repeat_ngram_size=2" in note
        and "temperature" not in note
    )


def forbidding(opened, kind):
    """Return a config that forbids what the model prefers, the prompts, and its free answers."""
    prompts = [[*range(3, 60), *prompt] for prompt in prompts_of(5)]  # a common beginning
    free = [answer.ids for answer in generate(opened, prompts, max_new_tokens=12)]
    tokens = sorted({token for ids in free for token in ids[:6]})
    pairs = [list(pair) for ids in free for pair in pairwise(ids)]
    forms = {
        "one token": {"bad_words_ids": [[token] for token in tokens]},
        "two tokens": {"bad_words_ids": pairs},
        "behind the prompt": {
            "bad_words_ids": [
                [*prompt[-2:], ids[0]] for prompt, ids in zip(prompts, free, strict=True)
            ]
        },
        "suppressed": {"suppress_tokens": tokens},
        "first": {"begin_suppress_tokens": tokens},
        "all": {
            "suppress_tokens": tokens[::2],
            "bad_words_ids": [*pairs, [tokens[1]]],
            "begin_suppress_tokens": tokens[:3],
        },
        "EOS": {"bad_words_ids": [[0], [tokens[0]]], "eos_token_id": [0, tokens[0]]},
        "outside": {"suppress_tokens": [5_000, tokens[0]]},
    }
    return forms[kind], prompts, free


@pytest.mark.parametrize("size", [1, 3, 16])
@pytest.mark.parametrize(
    "kind",
    [
        "one token",
        "two tokens",
        "behind the prompt",
        "suppressed",
        "first",
        "all",
        "EOS",
        "outside",
    ],
)
def test_tokens_that_a_generation_config_forbids_are_not_written(kind, size, random_model):
    opened = open_model(random_model)  # its generation config is changed below
    settings, prompts, free = forbidding(opened, kind)
    for name, value in settings.items():
        setattr(opened.model.generation_config, name, value)
    ours = generate(opened, prompts, max_new_tokens=12, batch_size=size)
    for prompt, answer in zip(prompts, ours, strict=True):
        theirs = opened.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=12,
            do_sample=False,
        )
        assert list(answer.ids) == theirs[0, len(prompt) :].tolist()
    assert [answer.ids for answer in ours] != free


def test_forbidden_tokens_are_noted_where_the_engine_writes_them(random_model):
    from harness.scoring.greedy import model_notes

    opened = open_model(random_model)
    opened.model.generation_config.bad_words_ids = [[7]]
    assert (
        model_notes(opened) == [] and "bad_words_ids=[[7]]" in model_notes(opened, forbids=False)[0]
    )


@pytest.mark.slow
def test_importing_our_model_hides_none_of_lm_evals_own():
    import subprocess
    import sys

    code = (
        "import harness.scoring.lm_eval_model; from lm_eval.api.registry import get_model; "
        "print(get_model('hf').__name__, get_model('harness').__name__)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout.split() == ["HFLM", "LmEvalModel"]
