"""Counts the bytes of fake tensors that are alive, over whole steps of models of real sizes.

Nothing is computed: under `FakeTensorMode` tensors have shapes, types and storages, and no data.
Storages live and die as real ones do, autograd's saved tensors included.
"""

import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROWS, LENGTH, TRAINED = 16, 380, 0.6  # a micro-batch of the longest rows; its share of labels
QWEN_7B = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
QWEN_1_5B = {
    **QWEN_7B,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations made and that somebody still holds."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.storages = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.storages:
            return
        self.storages.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key, size):
        self.storages.discard(key)
        self.live -= size


@contextmanager
def counted():
    """Yield a count of all storages that are made inside the block; tensors have no data there."""
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as count:
        yield count


def model_of(config, dtype):
    """Return a fake model of a configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(**config)
    return AutoModelForCausalLM.from_config(made, dtype=dtype, attn_implementation="sdpa")


def hidden_states(model, rows=ROWS, length=LENGTH):
    """Run a model's body over a padded batch; return its states at the trained positions.

    The mask is made here: transformers looks at the values of one that only says which tokens are
    padding.
    """
    ids = torch.zeros((rows, length), dtype=torch.long)
    mask = torch.ones((rows, 1, length, length), dtype=torch.bool)
    states = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)
    positions = torch.zeros(int(rows * length * TRAINED), dtype=torch.long)
    return states.last_hidden_state.flatten(0, 1).index_select(0, positions)


def opened(model):
    """Return a model as the scorer takes it."""
    return SimpleNamespace(
        model=model, device="cpu", text_config=model.config, pad_id=0, context=10**6
    )
