"""Stands in for llama-cpp-python: its low-level functions, computed by a transformers model.

One sequence, whose tokens are kept; every pass reads them all again.
"""

import ctypes
import sys
from types import ModuleType, SimpleNamespace

import numpy as np


def install(monkeypatch, opened):
    """Put a module `llama_cpp` in place that computes with an opened model."""
    import torch

    stand_in = ModuleType("llama_cpp")
    context = SimpleNamespace(tokens=[], rows=None)

    def memory_seq_rm(memory, sequence, first, last):
        assert sequence == 0 and last == -1 and first <= len(memory.tokens)
        del memory.tokens[first:]
        return True

    def batch_init(count, embedding, sequences):
        assert embedding == 0 and sequences == 1
        return SimpleNamespace(
            n_tokens=0,
            token=[0] * count,
            pos=[0] * count,
            n_seq_id=[0] * count,
            seq_id=[[0] for _ in range(count)],
            logits=[False] * count,
        )

    def decode(place, batch):
        positions = batch.pos[: batch.n_tokens]
        start = len(place.tokens)
        assert positions == [*range(start, start + batch.n_tokens)], "a gap in the text"
        place.tokens += batch.token[: batch.n_tokens]
        with torch.inference_mode():
            logits = opened.model(torch.tensor([place.tokens])).logits[0, start:].float()
        place.rows = {
            index: np.ascontiguousarray(row.numpy())
            for index, row in enumerate(logits)
            if batch.logits[index]
        }
        return 0

    def get_logits_ith(place, index):
        return place.rows[index].ctypes.data_as(ctypes.POINTER(ctypes.c_float))

    def init_from_model(model, settings):
        context.tokens, context.length = [], settings.n_ctx
        return context

    nothing = lambda *_: None  # noqa: E731
    functions = {
        "llama_log_callback": lambda function: function,
        "llama_log_set": nothing,
        "llama_backend_init": nothing,
        "llama_model_default_params": SimpleNamespace,
        "llama_context_default_params": SimpleNamespace,
        "llama_model_load_from_file": lambda path, settings: opened,
        "llama_model_get_vocab": lambda model: model,
        "llama_vocab_n_tokens": lambda model: model.vocabulary,
        "llama_model_n_ctx_train": lambda model: model.context,
        "llama_init_from_model": init_from_model,
        "llama_get_memory": lambda place: place,
        "llama_memory_seq_rm": memory_seq_rm,
        "llama_memory_clear": nothing,
        "llama_batch_init": batch_init,
        "llama_batch_free": nothing,
        "llama_decode": decode,
        "llama_get_logits_ith": get_logits_ith,
        "llama_state_seq_get_size": lambda place, sequence: 64 * len(place.tokens),
        "llama_free": nothing,
        "llama_model_free": nothing,
    }
    for name, function in functions.items():
        setattr(stand_in, name, function)
    stand_in.__version__ = "0.0"
    stand_in.__spec__ = SimpleNamespace(name="llama_cpp")
    monkeypatch.setitem(sys.modules, "llama_cpp", stand_in)
    return context
