"""How text becomes tokens and tokens become text again, for every family of tokenizers.

A text and its continuation are encoded together. Where a tokenizer puts a mark before a word
(`▁A`), joins letters across the border, or ends every text with EOS, two parts that are encoded
separately give other tokens than the model will ever see.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple


class EncodedPair(NamedTuple):
    """The token ids of a prompt and of the completion behind it."""

    prompt: list[int]
    completion: list[int]


def encode_prompt(tokenizer: Any, text: str, *, special: bool | None = None) -> list[int]:
    """Encode a prompt, with the tokenizer's special tokens but never with two BOS."""
    adds_special = True if special is None else special
    return list(
        tokenizer(text, add_special_tokens=adds_special and not starts_with_bos(tokenizer, text))[
            "input_ids"
        ]
    )


def starts_with_bos(tokenizer: Any, text: str) -> bool:
    """Tell whether a text begins with BOS, white space aside (a chat template's does)."""
    bos = tokenizer.bos_token
    return bool(bos) and text.lstrip().startswith(bos)


def encode_pair(tokenizer: Any, prompt: str, completion: str) -> EncodedPair:
    """Encode a prompt and its completion as one text; return the tokens of each, without EOS.

    A token with letters of both belongs to the completion.
    """
    ids = encode_prompt(tokenizer, prompt + completion)
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    prompt_length = shared_prefix_length(encode_prompt(tokenizer, prompt), ids)
    return EncodedPair(ids[:prompt_length], ids[prompt_length:])


def shared_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two sequences share at their beginning."""
    for index, (token, other_token) in enumerate(zip(first, second, strict=False)):
        if token != other_token:
            return index
    return min(len(first), len(second))


def decode_continuation(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """Decode tokens that were written behind a prompt, as they read there.

    Decoded alone, many tokenizers drop the space before the first word.
    """
    prompt_text = tokenizer.decode(list(prompt), skip_special_tokens=True)
    full_text = tokenizer.decode([*prompt, *ids], skip_special_tokens=True)
    if full_text.startswith(prompt_text):
        return str(full_text[len(prompt_text) :])
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def with_leading_space(tokenizer: Any, prompt: str, text: str) -> str:
    """Return a text that was decoded without its prompt, with the space that this dropped."""
    keeps_text = prompt[-1:].isspace() or text[:1].isspace() or not _drops_space(tokenizer)
    return text if keeps_text else f" {text}"


def _drops_space(tokenizer: Any) -> bool:
    """Tell whether a word that is decoded alone loses the space before it."""
    ids = tokenizer("a b", add_special_tokens=False)["input_ids"]
    first_length = len(_first_word(tokenizer, ids))
    return not str(tokenizer.decode(ids[first_length:])).startswith(" ")


def _first_word(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Return the tokens of the first of two words."""
    for count in range(1, len(ids)):
        if str(tokenizer.decode(list(ids[:count]))).strip() == "a":
            return list(ids[:count])
    return list(ids[:1])


def appends_eos(tokenizer: Any) -> bool:
    """Tell whether a tokenizer ends every prompt with EOS.

    A model then continues after the end of a text.
    """
    eos = tokenizer.eos_token_id
    return eos is not None and tokenizer("a")["input_ids"][-1:] == [eos]


def token_ends(tokenizer: Any, text: str) -> list[int] | None:
    """Return after how many characters each token of a text ends, special tokens at 0.

    None where the tokenizer does not report offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        return None
    encoding = tokenizer(
        text, add_special_tokens=not starts_with_bos(tokenizer, text), return_offsets_mapping=True
    )
    return [int(end) for _, end in encoding["offset_mapping"]]
