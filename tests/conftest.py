"""Shared fixtures: tiny random models, and sockets that refuse."""

import os
import socket

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


@pytest.fixture
def no_network(monkeypatch):
    """Block connections and name resolution; return the list of attempts."""
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise OSError("the network is blocked in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    return attempts


@pytest.fixture(scope="session")
def random_model(tmp_path_factory):
    """Return a saved model of 2 blocks with random weights and the embedded tokenizer."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    from harness.checkpoint import describe
    from harness.model import EMBEDDED

    folder = tmp_path_factory.mktemp("models") / "random"
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "tiny")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return describe(folder, name="random")


@pytest.fixture(scope="session")
def embedded():
    """Return the embedded teacher `tiny`, opened."""
    from pathlib import Path

    from harness.model import open_model, resolve

    return open_model(resolve("tiny", cache=Path("unused")))


@pytest.fixture(scope="session")
def small():
    """Return a maker of random models of two blocks with grouped heads and the embedded tokenizer, by transformers' class."""

    def make(kind, **changes):
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        from harness.checkpoint import describe
        from harness.model import EMBEDDED, LanguageModel

        torch.manual_seed(0)
        sizes = {
            "vocab_size": 1024, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": 512,
        }  # fmt: skip
        if kind != "GPTNeoX":
            sizes |= {"num_key_value_heads": 2, "head_dim": 8}
        config = AutoConfig.for_model({"GPTNeoX": "gpt_neox"}.get(kind, kind.lower()), **{**sizes, **changes})
        model = AutoModelForCausalLM.from_config(config).eval()
        folder = EMBEDDED / "tiny"
        return LanguageModel(model, AutoTokenizer.from_pretrained(folder), "cpu", describe(folder, name=kind))

    return make
