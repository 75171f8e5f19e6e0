"""Reads a decoder's dimensions from its transformers configuration, in any family's words.

No torch. `harness.models.shape` computes bytes and FLOPs from them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from harness.errors import HarnessError, in_one_line

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_WIDTHS = ("hidden_size", "n_embd", "d_model")
_INTERMEDIATE = ("intermediate_size", "n_inner", "ffn_dim")
_CONTEXTS = ("max_position_embeddings", "n_positions", "context_length")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_LAYER_TYPES = ("layer_types", "layers_block_type", "block_types")
# Model types without attention: what their configurations call heads divides a state.
_HEADLESS = ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm")
# Words in the types of layers that keep a state in place of keys and values.
_STATE_TYPES = ("linear", "conv", "mamba", "recurrent", "state")
_FEED_FORWARD_TYPES = ("mlp", "moe")  # of layers that keep nothing
_STATE_SIZES = ("mamba_d_state", "state_size", "ssm_state_size", "lru_width")
# Model types whose feed-forward has two matrices, without a gate.
_UNGATED = {
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "opt",
    "bloom",
    "phi",
    "falcon",
    "mpt",
    "starcoder2",
    "gpt_bigcode",
    "rwkv",
}


def dimensions_of(config: Mapping[str, Any], *, name: str) -> dict[str, Any]:
    """Return the arguments of `Shape` that a configuration states, all but the name.

    The older names of GPT-2's family are understood, and models without heads have none. Raises
    `HarnessError` where a dimension is missing or is no number.
    """
    text_config = config.get("text_config")
    if not isinstance(text_config, Mapping) or not text_config:
        text_config = config
    needed = {
        "a width": _first(text_config, _WIDTHS),
        "a number of layers": _first(text_config, _LAYERS),
        "a vocabulary": text_config.get("vocab_size"),
    }
    missing = next((word for word, number in needed.items() if number is None), None)
    if missing:
        raise HarnessError(
            f"the configuration of {name} names {missing} in no form known here: it cannot be "
            "measured or planned"
        )
    tied = bool(config.get("tie_word_embeddings", text_config.get("tie_word_embeddings", True)))
    try:
        return {"tied": tied, **_text_dimensions(text_config)}
    except (ArithmeticError, TypeError, ValueError) as problem:
        raise HarnessError(
            f"the configuration of {name} states counts that are none ({in_one_line(problem)})"
        ) from problem


def _text_dimensions(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dimensions of a language model; raises built-in errors for wrong values."""
    hidden, heads = _number(_first(config, _WIDTHS)), _heads(config)
    default_intermediate = config.get("expand", 4) * hidden
    return {
        "hidden": hidden,
        "heads": heads,
        "kv_heads": _kv_heads(config, heads),
        "head_size": _number(_first(config, ["head_dim"], hidden // heads)) if heads else 0,
        "intermediate": _number(_first(config, _INTERMEDIATE, default_intermediate)),
        "vocabulary": int(config["vocab_size"]),
        "context": int(_first(config, _CONTEXTS, 2048)),
        "gated": config.get("model_type") not in _UNGATED,
        "experts": _number(_first(config, _EXPERTS, 0)),
        **_layer_counts(config, heads),
    }


def _layer_counts(config: Mapping[str, Any], heads: int) -> dict[str, Any]:
    """Return the layers in all, and how many attend, see a window only, or keep a state."""
    layers = _number(_first(config, _LAYERS))
    types = _layer_types(config, layers) if heads else ["state"] * layers
    windowed = sum("sliding" in kind for kind in types)
    uses_window = config.get("use_sliding_window", "use_sliding_window" not in config)
    if not config.get("layer_types") and config.get("sliding_window") and uses_window:
        windowed = layers
    others = (*_STATE_TYPES, *_FEED_FORWARD_TYPES)
    attending = sum(not any(word in kind for word in others) for kind in types)
    stateful = sum(any(word in kind for word in (*_STATE_TYPES, "hybrid")) for kind in types)
    if attending == layers and any(config.get(key) for key in _STATE_SIZES):
        stateful = layers  # Falcon-H1: every layer attends and keeps a state
    return {
        "layers": layers,
        "window": config.get("sliding_window") if windowed else None,
        "windowed": windowed,
        "stateful": stateful,
        "attending": None if attending == layers else attending,
    }


def _first(config: Mapping[str, Any], names: Sequence[str], default: Any = None) -> Any:
    """Return the value of the first of these settings that has one."""
    return next((config[name] for name in names if config.get(name) is not None), default)


def _number(value: Any) -> int:
    """Return a number, or the mean of a list with one for each layer, rounded up.

    Layers without a number count as 0.
    """
    if isinstance(value, list | tuple):
        return math.ceil(sum(number or 0 for number in value) / max(1, len(value)))
    return int(value)


def _heads(config: Mapping[str, Any]) -> int:
    """Return the query heads of an attention layer, 0 where no layer attends."""
    if config.get("model_type") in _HEADLESS:
        return 0
    return _number(_first(config, _HEADS, 0))


def _kv_heads(config: Mapping[str, Any], heads: int) -> int:
    """Return the heads of keys and values; Falcon has settings of its own for them."""
    if not heads:
        return 0
    if config.get("model_type") == "falcon":
        if config.get("new_decoder_architecture"):
            return int(config.get("num_kv_heads") or heads)
        return 1 if config.get("multi_query") else heads
    return _number(_first(config, ["num_key_value_heads"], heads))


def _layer_types(config: Mapping[str, Any], layers: int) -> list[str]:
    """Return the type of each layer, "attention" where the configuration does not say."""
    listed = next((config[name] for name in _LAYER_TYPES if config.get(name)), None)
    if listed:
        return [str(listed[index % len(listed)]) for index in range(layers)]
    if config.get("attn_layer_indices") is not None:
        indices = config["attn_layer_indices"]
        return ["attention" if index in indices else "mamba" for index in range(layers)]
    if config.get("attn_layer_period"):
        period, offset = config["attn_layer_period"], config.get("attn_layer_offset") or 0
        return [
            "attention" if index % period == offset % period else "mamba" for index in range(layers)
        ]
    return ["attention"] * layers
