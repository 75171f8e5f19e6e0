"""What a model weighs and computes, by formula from its configuration: bytes, keys and values,
FLOPs. No torch.

Used where nothing has run yet (plans, skipping what cannot fit), and beside what was measured: the
two must agree. FLOPs: one multiply-add is 2; a forward pass costs 2 for each weight outside the
embedding, the head and attention included; a backward pass twice that (Kaplan et al., 2020, section
2.1).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.errors import HarnessError, in_one_line
from harness.models.checkpoint import header_entries, read_model_json, weight_files

MAX_BATCH_ROWS = {"cpu": 352, "cuda": 512}  # decoded together, where memory allows
MAX_DENSE_VOCABULARY = 2_048  # vocabularies up to this are cached whole
# of a weight in training: in fp32 itself, its gradient and Adam's two moments (Rajbhandari et al.,
# 2020)
TRAINING_BYTES_PER_WEIGHT = 16
# bytes of keys and values in use on a CPU: more rows at once than fit help it little
CPU_KV_BYTES = 2**28
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
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_WIDTHS = ("hidden_size", "n_embd", "d_model")
# whatever their configurations call heads divides a state
_HEADLESS = ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm")
# of layers, in whose stead of keys and values stands a state
_STATE_KINDS = ("linear", "conv", "mamba", "recurrent", "state")
_NO_MIXING = ("mlp", "moe")  # of layers that keep nothing
_STATES = ("mamba_d_state", "state_size", "ssm_state_size", "lru_width")
_PLAIN_FEED_FORWARD = {
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


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder's shape: what its memory and its work follow from."""

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
    window: int | None = None  # of the layers that see only so many tokens
    windowed: int = 0  # how many layers do
    experts: int = 0  # of a mixture: the counts of weights below are those of a dense model
    # layers that keep a state beside or in place of keys and values; the arithmetic knows no states
    stateful: int = 0
    attending: int | None = None  # layers that keep keys and values, where not all do

    @classmethod
    def of_folder(cls, folder: Path, *, name: str = "") -> "Shape":
        """Read a model folder's configuration."""
        return cls.of_config(read_model_json(folder / "config.json"), name=name or folder.name)

    @classmethod
    def of_config(cls, told: Mapping[str, Any], *, name: str) -> "Shape":
        """Read a transformers configuration; the older names of GPT-2's family are understood, and
        models without heads have none.
        """
        config = (
            told["text_config"]
            if isinstance(told.get("text_config"), Mapping) and told["text_config"]
            else told
        )

        def value(*names: str, default: Any = None) -> Any:
            return next((config[one] for one in names if config.get(one) is not None), default)

        needed = {
            "a width": value(*_WIDTHS),
            "a number of layers": value(*_LAYERS),
            "a vocabulary": value("vocab_size"),
        }
        missing = next((word for word, number in needed.items() if number is None), None)
        if missing:
            raise HarnessError(
                f"the configuration of {name} names {missing} in no form known here: it cannot be "
                "measured or planned"
            )
        try:
            return cls._of_values(told, config, value, name=name)
        except (ArithmeticError, TypeError, ValueError) as problem:
            raise HarnessError(
                f"the configuration of {name} states counts that are none ({in_one_line(problem)})"
            ) from problem

    @classmethod
    def _of_values(
        cls,
        told: Mapping[str, Any],
        config: Mapping[str, Any],
        value: Callable[..., Any],
        *,
        name: str,
    ) -> "Shape":
        hidden, heads, layers = _number(value(*_WIDTHS)), _heads(config), _number(value(*_LAYERS))
        kinds = _kinds(config, layers) if heads else ["state"] * layers
        windowed = sum("sliding" in kind for kind in kinds)
        if (
            not config.get("layer_types")
            and config.get("sliding_window")
            and config.get("use_sliding_window", "use_sliding_window" not in config)
        ):
            windowed = layers
        attending = sum(
            not any(word in kind for word in (*_STATE_KINDS, *_NO_MIXING)) for kind in kinds
        )
        # Falcon-H1: every layer attends and keeps a state
        both = any(config.get(key) for key in _STATES) and attending == layers
        return cls(
            name=name,
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=_kv_heads(config, heads),
            head_size=_number(value("head_dim", default=hidden // heads)) if heads else 0,
            intermediate=_number(
                value(
                    "intermediate_size",
                    "n_inner",
                    "ffn_dim",
                    default=config.get("expand", 4) * hidden,
                )
            ),
            vocabulary=int(value("vocab_size")),
            context=int(
                value("max_position_embeddings", "n_positions", "context_length", default=2048)
            ),
            tied=bool(told.get("tie_word_embeddings", config.get("tie_word_embeddings", True))),
            gated=config.get("model_type") not in _PLAIN_FEED_FORWARD,
            window=config.get("sliding_window") if windowed else None,
            windowed=windowed,
            experts=_number(
                value("num_experts", "num_local_experts", "n_routed_experts", default=0)
            ),
            stateful=layers
            if both
            else sum(any(word in kind for word in (*_STATE_KINDS, "hybrid")) for kind in kinds),
            attending=None if attending == layers else attending,
        )

    def shallower(self, share: float) -> "Shape":
        """Return the shape of a depth cut: a share of the blocks, rounded half up, at least one,
        and of each kind as large a share.
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
        """Weights of the blocks: attention, feed-forward, norms; of a model without heads, what its
        widest products have.
        """
        # Mamba: into twice the inner width and out; RWKV: five squares, and a feed-forward of two
        # matrices
        if not self.heads:
            block = (
                3 * self.hidden * self.intermediate
                if self.gated
                else self.hidden * (5 * self.hidden + 2 * self.intermediate)
            )
            return self.layers * (block + 2 * self.hidden) + self.hidden
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        feed_forward = (3 if self.gated else 2) * self.hidden * self.intermediate
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
        """Return the bytes of keys and values of `batch` rows of `tokens` tokens: 2 L B T H d
        bytes; a windowed layer holds its window.
        """
        row = 2 * self.kv_heads * self.head_size * item * batch
        short = min(tokens, self.window) if self.window else tokens
        attending = self.layers if self.attending is None else self.attending
        return row * ((attending - self.windowed) * tokens + self.windowed * short)

    def forward_flops(self, length: float) -> float:
        """Return the FLOPs of one token's forward pass in a causal sequence of `length` tokens
        (half of it seen on average).
        """
        attention = 4 * self.layers * self.heads * self.head_size * length / 2
        return 2.0 * (self.body + self.embedding) + attention

    def decode_bytes(self, *, batch: int, tokens: int, item: int) -> int:
        """Return the bytes that one decoding step reads: every weight but the unused embedding
        rows, and the keys and values.
        """
        return (self.body + self.embedding) * item + self.kv_bytes(
            batch=batch, tokens=tokens, item=item
        )


def _number(value: Any) -> int:
    """Read a number; a list that gives one to each layer counts as its mean, rounded up, and layers
    without as none.
    """
    if isinstance(value, list | tuple):
        return math.ceil(sum(each or 0 for each in value) / max(1, len(value)))
    return int(value)


def _heads(config: Mapping[str, Any]) -> int:
    """Return the query heads of an attention layer, 0 where no layer attends."""
    if config.get("model_type") in _HEADLESS:
        return 0
    return _number(next((config[name] for name in _HEADS if config.get(name) is not None), 0))


def _kv_heads(config: Mapping[str, Any], heads: int) -> int:
    """Return the heads of keys and values; Falcon says it in words of its own."""
    if not heads:
        return 0
    if config.get("model_type") == "falcon":
        return (
            int(config.get("num_kv_heads") or heads)
            if config.get("new_decoder_architecture")
            else 1
            if config.get("multi_query")
            else heads
        )
    own = config.get("num_key_value_heads")
    return _number(heads if own is None else own)


def _kinds(config: Mapping[str, Any], layers: int) -> list[str]:
    """Return what each layer is, in whichever way the configuration says it; attention where it
    says nothing.
    """
    listed = next(
        (
            config[name]
            for name in ("layer_types", "layers_block_type", "block_types")
            if config.get(name)
        ),
        None,
    )
    if listed:
        return [str(listed[index % len(listed)]) for index in range(layers)]
    if config.get("attn_layer_indices") is not None:
        return [
            "attention" if index in config["attn_layer_indices"] else "mamba"
            for index in range(layers)
        ]
    if config.get("attn_layer_period"):
        period, offset = config["attn_layer_period"], config.get("attn_layer_offset") or 0
        return [
            "attention" if index % period == offset % period else "mamba" for index in range(layers)
        ]
    return ["attention"] * layers


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
    """Return the known public shape nearest in size (by ratio), for plans that name a size and no
    model.
    """
    return min(PUBLIC_SHAPES, key=lambda one: abs(math.log(one.parameters / parameters)))


def stored_tensors(folder: Path) -> Iterator[tuple[str, str, int]]:
    """Yield (name, stored type, number of values) of every tensor, from the safetensors headers
    alone.
    """
    for path in weight_files(folder):
        for name, entry in header_entries(path).items():
            yield name, entry["dtype"], math.prod(entry["shape"])


def parameters_on_disk(folder: Path) -> int:
    """Count a model's stored parameters without opening a tensor."""
    return sum(count for _, _, count in stored_tensors(folder))


def weight_bytes(folder: Path, dtype: str) -> int:
    """Return what the stored weights take in memory once floats are opened as `dtype`; packed
    integers keep their size.
    """
    item = DTYPE_BYTES[dtype]
    return sum(
        count
        * (
            item
            if kind.startswith(("F", "BF")) and not kind.startswith("F8")
            else _STORED_BYTES.get(kind, 1)
        )
        for _, kind, count in stored_tensors(folder)
    )


def forward_flops_per_token(model: Any, length: float) -> float:
    """Count the FLOPs of one token's forward pass of an opened model: 2 per weight outside the
    embedding, head and attention included.

    Attention adds 4 * heads * head size * (length / 2) per block: scores and mixture over half the
    sequence on average.
    """
    config = model.config.get_text_config(decoder=True)
    embeddings = {id(model.get_input_embeddings().weight)}
    head = model.get_output_embeddings()
    body = sum(
        p.numel()
        for p in model.parameters()
        if id(p) not in embeddings and (head is None or p is not head.weight)
    )
    heads = getattr(config, "num_attention_heads", None) or 0  # recurrent models have none
    heads = heads if isinstance(heads, int) else max(heads)
    width = (getattr(config, "head_dim", None) or config.hidden_size // heads) if heads else 0
    attention = 4 * config.num_hidden_layers * heads * width * length / 2
    return float(2 * body + 2 * config.hidden_size * config.vocab_size + attention)
