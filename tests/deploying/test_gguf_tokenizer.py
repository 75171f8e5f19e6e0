"""Tokenizers in GGUF: ways of cutting texts by their names, and tokens by their kinds."""

import pytest

from harness.deploying.gguf_tokenizer import _LLAMA_3, _QWEN_2, _tokens, add_tokenizer, cut_name
from harness.errors import HarnessError
from harness.models.resolve import EMBEDDED

LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def sequence(*steps):
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}}


def split(pattern, **changes):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", **changes}


@pytest.mark.parametrize(
    ("tokenizer", "name"),
    [
        ({"pre_tokenizer": LEVEL}, "gpt-2"),
        (sequence(LEVEL), "gpt-2"),
        (sequence(DIGITS, LEVEL), "smollm"),
        (sequence(split(_LLAMA_3), {**LEVEL, "use_regex": False}), "llama-bpe"),
        (sequence(split(_QWEN_2), {**LEVEL, "use_regex": False}), "qwen2"),
        (sequence(split(r"\d"), {**LEVEL, "use_regex": False}), ""),
        (sequence(split(_LLAMA_3, invert=True), {**LEVEL, "use_regex": False}), ""),
        ({"pre_tokenizer": {**LEVEL, "add_prefix_space": True}}, ""),
        ({"pre_tokenizer": LEVEL, "normalizer": {"type": "NFC"}}, ""),
        ({"pre_tokenizer": {"type": "Metaspace"}}, ""),
        ({}, ""),
    ],
)
def test_a_way_of_cutting_has_llama_cpps_name_or_none(tokenizer, name):
    assert cut_name(tokenizer) == name


def test_tokens_have_their_kinds_and_rows_without_one_are_unused():
    added = [
        {"id": 0, "content": "<s>", "special": True},
        {"id": 3, "content": "<tool>", "special": False},
    ]
    tokenizer = {"model": {"vocab": {"<s>": 0, "a": 1, "b": 2}}, "added_tokens": added}
    texts, kinds = _tokens(tokenizer, 6)
    assert texts == ["<s>", "a", "b", "<tool>", "[PAD4]", "[PAD5]"]
    assert kinds == [3, 1, 1, 4, 5, 5]


def test_a_tokenizer_without_a_name_is_refused_with_what_to_do():
    with pytest.raises(HarnessError, match=r"llama\.cpp has no name for its tokenizer") as caught:
        add_tokenizer(None, EMBEDDED / "tiny", "row", 1024)
    assert "type --form safetensors" in str(caught.value) and "\n" not in str(caught.value)
