"""Generation settings of tasks and generation configs, and which of them greedy decoding obeys."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from harness.errors import CellFailed
from harness.models.encoding import appends_eos
from harness.models.language_model import LanguageModel
from harness.scoring.forbidden import SUPPORTED_SETTINGS

DEFAULT_NEW_TOKENS = 256  # lm-eval's own default where a task sets none
# Settings of sampling and of beam search, which change nothing in greedy decoding.
_SAMPLING_SETTINGS = {
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
_NEUTRAL_VALUES = {
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


class GreedySettings(NamedTuple):
    """How an answer ends: its longest length in tokens, and its stop strings."""

    new_tokens: int
    stop: tuple[str, ...]


def greedy_settings(requested: Mapping[str, Any], *, task: str, eos: str | None) -> GreedySettings:
    """Read a task's generation settings, by any of lm-eval's names for them.

    Raises `CellFailed` for a setting that greedy decoding does not obey.
    """
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    settings = dict(normalize_gen_kwargs(dict(requested), DEFAULT_NEW_TOKENS))
    stop = handle_stop_sequences(settings.pop("until"), eos=eos)
    new_tokens = int(settings.pop("max_gen_toks"))
    if settings.get("do_sample") or settings.get("num_beams", 1) != 1:
        raise CellFailed(
            f"task {task} asks for sampling or beams ({dict(requested)}); only greedy decoding is "
            "scored"
        )
    if new_tokens < 1:
        raise CellFailed(
            f"task {task} asks for answers of {new_tokens} tokens; set its max_gen_toks to 1 or "
            "more"
        )
    unknown = object()
    unsupported = {
        key: value
        for key, value in settings.items()
        if key not in _SAMPLING_SETTINGS
        and value is not None
        and value != _NEUTRAL_VALUES.get(key, unknown)
    }
    if unsupported:
        raise CellFailed(
            f"task {task} asks for {unsupported}, which greedy decoding does not support; remove "
            "it from its generation_kwargs"
        )
    # an empty stop string stops nothing, as in lm-eval
    return GreedySettings(new_tokens, tuple(str(text) for text in stop if text))


def model_notes(opened: LanguageModel, *, forbids: bool = True) -> list[str]:
    """Return notes for readers of a model's scores, about its tokenizer and generation config.

    `forbids`: whether the backend obeys the tokens that the generation config forbids.
    """
    notes = []
    name, tokenizer = opened.checkpoint.name, opened.tokenizer
    if appends_eos(tokenizer):
        notes.append(
            f"the tokenizer of {name} ends every prompt with {tokenizer.eos_token!r}, and the "
            "model answers after that token, as in lm-eval: the scores mean little; set "
            "add_eos_token to false in its tokenizer_config.json"
        )
    if opened.tokenizer.eos_token_id is None and not opened.eos_ids:
        notes.append(
            f"the tokenizer of {name} has no EOS: its answers end only at a stop string or at "
            "their longest length"
        )
    config = getattr(opened.model, "generation_config", None)
    requested = {
        key: getattr(config, key, None)
        for key in _NEUTRAL_VALUES
        if not (forbids and key in SUPPORTED_SETTINGS)
    }
    ignored = [
        f"{key}={value!r}"
        for key, value in requested.items()
        if value is not None and value != _NEUTRAL_VALUES[key]
    ]
    if ignored:
        notes.append(
            f"greedy decoding ignores settings in the generation config of {name}: "
            f"{', '.join(ignored)}"
        )
    return notes
