"""How text becomes tokens and tokens become text again, for every family of tokenizers.

A text and what follows it are encoded as one: where a tokenizer puts a mark before a word (`▁A`),
joins letters across the seam, or ends every text with EOS, two parts encoded apart are other tokens
than the model will ever see.
"""

from collections.abc import Sequence
from typing import Any


def encode_prompt(tokenizer: Any, text: str, *, special: bool | None = None) -> list[int]:
    """Encode a prompt: special tokens as the tokenizer adds them, but no second BOS before a text
    that brings one of its own.
    """
    add = True if special is None else special
    return list(
        tokenizer(text, add_special_tokens=add and not starts_with_bos(tokenizer, text))[
            "input_ids"
        ]
    )


def starts_with_bos(tokenizer: Any, text: str) -> bool:
    """Tell whether a text (a chat template's) begins with BOS, be it behind white space."""
    bos = tokenizer.bos_token
    return bool(bos) and text.lstrip().startswith(bos)


def encode_pair(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Encode a prompt with its completion as one text, and cut where the prompt's own tokens end;
    no EOS at the end.

    A token that holds the last of the prompt and the first of the completion belongs to the
    completion.
    """
    whole = encode_prompt(tokenizer, prompt + completion)
    if whole and whole[-1] == tokenizer.eos_token_id:
        whole.pop()
    cut = shared_prefix_length(encode_prompt(tokenizer, prompt), whole)
    return whole[:cut], whole[cut:]


def shared_prefix_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many tokens two sequences share at their beginning."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def decode_continuation(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """Decode what was written behind a prompt as it goes on there: alone, many tokenizers drop the
    space before its first word.
    """
    before = tokenizer.decode(list(prompt), skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *ids], skip_special_tokens=True)
    if whole.startswith(before):
        return str(whole[len(before) :])
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def with_leading_space(tokenizer: Any, prompt: str, text: str) -> str:
    """Return a text that was decoded without its prompt, with the space that decoding alone has
    dropped before its first word.
    """
    spaced = prompt[-1:].isspace() or text[:1].isspace() or not _drops_space(tokenizer)
    return text if spaced else f" {text}"


def _drops_space(tokenizer: Any) -> bool:
    """Tell whether a word that is decoded alone loses the space before it."""
    ids = tokenizer("a b", add_special_tokens=False)["input_ids"]
    cut = len(_first_word(tokenizer, ids))
    return not str(tokenizer.decode(ids[cut:])).startswith(" ")


def _first_word(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Return the tokens of the first of two words."""
    for count in range(1, len(ids)):
        if str(tokenizer.decode(list(ids[:count]))).strip() == "a":
            return list(ids[:count])
    return list(ids[:1])


def appends_eos(tokenizer: Any) -> bool:
    """Tell whether a tokenizer ends every prompt with EOS: what a model is then asked to go on from
    is the end of a text.
    """
    eos = tokenizer.eos_token_id
    return eos is not None and tokenizer("a")["input_ids"][-1:] == [eos]


def token_ends(tokenizer: Any, text: str) -> list[int] | None:
    """Return behind how many characters of a text each of its tokens ends, special ones at 0; None
    where a tokenizer cannot tell.
    """
    if not getattr(tokenizer, "is_fast", False):
        return None
    told = tokenizer(
        text, add_special_tokens=not starts_with_bos(tokenizer, text), return_offsets_mapping=True
    )
    return [int(end) for _, end in told["offset_mapping"]]
