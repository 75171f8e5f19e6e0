"""How much is computed at once: tokens of a packed forward, rows of a decoding, and what prompts
share.
"""

from collections.abc import Sequence

from harness.machine.memory import free_bytes
from harness.models.encoding import shared_prefix_length
from harness.models.language_model import LanguageModel
from harness.models.shape import CPU_KV_BYTES, MAX_BATCH_ROWS

# of one packed forward: enough to fill the device, few enough to mask cheaply
PACK_TOKENS = {"cpu": 768, "cuda": 4096}
MEMORY_SHARE = 0.4  # of the free memory, for keys and values: activations and logits take some too
WORTH_SHARING = 32  # tokens of a common beginning


def pack_tokens(opened: LanguageModel) -> int:
    """Return how many tokens one packed forward takes on this device."""
    return PACK_TOKENS["cuda" if opened.device.startswith("cuda") else "cpu"]


def rows_by_memory(opened: LanguageModel, tokens: int) -> int:
    """Return how many rows of `tokens` tokens may be decoded at once: by the device's free memory,
    and no more than helps.
    """
    kind = "cuda" if opened.device.startswith("cuda") else "cpu"
    # pages that the system gives back count as free: after a download nearly all are such
    free = free_bytes(opened.device)
    shares = [int(free * MEMORY_SHARE)] if free is not None else []
    shares += [CPU_KV_BYTES] if kind == "cpu" else []
    row = max(1, _bytes_of_row(opened, tokens))
    return max(1, min(MAX_BATCH_ROWS[kind], *(share // row for share in shares)))


def _bytes_of_row(opened: LanguageModel, tokens: int) -> int:
    """Return the bytes of a row's keys and values; of models without heads, whose state does not
    grow, what heads of their width would.
    """
    config = opened.text_config
    layers, hidden = (
        int(getattr(config, "num_hidden_layers", 0) or 1),
        int(getattr(config, "hidden_size", 0) or 1),
    )
    all_heads = getattr(config, "num_attention_heads", None)
    if not isinstance(all_heads, int) or not all_heads:
        return int(2 * layers * hidden * tokens * opened.model.dtype.itemsize)
    heads = getattr(config, "num_key_value_heads", None)
    width = getattr(config, "head_dim", None) or hidden // all_heads
    return int(
        2
        * layers
        * (heads if isinstance(heads, int) else all_heads)
        * width
        * tokens
        * opened.model.dtype.itemsize
    )


def common_beginning(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts share at their beginning, 0 where it is not worth a pass;
    a token of each is left.
    """
    first, *others = prompts
    common = min((shared_prefix_length(first, other) for other in others), default=0)
    common = min(common, min(map(len, prompts)) - 1)
    return common if common >= WORTH_SHARING else 0
