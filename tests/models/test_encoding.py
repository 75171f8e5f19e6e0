"""Text and tokens, over every family of tokenizers: one encoding of context and continuation, in
scoring, training and reading.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import _tokenizers

from harness.errors import CellFailed
from harness.models.encoding import (
    appends_eos,
    decode_continuation,
    encode_pair,
    encode_prompt,
    token_ends,
    with_leading_space,
)
from harness.models.language_model import LanguageModel
from harness.scoring.lm_eval_model import HarnessLM

FAMILIES = tuple(_tokenizers.TOKENIZERS)
PAIRS = [
    ("Question: two plus three?\nAnswer:", " A"),
    ("Question: two plus three?\nAnswer:", " the red fox"),
    ("the red", " fox, 日本 Ünal"),
    ("value ", "seven"),
    ("- ", "42"),
    ("Answer:\n", "nine"),
    ("Answer", "s are 12"),
    ("count:", "\n3.5"),
]


@pytest.fixture(scope="module")
def tokenizers():
    return {family: _tokenizers.build_tokenizer(family) for family in FAMILIES}


@pytest.fixture(scope="module")
def opened(tokenizers, tmp_path_factory):
    """Return a maker of one random model's openings, each with another tokenizer."""
    import _architectures

    from harness.models.checkpoint import describe

    model = _architectures.random_model("llama", vocabulary=max(map(len, tokenizers.values())))
    folder = tmp_path_factory.mktemp("encoding")
    model.config.save_pretrained(folder)
    return lambda family: LanguageModel(
        model, tokenizers[family], "cpu", describe(folder, name=family)
    )


def asked(kind, *arguments, item=0):
    from lm_eval.api.instance import Instance

    return Instance(
        request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("own", item, 1)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_lm_evals_in_every_family(family, opened):
    from lm_eval.models.huggingface import HFLM

    model = opened(family)
    requests = [
        asked("loglikelihood", *pair, item=number)
        for number, pair in enumerate([*PAIRS, ("", "the red fox")])
    ]
    peer, refused = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=1), 0
    for request in requests:
        try:
            [theirs] = peer.loglikelihood([request], disable_tqdm=True)
        except AssertionError:  # its own: the continuation became no token
            refused += 1
            with pytest.raises(CellFailed, match="becomes no token of its own"):
                HarnessLM(model).loglikelihood([request])
            continue
        [ours] = HarnessLM(model, batch_size=3).loglikelihood([request])
        assert ours[0] == pytest.approx(theirs[0], abs=1e-4) and ours[1] == theirs[1]
    assert refused <= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_text_is_scored_as_lm_eval_scores_it(family, opened):
    from lm_eval.models.huggingface import HFLM

    model = opened(family)
    requests = [
        asked("loglikelihood_rolling", " ".join(_tokenizers.WORDS) * times) for times in (1, 4)
    ]
    theirs = HFLM(
        pretrained=model.model, tokenizer=model.tokenizer, batch_size=1
    ).loglikelihood_rolling(requests, disable_tqdm=True)
    assert HarnessLM(model).loglikelihood_rolling(requests) == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_row_is_the_encoding_of_its_whole_text(family, tokenizers):
    from methods.training.rows import encode

    tokenizer = tokenizers[family]
    rows, too_long = encode(tokenizer, PAIRS, longest=10_000)
    assert not too_long
    for row, (prompt, completion) in zip(rows, PAIRS, strict=True):
        whole = tokenizer(prompt + completion)["input_ids"]
        assert list(row.ids) == (
            whole if appends_eos(tokenizer) else [*whole, tokenizer.eos_token_id]
        )
        assert 0 < row.trained_from < len(row.ids) - 1
        # What is trained holds the whole completion, and what is shown is how the prompt itself
        # begins.
        assert (
            list(row.ids[: row.trained_from]) == tokenizer(prompt)["input_ids"][: row.trained_from]
        )


def test_byte_level_rows_are_what_they_were_when_prompt_and_completion_were_encoded_apart(
    tokenizers,
):
    tokenizer = tokenizers["byte-bpe"]
    for prompt, completion in PAIRS[:3]:
        apart = [
            tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, completion)
        ]
        assert list(encode_pair(tokenizer, prompt, completion)) == apart


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_written_goes_on_behind_its_prompt(family, tokenizers):
    """A teacher's answer is trained behind the prompt that it was written for: with the space
    before its first word.
    """
    tokenizer = tokenizers[family]
    before, after = encode_pair(tokenizer, "the red fox", " walks over a hill")
    text = decode_continuation(tokenizer, before, after)
    assert text == " walks over a hill"
    assert encode_pair(tokenizer, "the red fox", text) == (before, after)
    alone = tokenizer.decode(after, skip_special_tokens=True)
    assert encode_pair(
        tokenizer, "the red fox", with_leading_space(tokenizer, "the red fox", alone)
    ) == (
        before,
        after,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_boundaries_are_counted_in_characters(family, tokenizers):
    tokenizer = tokenizers[family]
    text = "the red fox walks 42"
    ends = token_ends(tokenizer, text)
    assert max(ends) == len(text) and len(ends) == len(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("other", FAMILIES)
def test_two_tokenizers_meet_at_the_ends_of_words(other, tokenizers):
    from methods.uld import aligned_rows

    [row], _ = aligned_rows(
        tokenizers["prepend"], tokenizers[other], [("the red fox", " walks over")], longest=500
    )
    assert (0, 0) in row.teacher_tokens.pairs and len(row.teacher_tokens.pairs) >= 2
    # behind the last token before EOS both have read it all
    assert row.teacher_tokens.pairs[-1][0] == row.trained_tokens - 1


def test_a_continuation_without_a_token_is_refused_by_its_item(opened):
    lm = HarnessLM(opened("byte-bpe"))
    with pytest.raises(CellFailed, match="task own, item 3: the continuation '' becomes no token"):
        lm.loglikelihood([asked("loglikelihood", "the red", "", item=3)])
    with pytest.raises(CellFailed, match=r"item 1: the continuation .* becomes no token"):
        HarnessLM(opened("wordpiece")).loglikelihood(
            [asked("loglikelihood", "the red", "  ", item=1)]
        )
    with pytest.raises(CellFailed, match=r"the context .* becomes no token"):
        lm.loglikelihood([asked("loglikelihood", " ", "red")])


def test_a_tokenizer_that_appends_eos_is_said_so(opened):
    assert any(
        "ends every prompt with '</s>'" in note for note in HarnessLM(opened("appends-eos")).notes
    )
    assert not HarnessLM(opened("byte-bpe")).notes


def test_without_eos_answers_end_by_length_and_nothing_is_trained(opened, tokenizers):
    from harness.scoring.generation import generate
    from methods.training.rows import encode

    bare = _tokenizers.build_tokenizer("byte-bpe")
    bare.bos_token = bare.eos_token = bare.pad_token = None
    one = opened("byte-bpe")
    model = LanguageModel(one.model, bare, "cpu", one.checkpoint)
    model.model.generation_config.eos_token_id = None
    lm = HarnessLM(model, batch_size=2)
    assert lm.generate_until(
        [
            asked("generate_until", "the red", {"max_gen_toks": 4}),
            asked("generate_until", "fox", {"max_gen_toks": 4}),
        ]
    )
    assert all(
        answer.stop == "length" for answer in generate(model, [[5, 6], [7]], max_new_tokens=3)
    )
    assert any("has no EOS" in note for note in lm.notes)
    assert lm.loglikelihood([asked("loglikelihood", "the", " red")])[0][0] < 0
    for ask in (
        lambda: lm.loglikelihood([asked("loglikelihood", "", "red")]),
        lambda: lm.loglikelihood_rolling([asked("", "red fox")]),
    ):
        with pytest.raises(CellFailed, match="neither BOS nor EOS"):
            ask()
    with pytest.raises(CellFailed, match="has no EOS, so no answer could end"):
        encode(bare, PAIRS, longest=100)


def test_a_template_that_begins_with_white_space_adds_no_second_bos(opened, tokenizers):
    tokenizer = tokenizers["byte-bpe-bos"]
    bos = tokenizer.bos_token_id
    assert (
        encode_prompt(tokenizer, "<s>the red").count(bos)
        == encode_prompt(tokenizer, "\n<s>the red").count(bos)
        == 1
    )
    assert encode_prompt(tokenizer, "the red")[0] == bos
    model = opened("byte-bpe-bos")
    tokenizer.chat_template = "\n<s>{% for m in messages %}{{ m.content }}{% endfor %}"
    lm = HarnessLM(model)
    text = lm.apply_chat_template([{"role": "user", "content": "the red fox"}])
    tokenizer.chat_template = None
    assert lm.tok_encode(text).count(bos) == 1 and any(
        "white space before its BOS" in note for note in lm.notes
    )


def test_ids_outside_the_embedding_table_are_a_line_and_padding_is_none_of_them(tokenizers, opened):
    from harness.scoring.generation import generate

    one = opened("byte-bpe")
    grown = _tokenizers.build_tokenizer("byte-bpe")
    grown.add_special_tokens(
        {
            "pad_token": "[PAD]",
            "additional_special_tokens": [f"[{n}]" for n in range(one.vocabulary)],
        }
    )
    model = LanguageModel(one.model, grown, "cpu", one.checkpoint)
    assert grown.pad_token_id < model.vocabulary or model.pad_id < model.vocabulary
    outside = f"[{one.vocabulary - 1}]"
    with pytest.raises(CellFailed, match="its embedding table has"):
        HarnessLM(model).loglikelihood([asked("loglikelihood", "the red", f" fox{outside}")])
    with pytest.raises(CellFailed, match="resize_token_embeddings"):
        HarnessLM(model).generate_until(
            [asked("generate_until", f"the {outside}", {"max_gen_toks": 2})]
        )
    grown.pad_token = outside
    assert model.pad_id < model.vocabulary <= grown.pad_token_id
    prompts = [[5, 6, 7], [8]]
    assert generate(model, prompts, max_new_tokens=4, batch_size=2) == [
        generate(one, [p], max_new_tokens=4)[0] for p in prompts
    ]
