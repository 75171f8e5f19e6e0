"""What a task or a generation config asks of decoding, by lm-eval's names, and what greedy decoding
here makes of it.
"""

from collections.abc import Mapping
from typing import Any

from harness.errors import CellFailed
from harness.models.encoding import appends_eos
from harness.models.language_model import LanguageModel
from harness.scoring.forbidden import HONOURED

DEFAULT_NEW_TOKENS = 256  # lm-eval's own default where a task names none
# Settings of sampling and of beams, without which they do nothing.
_IDLE = {
    "do_sample",
    "num_beams",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "use_cache",
    "length_penalty",
    "early_stopping",
}
# Settings that change what greedy decoding writes, each with the value that changes nothing.
_CHANGING = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": [],
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "sequence_bias": {},
    "guidance_scale": 1.0,
    "exponential_decay_length_penalty": None,
}


def greedy_settings(
    asked: Mapping[str, Any], *, task: str, eos: str | None
) -> tuple[int, tuple[str, ...]]:
    """Return the longest answer in tokens and its stop strings, by lm-eval's aliases; what greedy
    decoding cannot do is refused.
    """
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    settings = dict(normalize_gen_kwargs(dict(asked), DEFAULT_NEW_TOKENS))
    stop = handle_stop_sequences(settings.pop("until"), eos=eos)
    new_tokens = int(settings.pop("max_gen_toks"))
    if settings.get("do_sample") or settings.get("num_beams", 1) != 1:
        raise CellFailed(
            f"task {task} asks for sampling or beams ({dict(asked)}); only greedy decoding is "
            "scored"
        )
    if new_tokens < 1:
        raise CellFailed(
            f"task {task} asks for answers of {new_tokens} tokens; set its max_gen_toks to 1 or "
            "more"
        )
    nothing = object()
    other = {
        key: value for key, value in settings.items() if key not in _IDLE and value is not None
    }
    changing = {key: value for key, value in other.items() if value != _CHANGING.get(key, nothing)}
    if changing:
        raise CellFailed(
            f"task {task} asks for {changing}, which decoding here does not do; leave it out of "
            "its generation_kwargs"
        )
    # an empty stop string stops nothing, as in lm-eval
    return new_tokens, tuple(str(text) for text in stop if text)


def notes_of(opened: LanguageModel, *, forbids: bool = True) -> list[str]:
    """Return what a reader of a model's scores should know of its tokenizer and its generation
    config.

    `forbids`: whether what answers leaves out the tokens that the generation config forbids.
    """
    notes = []
    name, tokenizer = opened.checkpoint.name, opened.tokenizer
    if appends_eos(tokenizer):
        notes.append(
            f"the tokenizer of {name} ends every prompt with {tokenizer.eos_token!r}, and answers "
            "are read behind it, as lm-eval reads "
            "them: the scores mean little; set add_eos_token to false in its tokenizer_config.json"
        )
    if opened.tokenizer.eos_token_id is None and not opened.eos_ids:
        notes.append(
            f"the tokenizer of {name} has no EOS: what it writes ends at a stop string or at its "
            "longest length alone"
        )
    config = getattr(opened.model, "generation_config", None)
    asked = {
        key: getattr(config, key, None) for key in _CHANGING if not (forbids and key in HONOURED)
    }
    ignored = [
        f"{key}={value!r}"
        for key, value in asked.items()
        if value is not None and value != _CHANGING[key]
    ]
    if ignored:
        notes.append(
            f"greedy decoding here leaves out what the generation config of {name} asks for: "
            f"{', '.join(ignored)}"
        )
    return notes
