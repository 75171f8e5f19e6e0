"""How much is computed at once: tokens in a packed forward, rows in a decoding, shared prefixes."""

from collections.abc import Sequence

from harness.machine.memory import free_bytes
from harness.models.encoding import shared_prefix_length
from harness.models.language_model import LanguageModel
from harness.models.shape import CPU_KV_BYTES, MAX_BATCH_ROWS

# of one packed forward: enough to fill the device, few enough to mask cheaply
PACK_TOKENS = {"cpu": 768, "cuda": 4096}
MEMORY_SHARE = 0.4  # of the free memory, for keys and values: activations and logits need some too
MIN_SHARED_TOKENS = 32  # a shorter common prefix is not worth a forward of its own


def tokens_per_pack(opened: LanguageModel) -> int:
    """Return how many tokens one packed forward takes on this device."""
    return PACK_TOKENS["cuda" if opened.device.startswith("cuda") else "cpu"]


def rows_that_fit(opened: LanguageModel, tokens: int) -> int:
    """Return how many rows of `tokens` tokens to decode at once.

    The device's free memory limits them, and so does the number above which more rows do not help.
    """
    kind = "cuda" if opened.device.startswith("cuda") else "cpu"
    # free_bytes counts pages that the system can give back: after a download nearly all are such
    free = free_bytes(opened.device)
    budgets = [int(free * MEMORY_SHARE)] if free is not None else []
    budgets += [CPU_KV_BYTES] if kind == "cpu" else []
    row_bytes = max(1, _row_bytes(opened, tokens))
    return max(1, min(MAX_BATCH_ROWS[kind], *(budget // row_bytes for budget in budgets)))


def _row_bytes(opened: LanguageModel, tokens: int) -> int:
    """Return the bytes of a row's keys and values.

    For a model without attention heads, whose state does not grow, heads as wide as the model are
    assumed.
    """
    config = opened.text_config
    layers = int(getattr(config, "num_hidden_layers", 0) or 1)
    hidden_size = int(getattr(config, "hidden_size", 0) or 1)
    query_heads = getattr(config, "num_attention_heads", None)
    if not isinstance(query_heads, int) or not query_heads:
        return int(2 * layers * hidden_size * tokens * opened.model.dtype.itemsize)
    key_heads = getattr(config, "num_key_value_heads", None)
    heads = key_heads if isinstance(key_heads, int) else query_heads
    head_size = getattr(config, "head_dim", None) or hidden_size // query_heads
    return int(2 * layers * heads * head_size * tokens * opened.model.dtype.itemsize)


def worthwhile_prefix_length(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens at the beginning of all prompts are the same.

    At least one token of each prompt is left out of it. 0 where the prefix is too short to be worth
    a forward of its own.
    """
    first, *others = prompts
    common = min((shared_prefix_length(first, other) for other in others), default=0)
    common = min(common, min(map(len, prompts)) - 1)
    return common if common >= MIN_SHARED_TOKENS else 0
