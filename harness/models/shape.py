"""What a model weighs and computes, by formula from its configuration. No torch.

Bytes, keys and values, FLOPs: used where nothing has run yet (plans, skipping what cannot fit), and
compared with what was measured. FLOPs: one multiply-add is 2; a forward pass costs 2 for each
weight outside the embedding, the head and attention included; a backward pass twice that (Kaplan et
al., 2020, section 2.1).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from harness.models.cache_format import CacheFormat, cache_format_in
from harness.models.checkpoint import header_entries, read_model_json, weight_files
from harness.models.dimensions import dimensions_of

MAX_BATCH_ROWS = {"cpu": 352, "cuda": 512}  # decoded together, where memory allows
MAX_DENSE_VOCABULARY = 2_048  # distributions over a larger one are cached as their top tokens
# The weight, its gradient and Adam's two moments, each in fp32 (Rajbhandari et al., 2020).
TRAINING_BYTES_PER_WEIGHT = 16
CPU_KV_BYTES = 2**28  # of keys and values on a CPU: a larger batch helps it little
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_STORED_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "U32": 4,
    "U64": 8,
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder's shape, from which its memory and its work follow."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    context: int
    tied: bool
    gated: bool = True  # three matrices in a feed-forward, else two
    window: int | None = None  # tokens that a windowed layer sees
    windowed: int = 0  # layers with a window
    experts: int = 0  # of a mixture; weights below are counted as those of a dense model
    # layers that keep a state beside or in place of keys and values; states are not counted below
    stateful: int = 0
    attending: int | None = None  # layers that keep keys and values; None for all
    cache: CacheFormat | None = None  # in which keys and values are stored; None for floats

    @classmethod
    def of_folder(cls, folder: Path, *, name: str = "") -> "Shape":
        """Read a model folder's configuration."""
        return cls.of_config(read_model_json(folder / "config.json"), name=name or folder.name)

    @classmethod
    def of_config(cls, config: Mapping[str, Any], *, name: str) -> "Shape":
        """Read a transformers configuration; raises `HarnessError` where it lacks a dimension."""
        cache = cache_format_in(config, f"the configuration of {name}")
        return cls(name=name, cache=cache, **dimensions_of(config, name=name))

    def shallower(self, share: float) -> "Shape":
        """Return the shape of a depth cut: a share of the blocks, and of each kind of block.

        Counts are rounded half up; at least one block is left.
        """
        kept = max(1, int(self.layers * share + 0.5))

        def part(count: int) -> int:
            return min(kept, int(count * kept / self.layers + 0.5))

        return replace(
            self,
            name=f"depth:{share:g} of {self.name}",
            layers=kept,
            windowed=part(self.windowed),
            stateful=part(self.stateful),
            attending=None if self.attending is None else part(self.attending),
        )

    def narrower(self, share: float) -> "Shape":
        """Return the shape of a width cut: a share of every feed-forward's channels."""
        return replace(
            self,
            name=f"width:{share:g} of {self.name}",
            intermediate=max(1, int(self.intermediate * share + 0.5)),
        )

    @property
    def body(self) -> int:
        """Weights of the blocks: attention, feed-forward, norms.

        Of a model without heads, those of its largest products.
        """
        feed_forward = (3 if self.gated else 2) * self.hidden * self.intermediate
        if self.heads:
            attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        elif self.gated:
            attention = 0  # Mamba: into twice the inner width, and out of it
        else:
            attention = 5 * self.hidden * self.hidden  # RWKV: five squares
        return self.layers * (attention + feed_forward + 2 * self.hidden) + self.hidden

    @property
    def embedding(self) -> int:
        """Weights of the embedding; the head has as many of its own where it is not tied."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All weights, each once."""
        return self.body + self.embedding * (1 if self.tied else 2)

    def kv_bytes(self, *, batch: int, tokens: int, item: int) -> int:
        """Return the bytes of keys and values of `batch` rows of `tokens` tokens: 2 L B T H d.

        `item` is the bytes of one number; a quantized cache stores codes in its place. A windowed
        layer holds its window.
        """
        vector = self.head_size * item
        if self.cache is not None and self.head_size:
            vector = self.cache.vector_bytes(self.head_size)
        row = 2 * self.kv_heads * vector * batch
        window = min(tokens, self.window) if self.window else tokens
        attending = self.layers if self.attending is None else self.attending
        return row * ((attending - self.windowed) * tokens + self.windowed * window)

    def decoded_bytes(self, *, batch: int, tokens: int, item: int) -> int:
        """Return the bytes of one layer's keys and values as floats, while it attends to them.

        0 where they are stored as floats.
        """
        if self.cache is None:
            return 0
        return 2 * self.kv_heads * self.head_size * item * batch * tokens

    def in_floats(self) -> "Shape":
        """Return the shape with a cache of floats, as the scorer keeps it."""
        return replace(self, cache=None)

    def forward_flops(self, length: float) -> float:
        """Return the FLOPs of one token's forward pass in a causal sequence of `length` tokens.

        A token sees half the sequence on average.
        """
        attention = 4 * self.layers * self.heads * self.head_size * length / 2
        return 2.0 * (self.body + self.embedding) + attention

    def decode_bytes(self, *, batch: int, tokens: int, item: int) -> int:
        """Return the bytes that a decoding step reads.

        All weights but the unused embedding rows, and the keys and values. Codes of a quantized
        cache are written as floats, which are read again.
        """
        weights = self.body + self.embedding
        cache = self.kv_bytes(batch=batch, tokens=tokens, item=item)
        if self.cache is not None:
            cache += 2 * self.in_floats().kv_bytes(batch=batch, tokens=tokens, item=item)
        return weights * item + cache


def _public_shape(
    name: str,
    layers: int,
    hidden: int,
    attention: tuple[int, int, int],  # query heads, heads of keys and values, size of a head
    intermediate: int,
    vocabulary: int,
    context: int,
    tied: bool = False,
) -> Shape:
    heads, kv_heads, head_size = attention
    return Shape(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        intermediate=intermediate,
        vocabulary=vocabulary,
        context=context,
        tied=tied,
    )


PUBLIC_SHAPES = (  # from the models' public configurations
    _public_shape("SmolLM2-135M", 30, 576, (9, 3, 64), 1_536, 49_152, 8_192, tied=True),
    _public_shape("Qwen2.5-0.5B", 24, 896, (14, 2, 64), 4_864, 151_936, 32_768, tied=True),
    _public_shape("Llama-3.2-1B", 16, 2_048, (32, 8, 64), 8_192, 128_256, 131_072, tied=True),
    _public_shape("Llama-3.2-3B", 28, 3_072, (24, 8, 128), 8_192, 128_256, 131_072, tied=True),
    _public_shape("Llama-2-7B", 32, 4_096, (32, 32, 128), 11_008, 32_000, 4_096),
    _public_shape("Llama-3.1-8B", 32, 4_096, (32, 8, 128), 14_336, 128_256, 131_072),
    _public_shape("Llama-2-13B", 40, 5_120, (40, 40, 128), 13_824, 32_000, 4_096),
    _public_shape("Qwen2.5-32B", 64, 5_120, (40, 8, 128), 27_648, 152_064, 32_768),
    _public_shape("Llama-3.1-70B", 80, 8_192, (64, 8, 128), 28_672, 128_256, 131_072),
    _public_shape("Llama-3.1-405B", 126, 16_384, (128, 8, 128), 53_248, 128_256, 131_072),
)


def shape_of_size(parameters: float) -> Shape:
    """Return the public shape nearest in size, by ratio, for plans that name only a size."""
    return min(PUBLIC_SHAPES, key=lambda shape: abs(math.log(shape.parameters / parameters)))


class StoredTensor(NamedTuple):
    """A tensor in a weight file."""

    name: str
    dtype: str  # as the safetensors format writes it: "BF16"
    numel: int  # how many numbers it has


def stored_tensors(folder: Path) -> Iterator[StoredTensor]:
    """Yield every tensor of a model folder, from the safetensors headers alone."""
    for path in weight_files(folder):
        for name, entry in header_entries(path).items():
            yield StoredTensor(name, entry["dtype"], math.prod(entry["shape"]))


def parameters_on_disk(folder: Path) -> int:
    """Return how many parameters a model folder holds; reads headers only."""
    return sum(tensor.numel for tensor in stored_tensors(folder))


def parameters_of_architecture(model: Any) -> int:
    """Return how many parameters an opened model's architecture has, however they are packed.

    A model of the same configuration is built without memory. Adapters, which lie beside that,
    count as they are.
    """
    import copy

    import torch

    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = getattr(model, "plain_class", type(model))(config)
    plain.tie_weights()
    adapters = sum(
        parameter.numel() for name, parameter in model.named_parameters() if ".lora_" in name
    )
    return int(sum(parameter.numel() for parameter in plain.parameters()) + adapters)


def weight_bytes(folder: Path, dtype: str) -> int:
    """Return the bytes of a folder's weights in memory, its floats opened as `dtype`.

    Packed integers keep their size.
    """

    def bytes_of(stored_dtype: str) -> int:
        is_float = stored_dtype.startswith(("F", "BF")) and not stored_dtype.startswith("F8")
        return DTYPE_BYTES[dtype] if is_float else _STORED_BYTES.get(stored_dtype, 1)

    return sum(tensor.numel * bytes_of(tensor.dtype) for tensor in stored_tensors(folder))


def weight_counts(model: Any) -> dict[int, int]:
    """Return for how many weights each parameter of an opened model stands, by its `id`.

    The codes of a packed matrix stand for all of its weights, its scales and zero points for none.
    """
    counts = {id(parameter): int(parameter.numel()) for parameter in model.parameters()}
    for module in model.modules():
        if hasattr(module, "dequantized"):
            for name, parameter in module.named_parameters(recurse=False):
                if name != "bias":
                    counts[id(parameter)] = 0
            counts[id(module.weight)] = int(module.out_features * module.in_features)
    return counts


def forward_flops_per_token(model: Any, length: float) -> float:
    """Return the FLOPs of one token's forward pass of an opened model.

    2 per weight outside the embedding, the head included. Attention adds 4 * heads * head size *
    (length / 2) per block: scores and mixture over half the sequence on average.
    """
    config = model.config.get_text_config(decoder=True)
    embeddings = {id(model.get_input_embeddings().weight)}
    head = model.get_output_embeddings()
    counts = weight_counts(model)
    body = sum(
        counts[id(parameter)]
        for parameter in model.parameters()
        if id(parameter) not in embeddings and (head is None or parameter is not head.weight)
    )
    heads = getattr(config, "num_attention_heads", None) or 0  # recurrent models have none
    heads = heads if isinstance(heads, int) else max(heads)
    width = (getattr(config, "head_dim", None) or config.hidden_size // heads) if heads else 0
    attention = 4 * config.num_hidden_layers * heads * width * length / 2
    return float(2 * body + 2 * config.hidden_size * config.vocab_size + attention)
